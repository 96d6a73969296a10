//! Threads for work that may wait for a file system whose server does not answer (FUSE), so that the agent itself goes on. A thread
//! that waits in the kernel cannot be ended. So each kind of work has its own number of threads. An operation whose stream ends leaves its
//! thread behind, and the thread counts until the kernel lets it go.

use std::io::{self, Read};
use std::time::Duration;

use bytes::{Buf, Bytes};
use machinen_protocol::frame::Kind;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Semaphore, SemaphorePermit, mpsc, oneshot};
use tokio::task::{JoinHandle, spawn_blocking};

use super::exchange::Exchange;
use super::stream::{Abort, FrameReader};
use crate::reply::{Code, Done, ErrorReply};

/// The number of threads of a kind that an operation needs only for a moment.
const EACH: usize = 64;
/// The number of threads for work that must not wait for any of these kinds: freezing, syncing, and the end of the machine.
const RESERVE: usize = 64;
/// The highest number of threads in all.
pub const MOST: usize = 3 * EACH + machinen_channel::MAX_STREAMS + RESERVE;
/// How long an operation waits for a thread. If no thread is free by then, all may be stuck for ever.
const PATIENCE: Duration = Duration::from_secs(5);
/// How many pieces may be under way between stream and thread.
const PIECES: usize = 4;

/// One kind of work, and its threads that are free.
pub struct Threads {
    work: &'static str,
    number: usize,
    free: Semaphore,
}

/// For looking up and starting commands.
pub static COMMANDS: Threads = Threads::new("commands that are being started", EACH);
/// For single files and names.
pub static FILES: Threads = Threads::new("operations on files", EACH);
/// For packing and unpacking trees.
pub static ARCHIVES: Threads = Threads::new("copies of trees", EACH);
/// For watches, each of which keeps its thread as long as its stream lasts.
pub static WATCHES: Threads = Threads::new("watches", machinen_channel::MAX_STREAMS);

impl Threads {
    const fn new(work: &'static str, number: usize) -> Self {
        Self { work, number, free: Semaphore::const_new(number) }
    }

    /// Begins `work` as soon as a thread is free. Dropping the handle does not stop the work, but drops its result.
    pub async fn start<T: Send + 'static>(
        &'static self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<JoinHandle<T>, ErrorReply> {
        let Ok(Ok(free)) = tokio::time::timeout(PATIENCE, self.free.acquire()).await else {
            let message = format!(
                "no thread is free for {}: a file system does not answer, or the guest is being saved",
                self.work
            );
            return Err(ErrorReply::new(Code::Busy, message));
        };
        Ok(spawn_blocking(move || {
            let _free = free;
            work()
        }))
    }

    /// Does `work`. Gives up waiting for it when the stream that `input` comes from ends.
    pub async fn run<R, T>(
        &'static self,
        input: &mut FrameReader<R>,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Abort>
    where
        R: AsyncRead + Unpin,
        T: Send + 'static,
    {
        let done = async { finished(self.start(work).await?).await };
        tokio::select! {
            biased;
            done = done => done,
            () = input.lost() => Err(Abort::Gone),
        }
    }

    /// Takes all threads of this kind: waits until none is at work, at most for `limit` and as long as `input`'s stream lasts.
    pub async fn acquire_all<R: AsyncRead + Unpin>(
        &'static self,
        limit: Duration,
        input: &mut FrameReader<R>,
    ) -> Result<SemaphorePermit<'static>, Abort> {
        let all = u32::try_from(self.number).unwrap_or(u32::MAX);
        tokio::select! {
            biased;
            acquired = tokio::time::timeout(limit, self.free.acquire_many(all)) => match acquired {
                Ok(Ok(all)) => Ok(all),
                _ => {
                    let message = format!("{} wait for a file system that does not answer", self.work);
                    Err(ErrorReply::new(Code::Timeout, message).into())
                }
            },
            () = input.lost() => Err(Abort::Gone),
        }
    }

    /// Sends the pieces that `work` makes to the host.
    pub async fn send<R, W, T>(
        &'static self,
        exchange: &mut Exchange<R, W>,
        work: impl FnOnce(&mut Outgoing) -> Result<T, ErrorReply> + Send + 'static,
    ) -> Result<T, Abort>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
        T: Send + 'static,
    {
        let Exchange { input, output, .. } = exchange;
        let (pieces, mut leaving) = mpsc::channel(PIECES);
        let (used, spare) = mpsc::channel(PIECES);
        let made = self.run(input, move || work(&mut Outgoing { pieces, spare }));
        let carried = async {
            while let Some(piece) = leaving.recv().await {
                match piece {
                    None => output.send_json(Kind::Started, &Done {}).await?,
                    Some(mut piece) => {
                        output.send_frame(Kind::Data, &mut piece).await?;
                        // A buffer that is not given back is no loss, because the thread makes another.
                        let _ = used.try_send(piece);
                    }
                }
            }
            Ok(())
        };
        let (made, ()) = tokio::try_join!(made, carried)?;
        let made = made?;
        output.send(Kind::Eof, &[]).await?;
        Ok(made)
    }

    /// Gives the data that the host sends to `work`.
    pub async fn receive<R, W, T>(
        &'static self,
        exchange: &mut Exchange<R, W>,
        work: impl FnOnce(Incoming) -> Result<T, ErrorReply> + Send + 'static,
    ) -> Result<T, Abort>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
        T: Send + 'static,
    {
        let Exchange { input, output, .. } = exchange;
        let (pieces, arriving) = mpsc::channel(PIECES);
        let (opened, is_open) = oneshot::channel();
        let incoming = Incoming { opened: Some(opened), pieces: arriving, is_over: false, rest: Bytes::new() };
        let working = tokio::select! {
            biased;
            working = self.start(move || work(incoming)) => working?,
            () = input.lost() => return Err(Abort::Gone),
        };
        let is_open = tokio::select! {
            biased;
            opened = is_open => opened.is_ok(),
            () = input.lost() => return Err(Abort::Gone),
        };
        let fed = if is_open {
            output.send_json(Kind::Started, &Done {}).await?;
            tokio::select! {
                biased;
                // The work has failed. Ends at once instead of when the host has sent everything; the error follows below.
                () = pieces.closed() => Ok(()),
                fed = feed(input, &pieces) => fed,
            }
        } else {
            Ok(())
        };
        drop(pieces);
        let done = tokio::select! {
            biased;
            done = finished(working) => done?,
            () = input.lost() => return Err(Abort::Gone),
        };
        fed?;
        Ok(done?)
    }
}

