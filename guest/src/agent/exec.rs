//! The operation `exec`: a command's life on one stream.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::{Buf, Bytes};
use machinen_channel::Opener;
use rustix::io::ioctl_fionread;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::unix::pipe;
use tokio::sync::{Mutex, watch};

use super::Context;
use super::command::{self, Running};
use super::operation::Exchange;
use super::stream::{Abort, CHUNK, Chunk, FrameReader, FrameWriter};
use crate::frame::{Frame, Kind};
use crate::reply::{Exit, Started};
use crate::request::Exec;

/// How far the agent reads ahead of a command that does not read its input, so that signals and the end of the stream behind
/// the input are seen all the same.
const MAX_AHEAD: usize = 1 << 20;
/// Highest signal number there is.
const MAX_SIGNAL: u8 = 64;

/// Runs a command to its end. When the stream ends before, its process group is killed.
pub async fn exec<R, W>(context: &Context, request: Exec, exchange: &mut Exchange<R, W>) -> Result<Exit, Abort>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let running = command::start(&context.config(), &context.secrets(), &request)?;
    attend(running, exchange, &AtomicBool::new(false), &mut Nowhere).await
}

/// Says that `running` has started and connects it with the stream until it ends. In a copy, whose streams are lost, and once it
/// `is_detached`, it goes on without input, and with its output going to `detached`.
pub async fn attend<R, W>(
    mut running: Running,
    exchange: &mut Exchange<R, W>,
    is_detached: &AtomicBool,
    detached: &mut impl Output,
) -> Result<Exit, Abort>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let stdin = running.stdin.take();
    let started = Started { pid: running.process.pid.as_raw_pid().cast_unsigned() };
    let Exchange { input, output: stream, session } = exchange;
    let bond = Bond { session, is_detached };
    let attended = async {
        match stream.send_json(Kind::Started, &started).await {
            Err(abort) if !bond.is_outlived(&abort) => return Err(abort),
            _ => {}
        }
        let obeyed = async {
            let abort = obey(input, stdin, &running).await;
            if bond.is_outlived(&abort) {
                std::future::pending::<()>().await;
            }
            abort
        };
        let mut outlet = Outlet { stream, bond, detached };
        tokio::select! {
            ended = pump_until_end(&running, &mut outlet) => ended,
            abort = obeyed => Err(abort),
        }
    }
    .await;
    if attended.is_err() {
        running.process.signal(libc::SIGKILL);
        // Reaps it. It was killed: how it ended interests nobody.
        let _ = running.process.wait().await;
    }
    attended
}

/// What ties a command to its stream.
#[derive(Clone, Copy)]
struct Bond<'a> {
    session: &'a Opener,
    is_detached: &'a AtomicBool,
}

impl Bond<'_> {
    fn is_detached(&self) -> bool {
        self.is_detached.load(Ordering::Relaxed)
    }

    /// Whether the command goes on though its stream is lost: because it was detached before, or because the whole session ended, as it
    /// does in a copy.
    fn is_outlived(&self, abort: &Abort) -> bool {
        matches!(abort, Abort::Gone) && (self.is_detached() || !self.session.is_connected())
    }
}

/// Where a command's output goes.
pub trait Output {
    async fn send_chunk(&mut self, chunk: &mut Chunk, kind: Kind, length: usize) -> Result<(), Abort>;
}

impl<W: AsyncWrite + Unpin> Output for FrameWriter<W> {
    async fn send_chunk(&mut self, chunk: &mut Chunk, kind: Kind, length: usize) -> Result<(), Abort> {
        FrameWriter::send_chunk(self, chunk, kind, length).await
    }
}

/// The stream, as long as it is to be one's.
struct Outlet<'a, W, D> {
    stream: &'a mut FrameWriter<W>,
    bond: Bond<'a>,
    /// From then on.
    detached: &'a mut D,
}

impl<W: AsyncWrite + Unpin, D: Output> Output for Outlet<'_, W, D> {
    async fn send_chunk(&mut self, chunk: &mut Chunk, kind: Kind, length: usize) -> Result<(), Abort> {
        if self.bond.is_detached() {
            return self.detached.send_chunk(chunk, kind, length).await;
        }
        match self.stream.send_chunk(chunk, kind, length).await {
            Err(abort) if self.bond.is_outlived(&abort) => self.detached.send_chunk(chunk, kind, length).await,
            sent => sent,
        }
    }
}

/// Reads on so that the command never waits for a reader, for nobody.
struct Nowhere;

impl Output for Nowhere {
    async fn send_chunk(&mut self, _: &mut Chunk, _: Kind, _: usize) -> Result<(), Abort> {
        Ok(())
    }
}

/// Sends both outputs until the command ends, and then what it has left in its pipes.
pub async fn pump_until_end(running: &Running, output: &mut impl Output) -> Result<Exit, Abort> {
    let output = Mutex::new(output);
    let (ended, end) = watch::channel(false);
    let wait = async {
        let exit = running.process.wait().await.map_err(|error| Abort::io("wait", &error))?;
        ended.send_replace(true);
        Ok(exit)
    };
    let stdout = pump(&running.stdout, Kind::Stdout, &output, end.clone());
    let stderr = pump(&running.stderr, Kind::Stderr, &output, end);
    let (exit, (), ()) = tokio::try_join!(wait, stdout, stderr)?;
    Ok(exit)
}

