//! A command's life on one stream: its output goes out, and the host's frames steer it.

use std::collections::VecDeque;
use std::io;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use bytes::{Buf, Bytes};
use machinen_channel::Opener;
use machinen_protocol::frame::{Frame, INPUT_WINDOW, Kind};
use rustix::io::ioctl_fionread;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::unix::pipe;
use tokio::sync::{Mutex, Notify, watch};

use super::exchange::Exchange;
use super::process::Running;
use super::stream::{Abort, CHUNK, Chunk, FrameReader, FrameWriter};
use crate::reply::{Exit, Started};

/// The highest signal number of Linux.
const MAX_SIGNAL: u8 = 64;

/// Tells the host that `running` has started and connects the command with the stream until it ends. In a copy, whose streams are lost, and
/// once `is_detached` says so, the command goes on without input and its output goes to `detached`.
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
    let attachment = Attachment { session, is_detached };
    let attended = async {
        match stream.send_json(Kind::Started, &started).await {
            Err(abort) if !attachment.is_outlived(&abort) => return Err(abort),
            _ => {}
        }
        let credit = Credit::default();
        let handled = async {
            let abort = handle_frames(input, stdin, &running, &credit).await;
            if attachment.is_outlived(&abort) {
                std::future::pending::<()>().await;
            }
            abort
        };
        let stream = Mutex::new(stream);
        // Runs beside the reading, so that a host that takes no output is heard all the same.
        let granted = async {
            // The reading side notices a lost stream.
            loop {
                let bytes = credit.due().await;
                if stream.lock().await.send(Kind::Credit, &bytes).await.is_err() {
                    break;
                }
            }
            std::future::pending().await
        };
        let mut granted = pin!(granted);
        let mut outlet = Outlet { stream: &stream, attachment, detached };
        let ended = tokio::select! {
            ended = pump_until_end(&running, &mut outlet) => ended,
            abort = handled => Err(abort),
            () = &mut granted => Err(Abort::Gone),
        };
        if ended.is_ok() {
            // A frame of credit that is half sent is completed first, because the command's end is sent behind it.
            tokio::select! {
                _ = stream.lock() => {}
                () = granted => {}
            }
        }
        ended
    }
    .await;
    if attended.is_err() {
        running.process.signal(libc::SIGKILL);
        // Reaps it. The exit of a killed command is not reported.
        let _ = running.process.wait().await;
    }
    attended
}

/// What ties a command to its stream.
#[derive(Clone, Copy)]
struct Attachment<'a> {
    session: &'a Opener,
    is_detached: &'a AtomicBool,
}

impl Attachment<'_> {
    fn is_detached(&self) -> bool {
        self.is_detached.load(Ordering::Relaxed)
    }

    /// Whether the command goes on although its stream is lost: because it was detached before, or because the whole session has ended, as
    /// in a copy.
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

/// Sends output to the stream until the stream is lost, and from then on to `detached`.
struct Outlet<'a, W, D> {
    stream: &'a Mutex<&'a mut FrameWriter<W>>,
    attachment: Attachment<'a>,
    /// Takes the output once the stream is lost.
    detached: &'a mut D,
}

impl<W: AsyncWrite + Unpin, D: Output> Output for Outlet<'_, W, D> {
    async fn send_chunk(&mut self, chunk: &mut Chunk, kind: Kind, length: usize) -> Result<(), Abort> {
        if self.attachment.is_detached() {
            return self.detached.send_chunk(chunk, kind, length).await;
        }
        match self.stream.lock().await.send_chunk(chunk, kind, length).await {
            Err(abort) if self.attachment.is_outlived(&abort) => self.detached.send_chunk(chunk, kind, length).await,
            sent => sent,
        }
    }
}

/// Sends stdout and stderr until the command ends, and then what it has left in its pipes.
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
    // Allocated when there is output, because most commands write nothing to one of the two.
    let mut chunk = None;
    // How much was in the pipe when the command ended. Only that is read afterwards, because children that hold the pipe may write without
    // end.
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
    /// Waits until the command takes bytes, or its input is known to be broken.
    async fn writable(&self);
    fn try_write(&self, bytes: &[u8]) -> io::Result<usize>;
}

