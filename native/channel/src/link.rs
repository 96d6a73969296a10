//! The byte stream of one session, as yamux wants it, over the chunks on the port.

use crate::chunk::{self, Chunk, Epoch, HEAD, HELLO_LEN, Search, Writer};
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Room for a whole chunk plus the next one's beginning, so that a sender of full chunks is read with few calls.
const IN_CAPACITY: usize = 2 * chunk::MAX_CHUNK;
/// Once so much is waiting it is offered to the port without waiting for yamux to run dry.
const OUT_EAGER: usize = 128 * 1024;
/// What an idle link may keep allocated for the next burst.
const OUT_KEEP: usize = 256 * 1024;

/// Why a session's byte stream ended.
#[derive(Debug)]
pub(crate) enum End {
    /// The peer (a host) started another session.
    Hello(Epoch),
    /// Bytes came that are no chunk.
    OutOfSync,
    /// The port is closed or broken: `None` is an orderly end of file.
    Port(Option<io::Error>),
}

/// The port with its buffers. Outlives sessions.
pub(crate) struct Link<T> {
    port: T,
    input: Vec<u8>,
    /// Unread part of `input`.
    start: usize,
    end: usize,
    /// Verified payload not yet read by yamux: it starts at `start`; the end byte follows it.
    payload: usize,
    output: Vec<u8>,
    sent: usize,
    writer: Writer,
    ended: Option<End>,
}

impl<T: AsyncRead + AsyncWrite + Unpin> Link<T> {
    pub(crate) fn new(port: T) -> Self {
        Link {
            port,
            input: vec![0; IN_CAPACITY],
            start: 0,
            end: 0,
            payload: 0,
            output: Vec::new(),
            sent: 0,
            writer: Writer::default(),
            ended: None,
        }
    }

    /// Forgets what the last session left to send and begins one with `hello` after so many `pads`.
    ///
    /// A chunk that was half sent stays half sent: the peer is looking for the hello, not for chunks.
    pub(crate) fn begin(&mut self, epoch: &Epoch, pads: usize) {
        self.ended = None;
        self.sent = 0;
        self.writer = Writer::default();
        self.output.clear();
        self.output.resize(pads, 0);
        chunk::put_hello(&mut self.output, epoch);
    }

    /// Tells the host, who cannot know otherwise, that this session is over: a byte that begins no chunk puts it out of sync.
    pub(crate) fn complain(&mut self) {
        self.writer.finish(&mut self.output);
        self.output.push(chunk::NO_CHUNK);
    }

    /// Reads up to and including a hello (`wanted`, or any), sending what is to be sent meanwhile. `None`: end of file.
    pub(crate) fn poll_hello(
        &mut self,
        cx: &mut Context<'_>,
        wanted: Option<&Epoch>,
    ) -> Poll<io::Result<Option<Epoch>>> {
        self.payload = 0;
        if let Poll::Ready(Err(error)) = self.poll_send(cx) {
            return Poll::Ready(Err(error));
        }
        loop {
            match chunk::find_hello(&self.input[self.start..self.end]) {
                Search::Found(at, epoch) if wanted.is_none_or(|wanted| *wanted == epoch) => {
                    self.start += at + HELLO_LEN;
                    return Poll::Ready(Ok(Some(epoch)));
                }
                Search::Found(at, _) => self.start += at + 1,
                Search::Skip(n) => {
                    self.start += n;
                    if ready!(self.poll_fill(cx))? == 0 {
                        return Poll::Ready(Ok(None));
                    }
                }
            }
        }
    }

    /// Why the session ended, if it was the link's doing.
    pub(crate) fn take_end(&mut self) -> Option<End> {
        self.ended.take()
    }

    /// Appends bytes to the session's stream.
    pub(crate) fn put(&mut self, bytes: &[u8]) {
        self.writer.put(&mut self.output, bytes);
    }

    /// Sends everything put so far.
    pub(crate) fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.writer.finish(&mut self.output);
        while self.sent < self.output.len() {
            match Pin::new(&mut self.port).poll_write(cx, &self.output[self.sent..]) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(n)) => self.sent += n,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => {
                    if self.sent >= OUT_EAGER {
                        self.output.drain(..self.sent);
                        self.sent = 0;
                    }
                    return Poll::Pending;
                }
            }
        }
        self.sent = 0;
        self.output.clear();
        if self.output.capacity() > OUT_KEEP {
            self.output.shrink_to(OUT_KEEP);
        }
        Pin::new(&mut self.port).poll_flush(cx)
    }

    /// Reads more from the port behind what is there. 0: end of file.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.input.len() - self.start < chunk::MAX_CHUNK {
            self.input.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let mut buf = ReadBuf::new(&mut self.input[self.end..]);
        ready!(Pin::new(&mut self.port).poll_read(cx, &mut buf))?;
        let n = buf.filled().len();
        self.end += n;
        Poll::Ready(Ok(n))
    }

    /// Makes sure that verified payload is there. Nothing of a chunk is handed out before its end byte was seen: a torn one
    /// is completed by the next host's pads, and those must not be taken for data.
    fn poll_payload(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        while self.payload == 0 {
            match chunk::decode(&self.input[self.start..self.end]) {
                Chunk::Pads(n) => self.start += n,
                Chunk::Data(len) => {
                    self.start += HEAD;
                    self.payload = len;
                }
                Chunk::Hello(epoch) => {
                    self.start += HELLO_LEN;
                    return Poll::Ready(Err(End::Hello(epoch)));
                }
                Chunk::Invalid => {
                    self.start += 1;
                    return Poll::Ready(Err(End::OutOfSync));
                }
                Chunk::Incomplete => match ready!(self.poll_fill(cx)) {
                    Ok(0) => return Poll::Ready(Err(End::Port(None))),
                    Ok(_) => {}
                    Err(error) => return Poll::Ready(Err(End::Port(Some(error)))),
                },
            }
        }
        Poll::Ready(Ok(()))
    }

    fn poll_take(&mut self, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        if let Err(end) = ready!(self.poll_payload(cx)) {
            self.ended = Some(end);
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        let n = buf.len().min(self.payload);
        buf[..n].copy_from_slice(&self.input[self.start..self.start + n]);
        self.start += n;
        self.payload -= n;
        if self.payload == 0 {
            // Its end byte.
            self.start += 1;
        }
        Poll::Ready(Ok(n))
    }
}

/// A link shared by yamux (which reads and writes it) and the session's driver (which sends and asks why it ended).
pub(crate) struct Shared<T>(Arc<Mutex<Link<T>>>);

impl<T> Shared<T> {
    pub(crate) fn new(link: Link<T>) -> Self {
        Shared(Arc::new(Mutex::new(link)))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Link<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        Shared(Arc::clone(&self.0))
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> futures_io::AsyncRead for Shared<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        self.lock().poll_take(cx, buf)
    }
}

/// Writes never wait. Yamux stops reading while it has a ping to answer and cannot write; were both ends full, neither would
/// ever go on. What accumulates is bounded by the streams' windows.
impl<T: AsyncRead + AsyncWrite + Unpin> futures_io::AsyncWrite for Shared<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let mut link = self.lock();
        link.put(buf);
        if link.output.len() - link.sent >= OUT_EAGER
            && let Poll::Ready(Err(error)) = link.poll_send(cx)
        {
            return Poll::Ready(Err(error));
        }
        Poll::Ready(Ok(buf.len()))
    }

    /// Does nothing: yamux flushes after every frame, the driver once yamux has no more to say.
    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.lock().poll_send(cx)
    }
}