async fn pump(
    pipe: &pipe::Receiver,
    kind: Kind,
    output: &Mutex<&mut impl Output>,
    mut end: watch::Receiver<bool>,
) -> Result<(), Abort> {
    // Made when there is something to put in: most commands write nothing to one of the two.
    let mut chunk = None;
    // Once the command has ended: what was in the pipe then. Children that hold it may go on writing without end.
    let mut left = None;
    while left != Some(0) {
        if left.is_none() {
            tokio::select! {
                biased;
                _ = end.wait_for(|ended| *ended) => {
                    left = Some(usize::try_from(ioctl_fionread(pipe).unwrap_or(0)).unwrap_or(usize::MAX));
                    continue;
                }
                ready = pipe.readable() => ready.map_err(|error| Abort::io("output", &error))?,
            }
        }
        let chunk = chunk.get_or_insert_with(Chunk::new);
        let wanted = left.unwrap_or(CHUNK).min(CHUNK);
        match pipe.try_read(&mut chunk.payload()[..wanted]) {
            Ok(0) => break,
            Ok(n) => {
                left = left.map(|left| left - n);
                output.lock().await.send_chunk(chunk, kind, n).await?;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if left.is_some() {
                    break;
                }
            }
            Err(error) => return Err(Abort::io("output", &error)),
        }
    }
    Ok(())
}

/// What a command reads from.
pub trait Input {
    /// Waits until it takes bytes, or is known to be broken.
    async fn writable(&self);
    fn try_write(&self, bytes: &[u8]) -> io::Result<usize>;
}

impl Input for pipe::Sender {
    async fn writable(&self) {
        // An error shows again when writing.
        let _ = Self::writable(self).await;
    }

    fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        Self::try_write(self, bytes)
    }
}

/// What frames besides input do to a command.
pub trait Steered {
    fn signal(&self, signal: i32);
    fn resize(&self, columns: u16, rows: u16) -> Result<(), Abort>;
}

impl Steered for Running {
    fn signal(&self, signal: i32) {
        self.process.signal(signal);
    }

    /// Without a terminal there is nothing to resize.
    fn resize(&self, _: u16, _: u16) -> Result<(), Abort> {
        Ok(())
    }
}

/// Does what the host's frames say until there are no more: passes input on, steers the command. Returns why it ended.
pub async fn obey<R: AsyncRead + Unpin>(
    input: &mut FrameReader<R>,
    mut stdin: Option<impl Input>,
    command: &impl Steered,
) -> Abort {
    let mut ahead: VecDeque<Bytes> = VecDeque::new();
    let mut finished = false;
    loop {
        if finished && ahead.is_empty() {
            stdin = None;
        }
        let may_read = ahead.iter().map(Bytes::len).sum::<usize>() < MAX_AHEAD;
        tokio::select! {
            () = writable(stdin.as_ref()), if !ahead.is_empty() => {
                if !feed(stdin.as_ref(), &mut ahead) {
                    // The command has closed its input: the rest is for nobody.
                    stdin = None;
                    ahead.clear();
                }
            }
            frame = input.next(), if may_read => match frame {
                Ok(Frame { kind: Kind::Data, payload }) => {
                    if stdin.is_some() && !finished && !payload.is_empty() {
                        ahead.push_back(payload);
                    }
                }
                Ok(Frame { kind: Kind::Eof, .. }) => finished = true,
                Ok(Frame { kind: Kind::Signal, payload }) => match payload.first() {
                    Some(&signal @ 1..=MAX_SIGNAL) => command.signal(signal.into()),
                    _ => return Abort::bad("no such signal"),
                },
                Ok(Frame { kind: Kind::Resize, payload }) => {
                    let &[c0, c1, r0, r1] = payload.as_ref() else { return Abort::bad("no such size") };
                    let (columns, rows) = (u16::from_be_bytes([c0, c1]), u16::from_be_bytes([r0, r1]));
                    if let Err(abort) = command.resize(columns, rows) {
                        return abort;
                    }
                }
                Ok(Frame { kind, .. }) => return Abort::bad(format!("unexpected {kind:?} frame")),
                Err(abort) => return abort,
            },
        }
    }
}

async fn writable(stdin: Option<&impl Input>) {
    if let Some(stdin) = stdin {
        stdin.writable().await;
    }
}

/// Writes what it takes. False: it will never take more.
fn feed(stdin: Option<&impl Input>, ahead: &mut VecDeque<Bytes>) -> bool {
    let Some(stdin) = stdin else { return false };
    while let Some(front) = ahead.front_mut() {
        match stdin.try_write(front) {
            Ok(n) => {
                front.advance(n);
                if front.is_empty() {
                    ahead.pop_front();
                }
            }
            Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
        }
    }
    true
}
