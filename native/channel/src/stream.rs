//! The types that users of the channel hold: to open and accept streams, and to read and write them.

use crate::frame::{Id, Reason};
use crate::mux::{Asked, Mux, Side};
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::sync::watch;

/// One session, shared by its streams, its openers and the link.
#[derive(Debug)]
pub(crate) struct Session(Mutex<Mux>);

impl Session {
    pub(crate) fn new(side: Side, first: Vec<u8>) -> Arc<Self> {
        Arc::new(Session(Mutex::new(Mux::new(side, first))))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Mux> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ends a session when dropped.
pub(crate) struct Running(pub(crate) Arc<Session>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.lock().end();
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
        self.session.borrow().as_ref().is_some_and(|session| !session.lock().is_over())
    }

    /// Bytes of memory the session holds for its peer: what was received and is unread, and what is unsent.
    pub fn held(&self) -> usize {
        self.session.borrow().as_ref().map_or(0, |session| session.lock().held())
    }

    /// Opens a stream to `port` of the other end and waits until it was accepted.
    ///
    /// # Errors
    /// Those of [`Opener::open_with`].
    pub async fn open(&self, port: u32) -> io::Result<Stream> {
        self.start(port, &[], false).await
    }

    /// Opens a stream as [`Opener::open`] does, and sends `first` right behind the request, which saves a round trip. If the stream is
    /// refused, `first` is not read. It must fit into [`crate::WINDOW`], because the answer is awaited only after all of it has been sent.
    ///
    /// # Errors
    /// `ConnectionRefused` when the other end does not want the stream, `ResourceBusy` at the limit of streams, `ConnectionReset` when the
    /// session ended meanwhile, `BrokenPipe` when there will not be another session.
    pub async fn open_with(&self, port: u32, first: &[u8]) -> io::Result<Stream> {
        self.start(port, first, false).await
    }

    /// Opens a stream as [`Opener::open`] does, also when all other streams are taken. It is meant for the end of the machine.
    ///
    /// # Errors
    /// Those of [`Opener::open_with`].
    pub async fn open_urgent(&self, port: u32) -> io::Result<Stream> {
        self.start(port, &[], true).await
    }

    async fn start(&self, port: u32, first: &[u8], urgent: bool) -> io::Result<Stream> {
        let session = self.session.clone().wait_for(Option::is_some).await.ok().and_then(|session| session.clone());
        let session = session.ok_or(io::ErrorKind::BrokenPipe)?;
        let id = session.lock().place(urgent)?;
        let mut stream = Stream { session, id };
        poll_fn(|cx| stream.session.lock().poll_ask(id, port, urgent, cx)).await?;
        let written = stream.write_all(first).await;
        // Writing to a stream that was refused meanwhile fails; the answer tells the caller why.
        poll_fn(|cx| stream.session.lock().poll_answer(id, cx)).await?;
        written.map(|()| stream)
    }
}

/// A stream that the other end wants to open. If it is dropped before it was accepted, the stream is refused.
#[derive(Debug)]
pub struct Incoming {
    /// The port that the other end asked for.
    pub port: u32,
    /// `None` once the stream has been accepted or refused.
    stream: Option<Stream>,
}

impl Incoming {
    pub(crate) fn new(session: &Arc<Session>, asked: &Asked) -> Self {
        Incoming { port: asked.port, stream: Some(Stream { session: Arc::clone(session), id: asked.id }) }
    }

    /// Accepts the stream.
    ///
    /// # Errors
    /// When the opener or the session is gone.
    pub async fn accept(mut self) -> io::Result<Stream> {
        if let Some(stream) = &self.stream {
            poll_fn(|cx| stream.session.lock().poll_accept(stream.id, cx)).await?;
        }
        self.stream.take().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    /// Tells the opener that there is no listener at this port.
    pub fn refuse(self) {
        drop(self);
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if let Some(stream) = &self.stream {
            stream.session.lock().leave(stream.id, Reason::Refused);
        }
    }
}

/// One stream of the channel.
///
/// `shutdown` closes it for writing; the other end reads what was sent, then end of file. Dropping it before resets it: the other
/// end gets `ConnectionReset` once it has read what had arrived, and at once when it writes. Reads end with `ConnectionReset`, too, when
/// the session is over.
#[derive(Debug)]
pub struct Stream {
    session: Arc<Session>,
    id: Id,
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.session.lock().poll_read(self.id, buf, cx)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.session.lock().poll_write(self.id, buf, cx)
    }

    /// Nothing to do, because the link sends what was written.
    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.session.lock().poll_shut(self.id, cx)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.session.lock().leave(self.id, Reason::Dropped);
    }
}
