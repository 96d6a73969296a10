//! One session: yamux, the task that drives it, and what opens and accepts streams.

use crate::MAX_STREAMS;
use crate::link::{End, Shared};
use crate::stream::Stream;
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use yamux::{Config, Connection, Mode, StreamId};

const ACCEPTED: u8 = 0;
const REFUSED: u8 = 1;

/// Yamux's own limit lies above ours: reaching it would end the whole session, reaching ours only refuses a stream.
const YAMUX_STREAMS: usize = 2 * MAX_STREAMS;
/// Head and payload of a full frame fill one chunk.
const SPLIT: usize = crate::chunk::MAX_PAYLOAD - 12;
/// What all streams' windows may grow by above their 256 KiB, together: enough for a few busy ones.
const WINDOW_GROWTH: usize = 8 * 1024 * 1024;
/// How long a stream that was closed on both counts here waits for the peer to finish.
const LINGER: Duration = Duration::from_secs(60);

fn config() -> Config {
    let mut config = Config::default();
    config
        .set_max_num_streams(YAMUX_STREAMS)
        .set_max_connection_receive_window(Some(YAMUX_STREAMS * yamux::DEFAULT_CREDIT as usize + WINDOW_GROWTH))
        .set_split_send_size(SPLIT);
    config
}

/// What streams and openers know of the session they belong to.
#[derive(Debug)]
pub(crate) struct Session {
    over: AtomicBool,
    /// Streams that exist, of either direction.
    streams: AtomicUsize,
    opens: mpsc::UnboundedSender<oneshot::Sender<io::Result<Raw>>>,
    lingering: mpsc::UnboundedSender<Raw>,
}

impl Session {
    /// Whether the session has ended, so that an end of file means nothing.
    pub(crate) fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    /// Takes over a stream whose user closed it for writing and is gone, but whose peer has not finished.
    pub(crate) fn linger(&self, stream: Raw) {
        // When the session is over there is nobody left to be polite to.
        let _ = self.lingering.send(stream);
    }
}

/// A yamux stream that counts.
#[derive(Debug)]
pub(crate) struct Raw {
    pub(crate) stream: yamux::Stream,
    pub(crate) session: Arc<Session>,
}