impl Input for pipe::Sender {
    async fn writable(&self) {
        // An error is ignored here, because writing reports it again.
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

/// What a host may send before it gets more credit. So a signal, or the end of the stream, never waits behind input that the command does
/// not read.
#[derive(Default)]
pub struct Credit {
    used: AtomicUsize,
    changed: Notify,
}

impl Credit {
    /// Credit below this is not sent yet: it is not worth a frame.
    const LEAST: usize = INPUT_WINDOW / 4;

    /// Counts bytes that the command has taken or will never take.
    fn used(&self, bytes: usize) {
        if self.used.fetch_add(bytes, Ordering::Relaxed) + bytes >= Self::LEAST {
            self.changed.notify_one();
        }
    }

    /// Waits until there is credit to grant; returns the payload of a `credit` frame.
    pub async fn due(&self) -> [u8; 4] {
        while self.used.load(Ordering::Relaxed) < Self::LEAST {
            self.changed.notified().await;
        }
        u32::try_from(self.used.swap(0, Ordering::Relaxed)).unwrap_or(u32::MAX).to_be_bytes()
    }
}

/// Input on its way to a command.
struct PendingInput<I> {
    stdin: Option<I>,
    pieces: VecDeque<Bytes>,
    /// The total length of all pieces.
    bytes: usize,
    /// The host has ended the input.
    finished: bool,
}

impl<I: Input> PendingInput<I> {
    /// Takes what the host has sent. Input that no command will read counts as used at once.
    fn push(&mut self, piece: Bytes, credit: &Credit) -> Result<(), Abort> {
        if self.stdin.is_none() || self.finished {
            credit.used(piece.len());
            return Ok(());
        }
        self.bytes += piece.len();
        if self.bytes > INPUT_WINDOW {
            return Err(Abort::bad("more input than there is credit for"));
        }
        if !piece.is_empty() {
            self.pieces.push_back(piece);
        }
        Ok(())
    }

    /// Writes as much to the command as it takes, and closes its input after the last piece.
    fn feed(&mut self, credit: &Credit) {
        if let Some(stdin) = &self.stdin {
            while let Some(front) = self.pieces.front_mut() {
                match stdin.try_write(front) {
                    Ok(n) => {
                        credit.used(n);
                        self.bytes -= n;
                        front.advance(n);
                        if front.is_empty() {
                            self.pieces.pop_front();
                        }
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                    Err(_) => {
                        // The command has closed its input: nothing reads the rest.
                        credit.used(std::mem::take(&mut self.bytes));
                        self.pieces.clear();
                        self.finished = true;
                    }
                }
            }
        }
        if self.finished {
            self.stdin = None;
        }
    }

    /// Waits until the command takes bytes, or is known to take no more.
    async fn writable(&self) {
        if let Some(stdin) = &self.stdin {
            stdin.writable().await;
        }
    }
}

/// Handles the host's frames until there are no more: passes input on and steers the command. Returns why the frames ended.
pub async fn handle_frames<R: AsyncRead + Unpin>(
    input: &mut FrameReader<R>,
    stdin: Option<impl Input>,
    command: &impl Steered,
    credit: &Credit,
) -> Abort {
    let mut pending = PendingInput { stdin, pieces: VecDeque::new(), bytes: 0, finished: false };
    loop {
        let handled = tokio::select! {
            () = pending.writable(), if pending.bytes > 0 => {
                pending.feed(credit);
                Ok(())
            }
            frame = input.next() => match frame {
                Ok(Frame { kind: Kind::Data, payload }) => pending.push(payload, credit),
                Ok(Frame { kind: Kind::Eof, .. }) => {
                    pending.finished = true;
                    pending.feed(credit);
                    Ok(())
                }
                Ok(Frame { kind: Kind::Signal, payload }) => match payload.first() {
                    Some(&signal @ 1..=MAX_SIGNAL) => {
                        command.signal(signal.into());
                        Ok(())
                    }
                    _ => Err(Abort::bad("no such signal")),
                },
                Ok(Frame { kind: Kind::Resize, payload }) => match payload.as_ref() {
                    &[c0, c1, r0, r1] => command.resize(u16::from_be_bytes([c0, c1]), u16::from_be_bytes([r0, r1])),
                    _ => Err(Abort::bad("no such size")),
                },
                Ok(Frame { kind, .. }) => Err(Abort::bad(format!("unexpected {kind:?} frame"))),
                Err(abort) => Err(abort),
            },
        };
        if let Err(abort) = handled {
            return abort;
        }
    }
}
