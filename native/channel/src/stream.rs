//! What users of the channel read and write.

use crate::session::Raw;
use futures_io::{AsyncRead as _, AsyncWrite as _};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// One stream of the channel.
///
/// `shutdown` closes it for writing; the other end reads what was sent, then end of file. Dropping it before resets it: the other
/// end gets `ConnectionReset` once it has read what had arrived. Reads end with `ConnectionReset`, too, when the session is over.
#[derive(Debug)]
pub struct Stream {
    /// `None` only while dropping.
    raw: Option<Raw>,
    shut: bool,
    /// The peer will send no more.
    finished: bool,
}

impl Stream {
    pub(crate) fn new(raw: Raw) -> Self {
        Stream { raw: Some(raw), shut: false, finished: false }
    }

    fn raw(&mut self) -> io::Result<&mut Raw> {
        self.raw.as_mut().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

/// Yamux reports every stream that can no longer be written as `WriteZero`.
fn reset(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::WriteZero { io::ErrorKind::ConnectionReset.into() } else { error }
}

impl AsyncRead for Stream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.finished || buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        let shut = self.shut;
        let raw = self.raw()?;
        let n = ready!(Pin::new(&mut raw.stream).poll_read(cx, buf.initialize_unfilled())).map_err(reset)?;
        if n > 0 {
            buf.advance(n);
            return Poll::Ready(Ok(()));
        }
        // Yamux says end of file for everything. A stream we have not closed is closed only if it was reset; one that we did
        // close may have been finished or reset, which cannot be told apart.
        if raw.session.is_over() || (raw.stream.is_closed() && !shut) {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        self.finished = true;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if buf.is_empty() {
            return Poll::Ready(Ok(0));
        }
        Pin::new(&mut self.raw()?.stream).poll_write(cx, buf).map_err(reset)
    }

    /// Nothing to do: what was written is on its way.
    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.shut {
            ready!(Pin::new(&mut self.raw()?.stream).poll_close(cx)).map_err(reset)?;
            self.shut = true;
        }
        Poll::Ready(Ok(()))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Some(raw) = self.raw.take()
            && self.shut
            && !self.finished
            && !raw.stream.is_closed()
        {
            let session = std::sync::Arc::clone(&raw.session);
            session.linger(raw);
        }
    }
}