impl Raw {
    fn new(stream: yamux::Stream, session: &Arc<Session>) -> Self {
        session.streams.fetch_add(1, Ordering::Relaxed);
        Raw { stream, session: Arc::clone(session) }
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        self.session.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Opens streams to the other end.
///
/// The host's opener outlives sessions: between two it waits. The guest's belongs to one session and fails after it.
#[derive(Clone, Debug)]
pub struct Opener {
    session: watch::Receiver<Option<Arc<Session>>>,
}

impl Opener {
    pub(crate) fn new(session: watch::Receiver<Option<Arc<Session>>>) -> Self {
        Opener { session }
    }

    /// Whether a session is up, so that [`Opener::open`] would not wait for one.
    pub fn is_connected(&self) -> bool {
        self.session.borrow().as_ref().is_some_and(|session| !session.is_over())
    }

    /// Opens a stream to `port` of the other end and waits until it was accepted.
    ///
    /// # Errors
    /// Those of [`Opener::open_with`].
    pub async fn open(&self, port: u32) -> io::Result<Stream> {
        self.open_with(port, &[]).await
    }

    /// The same, with `first` on its way behind the request: nobody waits for a round trip. Who refuses the stream does not read it. It
    /// has to fit the window a stream begins with, 256 KiB: who answers it is not heard before all of it has left.
    ///
    /// # Errors
    /// `ConnectionRefused` when the other end does not want it, `ResourceBusy` at the limit of streams, `ConnectionReset` when
    /// the session ended meanwhile, `BrokenPipe` when there will not be another.
    pub async fn open_with(&self, port: u32, first: &[u8]) -> io::Result<Stream> {
        let session = self.session.clone().wait_for(Option::is_some).await.ok().and_then(|session| session.clone());
        let session = session.ok_or(io::ErrorKind::BrokenPipe)?;
        let (reply, opened) = oneshot::channel();
        let gone = |()| io::Error::from(io::ErrorKind::ConnectionReset);
        session.opens.send(reply).map_err(|_| gone(()))?;
        let mut stream = Stream::new(opened.await.map_err(|_| gone(()))??);
        stream.write_all(&[&port.to_be_bytes()[..], first].concat()).await?;
        match stream.read_u8().await {
            Ok(ACCEPTED) => Ok(stream),
            Ok(REFUSED) => Err(io::ErrorKind::ConnectionRefused.into()),
            Ok(_) => Err(io::Error::new(io::ErrorKind::InvalidData, "neither accepted nor refused")),
            // The peer dropped it unanswered.
            Err(_) if !session.is_over() => Err(io::ErrorKind::ConnectionRefused.into()),
            Err(_) => Err(gone(())),
        }
    }
}

/// A stream the other end wants to open. Dropped undecided it is refused too, less politely.
#[derive(Debug)]
pub struct Incoming {
    /// The port it is for.
    pub port: u32,
    stream: Stream,
}

impl Incoming {
    /// Accepts it.
    ///
    /// # Errors
    /// When the opener or the session is gone.
    pub async fn accept(mut self) -> io::Result<Stream> {
        self.stream.write_all(&[ACCEPTED]).await?;
        Ok(self.stream)
    }

    /// Tells the opener that nobody listens there.
    pub async fn refuse(mut self) {
        // An opener that is gone does not mind.
        let _ = self.stream.write_all(&[REFUSED]).await;
        let _ = self.stream.shutdown().await;
    }
}

/// Reads the port an inbound stream is for and passes it on.
async fn announce(mut stream: Stream, incoming: mpsc::Sender<Incoming>) -> Option<StreamId> {
    if let Ok(port) = stream.read_u32().await {
        // Nobody accepts any more: dropping it resets it.
        let _ = incoming.send(Incoming { port, stream }).await;
    }
    None
}

/// Waits for the peer to finish a stream that nobody reads any more. A peer that sends instead, or never ends, is to be reset:
/// yamux says nothing when a stream closed for writing is dropped, and the peer would wait for window forever.
async fn linger(mut stream: Raw) -> Option<StreamId> {
    let mut byte = [0];
    let ended = std::future::poll_fn(|cx| {
        futures_io::AsyncRead::poll_read(std::pin::Pin::new(&mut stream.stream), cx, &mut byte)
    });
    match tokio::time::timeout(LINGER, ended).await {
        Ok(Ok(0)) => None,
        _ => Some(stream.stream.id()),
    }
}

/// A data frame of yamux that resets a stream.
fn reset_frame(id: StreamId) -> [u8; 12] {
    let [a, b, c, d] = id.val().to_be_bytes();
    [0, 0, 0, 8, a, b, c, d, 0, 0, 0, 0]
}

/// Drives one session. Dropping it ends the session: all its streams end with an error.
pub(crate) struct Driver<T> {
    connection: Connection<Shared<T>>,
    link: Shared<T>,
    session: Arc<Session>,
    opens: mpsc::UnboundedReceiver<oneshot::Sender<io::Result<Raw>>>,
    /// Asked for, but yamux wants the peer to acknowledge others first.
    waiting: VecDeque<oneshot::Sender<io::Result<Raw>>>,
    lingering: mpsc::UnboundedReceiver<Raw>,
    incoming: mpsc::Sender<Incoming>,
    tasks: JoinSet<Option<StreamId>>,
}

impl<T: AsyncRead + AsyncWrite + Unpin> Driver<T> {
    pub(crate) fn new(link: Shared<T>, mode: Mode, incoming: mpsc::Sender<Incoming>) -> (Self, Arc<Session>) {
        let (opens, open_requests) = mpsc::unbounded_channel();
        let (lingering, linger_requests) = mpsc::unbounded_channel();
        let session =
            Arc::new(Session { over: AtomicBool::new(false), streams: AtomicUsize::new(0), opens, lingering });
        let driver = Driver {
            connection: Connection::new(link.clone(), config(), mode),
            link,
            session: Arc::clone(&session),
            opens: open_requests,
            waiting: VecDeque::new(),
            lingering: linger_requests,
            incoming,
            tasks: JoinSet::new(),
        };
        (driver, session)
    }

    /// Runs until the session is over. Violations of yamux's rules count as being out of sync.
    pub(crate) async fn run(mut self) -> End {
        std::future::poll_fn(|cx| self.poll(cx)).await
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        while let Poll::Ready(Some(request)) = self.opens.poll_recv(cx) {
            self.waiting.push_back(request);
        }
        while let Poll::Ready(Some(stream)) = self.lingering.poll_recv(cx) {
            self.tasks.spawn(linger(stream));
        }
        // Known before yamux is polled, so that what these streams had sent goes out first.
        let mut resets = Vec::new();
        while let Poll::Ready(Some(done)) = self.tasks.poll_join_next(cx) {
            resets.extend(done.ok().flatten());
        }
        if self.poll_yamux(cx).is_err() {
            return Poll::Ready(self.link.lock().take_end().unwrap_or(End::OutOfSync));
        }
        let mut link = self.link.lock();
        for id in resets {
            link.put(&reset_frame(id));
        }
        match link.poll_send(cx) {
            Poll::Ready(Err(error)) => Poll::Ready(End::Port(Some(error))),
            _ => Poll::Pending,
        }
    }

    /// Opens, accepts and moves data until yamux has nothing left to do.
    fn poll_yamux(&mut self, cx: &mut Context<'_>) -> Result<(), ()> {
        loop {
            while let Some(reply) = self.waiting.pop_front() {
                if reply.is_closed() {
                    continue;
                }
                if self.session.streams.load(Ordering::Relaxed) >= MAX_STREAMS {
                    let _ = reply.send(Err(io::ErrorKind::ResourceBusy.into()));
                    continue;
                }
                match self.connection.poll_new_outbound(cx) {
                    Poll::Ready(Ok(stream)) => drop(reply.send(Ok(Raw::new(stream, &self.session)))),
                    Poll::Ready(Err(_)) => return Err(()),
                    Poll::Pending => {
                        self.waiting.push_front(reply);
                        break;
                    }
                }
            }
            match self.connection.poll_next_inbound(cx) {
                // Over the limit it is dropped, which resets it.
                Poll::Ready(Some(Ok(stream))) => {
                    if self.session.streams.load(Ordering::Relaxed) < MAX_STREAMS {
                        let stream = Stream::new(Raw::new(stream, &self.session));
                        self.tasks.spawn(announce(stream, self.incoming.clone()));
                    }
                }
                Poll::Ready(_) => return Err(()),
                Poll::Pending => return Ok(()),
            }
        }
    }
}

impl<T> Drop for Driver<T> {
    fn drop(&mut self) {
        // Before yamux wakes the streams, which will ask.
        self.session.over.store(true, Ordering::Relaxed);
    }
}
