//! The operations `push` and `pull`: trees as tar. Packing and unpacking block, so each has a thread of its own; this end of it only
//! carries bytes between that thread and the stream, a few pieces at a time, so that each holds the other back.

use std::fs;
use std::io::{self, Read, Write as _};
use std::path::Path;

use bytes::{Buf, Bytes};
use machinen_archive::{Error, Pieces, Source, Target};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, spawn_blocking};

use super::operation::Exchange;
use super::stream::{Abort, CHUNK};
use crate::frame::{HEADER, Kind};
use crate::init::late;
use crate::init::names::Names;
use crate::reply::{Archived, Code, Done, ErrorReply};
use crate::request;

/// Pieces under way between stream and thread.
const PIECES: usize = 4;

/// Packs a directory's contents into a file.
pub async fn save(directory: &'static str, file: &'static str) -> Result<(), Abort> {
    let packing = spawn_blocking(move || {
        let source = Source::open(directory, &[], true).map_err(|error| ErrorReply::io(directory, &error))?;
        let mut archive = fs::File::create(file).map_err(|error| ErrorReply::io(file, &error))?;
        Ok(source.pack(Pieces::new(0, |piece| archive.write_all(&piece).map(|()| piece)))?)
    });
    entries(packing).await.map(drop)
}

/// Unpacks such a file.
pub async fn load(file: &'static str, directory: &'static str) -> Result<(), Abort> {
    let unpacking = spawn_blocking(move || {
        let target = Target::open(directory).map_err(|error| ErrorReply::io(directory, &error))?;
        let archive = fs::File::open(file).map_err(|error| ErrorReply::io(file, &error))?;
        Ok(target.unpack(io::BufReader::with_capacity(CHUNK, archive))?)
    });
    entries(unpacking).await.map(drop)
}

/// Unpacks the stream into a directory, or as one file.
pub async fn push<R, W>(request: &request::Push, exchange: &mut Exchange<R, W>) -> Result<Archived, Abort>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let opened = if request.file { Target::file(&request.path) } else { Target::open(&request.path) };
    let target = opened.map_err(|error| Abort::io(&request.path, &error))?;
    let (pieces, arriving) = mpsc::channel(PIECES);
    let unpacking = spawn_blocking(move || Ok(target.unpack(Arriving { pieces: arriving, piece: Bytes::new() })?));
    exchange.output.send_json(Kind::Started, &Done {}).await?;
    loop {
        let piece = tokio::select! {
            // It has failed, and says below why: at once, not when the host has sent everything.
            () = pieces.closed() => break,
            piece = exchange.input.body() => piece?,
        };
        let Some(piece) = piece else { break };
        // Fails with the receiver, which the next turn sees.
        let _ = pieces.send(piece).await;
    }
    drop(pieces);
    entries(unpacking).await
}

/// Packs a directory's contents, or one file, into the stream.
pub async fn pull<R, W>(request: request::Pull, exchange: &mut Exchange<R, W>) -> Result<Archived, Abort>
where
    W: AsyncWrite + Unpin,
{
    let request::Pull { path, follow, excludes } = request;
    let source = Source::open(&path, &excludes, follow).map_err(|error| Abort::io(&path, &error))?;
    send(source, exchange).await
}

/// Packs the root filesystem into the stream, for another machine to start from.
pub async fn image<R, W>(request: &request::Image, exchange: &mut Exchange<R, W>) -> Result<Archived, Abort>
where
    W: AsyncWrite + Unpin,
{
    let source = Source::filesystem("/", request.newest).map_err(|error| Abort::io("/", &error))?;
    // The name in its files is this machine's alone: the same build gives the same image.
    let unnamed = Names::open(Path::new("/")).rename(&late::hostname(), "localhost");
    unnamed.map_err(|error| Abort::io("/etc/hostname, /etc/hosts", &error))?;
    send(source, exchange).await
}

async fn send<R, W>(source: Source, exchange: &mut Exchange<R, W>) -> Result<Archived, Abort>
where
    W: AsyncWrite + Unpin,
{
    exchange.output.send_json(Kind::Started, &Done {}).await?;
    let (pieces, mut leaving) = mpsc::channel(PIECES);
    let (used, mut spare) = mpsc::channel(PIECES);
    let packing = spawn_blocking(move || {
        let hand_on = |piece| {
            pieces.blocking_send(piece).map_err(|_| io::ErrorKind::BrokenPipe)?;
            Ok(spare.try_recv().unwrap_or_default())
        };
        Ok(source.pack(Pieces::new(HEADER, hand_on))?)
    });
    while let Some(mut piece) = leaving.recv().await {
        exchange.output.send_frame(Kind::Data, &mut piece).await?;
        // None is missed: then the packer makes another.
        let _ = used.try_send(piece);
    }
    let archived = entries(packing).await?;
    exchange.output.send(Kind::Eof, &[]).await?;
    Ok(archived)
}

impl From<Error> for ErrorReply {
    fn from(failed: Error) -> Self {
        match failed {
            Error::Refused(_) => Self::new(Code::BadRequest, failed.to_string()),
            Error::Io { path, error } => Self::io(&path, &error),
        }
    }
}

async fn entries(thread: JoinHandle<Result<u64, ErrorReply>>) -> Result<Archived, Abort> {
    // Only a panic could lose the result, and that ends the whole agent.
    let entries = thread.await.map_err(|error| Abort::io("archive", &error.into()))??;
    Ok(Archived { entries })
}

/// The stream's data, as the thread reads it.
struct Arriving {
    pieces: mpsc::Receiver<Bytes>,
    piece: Bytes,
}

impl Read for Arriving {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            match self.pieces.blocking_recv() {
                Some(piece) => self.piece = piece,
                None => return Ok(0),
            }
        }
        let length = buffer.len().min(self.piece.len());
        self.piece.copy_to_slice(&mut buffer[..length]);
        Ok(length)
    }
}