async fn feed<R: AsyncRead + Unpin>(
    input: &mut FrameReader<R>,
    pieces: &mpsc::Sender<Option<Bytes>>,
) -> Result<(), Abort> {
    loop {
        let piece = input.body().await?;
        let is_last = piece.is_none();
        tokio::select! {
            sent = pieces.send(piece) => if sent.is_err() || is_last {
                return Ok(());
            },
            () = input.lost() => return Err(Abort::Gone),
        }
    }
}

/// Waits for a thread's work to be done.
pub async fn finished<T>(thread: JoinHandle<T>) -> Result<T, Abort> {
    // Only a panic could lose the result, and that ends the whole agent.
    thread.await.map_err(|error| Abort::io("thread", &error.into()))
}

/// A thread's way to the stream.
pub struct Outgoing {
    /// `None` says that opening has succeeded and data will follow.
    pieces: mpsc::Sender<Option<Vec<u8>>>,
    spare: mpsc::Receiver<Vec<u8>>,
}

impl Outgoing {
    /// Must be called before anything is sent.
    pub fn opened(&self) -> io::Result<()> {
        self.pieces.blocking_send(None).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    /// Sends a payload that stands behind room for its header. Returns a buffer to fill next, whose content is arbitrary.
    pub fn hand_on(&mut self, piece: Vec<u8>) -> io::Result<Vec<u8>> {
        self.pieces.blocking_send(Some(piece)).map_err(|_| io::ErrorKind::BrokenPipe)?;
        Ok(self.spare.try_recv().unwrap_or_default())
    }
}

/// A thread's way to read the stream's data.
pub struct Incoming {
    opened: Option<oneshot::Sender<()>>,
    /// `None` says that all data have come.
    pieces: mpsc::Receiver<Option<Bytes>>,
    is_over: bool,
    /// The part of a piece that `read` has not returned yet.
    rest: Bytes,
}

impl Incoming {
    /// Says that opening has succeeded, so that the host sends its data.
    pub fn opened(&mut self) {
        if let Some(opened) = self.opened.take() {
            // If the host has gone, the next read fails.
            let _ = opened.send(());
        }
    }

    /// Waits for the next piece; `None` after the last. Fails if the stream ends before the data do.
    pub fn piece(&mut self) -> io::Result<Option<Bytes>> {
        if self.is_over {
            return Ok(None);
        }
        let piece = self.pieces.blocking_recv().ok_or(io::ErrorKind::UnexpectedEof)?;
        self.is_over = piece.is_none();
        Ok(piece)
    }
}

impl Read for Incoming {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.rest.is_empty() {
            let Some(piece) = self.piece()? else { return Ok(0) };
            self.rest = piece;
        }
        let length = buffer.len().min(self.rest.len());
        self.rest.copy_to_slice(&mut buffer[..length]);
        Ok(length)
    }
}
