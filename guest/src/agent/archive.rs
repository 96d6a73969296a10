//! The operations `push` and `pull`: trees as tar. Packing and unpacking have a thread each.

use std::fs;
use std::io::{self, Write as _};
use std::path::Path;

use machinen_archive::{ChunkWriter, Error, Source, Target};
use machinen_protocol::frame::HEADER;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::{JoinHandle, spawn_blocking};

use super::exchange::Exchange;
use super::stream::{Abort, CHUNK};
use super::threads::{ARCHIVES, Incoming, Outgoing};
use crate::reply::{Code, EntryCount, ErrorReply};
use crate::request;
use crate::system::host_name::{self, Names};

/// Packs a directory's contents into a file.
pub async fn save(directory: &'static str, file: &'static str) -> Result<(), Abort> {
    let packing = spawn_blocking(move || {
        let source = Source::open(directory, &[], true).map_err(|error| ErrorReply::io(directory, &error))?;
        let mut archive = fs::File::create(file).map_err(|error| ErrorReply::io(file, &error))?;
        Ok(source.pack(ChunkWriter::new(0, |chunk| archive.write_all(&chunk).map(|()| chunk)))?)
    });
    finished(packing).await
}

/// Unpacks a file that `save` has made.
pub async fn load(file: &'static str, directory: &'static str) -> Result<(), Abort> {
    let unpacking = spawn_blocking(move || {
        let target = Target::open(directory).map_err(|error| ErrorReply::io(directory, &error))?;
        let archive = fs::File::open(file).map_err(|error| ErrorReply::io(file, &error))?;
        Ok(target.unpack(io::BufReader::with_capacity(CHUNK, archive))?)
    });
    finished(unpacking).await
}

/// Unpacks the stream into a directory, or as one file.
pub async fn push<R, W>(request: request::Push, exchange: &mut Exchange<R, W>) -> Result<EntryCount, Abort>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let unpacking = move |mut incoming: Incoming| {
        let opened = if request.file { Target::file(&request.path) } else { Target::open(&request.path) };
        let target = opened.map_err(|error| ErrorReply::io(&request.path, &error))?;
        incoming.opened();
        Ok(EntryCount { entries: target.unpack(incoming)? })
    };
    ARCHIVES.receive(exchange, unpacking).await
}

/// Packs a directory's contents, or one file, into the stream.
pub async fn pull<R, W>(request: request::Pull, exchange: &mut Exchange<R, W>) -> Result<EntryCount, Abort>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let packing = move |outgoing: &mut Outgoing| {
        let request::Pull { path, follow, excludes } = request;
        let source = Source::open(&path, &excludes, follow).map_err(|error| ErrorReply::io(&path, &error))?;
        send(source, outgoing)
    };
    ARCHIVES.send(exchange, packing).await
}

/// Packs the root filesystem into the stream, for another machine to start from.
pub async fn image<R, W>(request: request::Image, exchange: &mut Exchange<R, W>) -> Result<EntryCount, Abort>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let packing = move |outgoing: &mut Outgoing| {
        let source = Source::filesystem("/", request.newest).map_err(|error| ErrorReply::io("/", &error))?;
        // The files carry this machine's host name. The image gets `localhost` instead, so that the same build gives the same image.
        let unnamed = Names::open(Path::new("/")).rename(&host_name::current(), "localhost");
        unnamed.map_err(|error| ErrorReply::io("/etc/hostname, /etc/hosts", &error))?;
        send(source, outgoing)
    };
    ARCHIVES.send(exchange, packing).await
}

fn send(source: Source, outgoing: &mut Outgoing) -> Result<EntryCount, ErrorReply> {
    outgoing.opened().map_err(|error| ErrorReply::io("archive", &error))?;
    let entries = source.pack(ChunkWriter::new(HEADER, |chunk| outgoing.hand_on(chunk)))?;
    Ok(EntryCount { entries })
}

impl From<Error> for ErrorReply {
    fn from(failed: Error) -> Self {
        match failed {
            Error::Refused(_) => Self::new(Code::BadRequest, failed.to_string()),
            Error::Io { path, error } => Self::io(&path, &error),
        }
    }
}

async fn finished(thread: JoinHandle<Result<u64, ErrorReply>>) -> Result<(), Abort> {
    // Joining fails only after a panic, which ends the whole agent.
    thread.await.map_err(|error| Abort::io("archive", &error.into()))??;
    Ok(())
}
