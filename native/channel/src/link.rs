//! The port with its buffers: finds hellos, and carries the frames of a session both ways.

use crate::frame::{self, Epoch, Found, HEAD, HELLO_LEN, Search};
use crate::mux::Mux;
use crate::stream::{Incoming, Session};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::mpsc;

/// Room for a whole frame plus the next one's beginning, so that a sender of full frames is read with few calls.
const INPUT: usize = 2 * frame::MAX_FRAME;
/// How many reads from the port are made before other tasks get their turn.
const TURN: usize = 16;

/// Why a session ended.
#[derive(Debug)]
pub(crate) enum End {
    /// The peer (a host) started another session.
    Hello(Epoch),
    /// Bytes came that are no frame, or a frame that breaks the rules.
    OutOfSync,
    /// The port is closed or broken: `None` is an orderly end of file.
    Port(Option<io::Error>),
}

/// The port and its buffers, which outlive sessions.
pub(crate) struct Link<T> {
    port: T,
    input: Box<[u8]>,
    /// Unread part of `input`.
    start: usize,
    end: usize,
    /// Bytes that are to be sent between sessions, and how many of them have been sent.
    output: Vec<u8>,
    sent: usize,
}

impl<T: AsyncRead + AsyncWrite + Unpin> Link<T> {
    pub(crate) fn new(port: T) -> Self {
        Link { port, input: vec![0; INPUT].into(), start: 0, end: 0, output: Vec::new(), sent: 0 }
    }

    /// Drops what the last session left unsent, and begins a session with `hello` after so many `pads`.
    ///
    /// A frame that was half sent stays half sent, because the peer looks for the hello, not for frames.
    pub(crate) fn begin(&mut self, epoch: &Epoch, pads: usize) {
        self.sent = 0;
        self.output.clear();
        self.output.resize(pads, 0);
        frame::put_hello(&mut self.output, epoch);
    }

    /// Tells the host, which cannot know otherwise, that the session which left `unsent` is over. A byte that begins no frame puts the host
    /// out of sync.
    pub(crate) fn announce_end(&mut self, unsent: Vec<u8>) {
        self.sent = 0;
        self.output = unsent;
        self.output.push(frame::NO_FRAME);
    }

    /// Takes what is still unsent, with which the session begins.
    pub(crate) fn take_output(&mut self) -> Vec<u8> {
        self.output.drain(..std::mem::take(&mut self.sent));
        std::mem::take(&mut self.output)
    }

    /// Reads up to and including a hello (`wanted`, or any), and sends pending output meanwhile. `None`: end of file.
    pub(crate) fn poll_hello(
        &mut self,
        cx: &mut Context<'_>,
        wanted: Option<&Epoch>,
    ) -> Poll<io::Result<Option<Epoch>>> {
        if let Poll::Ready(Err(error)) = self.poll_send(cx) {
            return Poll::Ready(Err(error));
        }
        loop {
            match frame::find_hello(&self.input[self.start..self.end]) {
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

    /// Sends the bytes that belong to no session.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.sent < self.output.len() {
            match ready!(Pin::new(&mut self.port).poll_write(cx, &self.output[self.sent..]))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                n => self.sent += n,
            }
        }
        Pin::new(&mut self.port).poll_flush(cx)
    }

    /// Reads more bytes from the port and appends them to the input. 0: end of file.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.input.len() - self.start < frame::MAX_FRAME {
            self.input.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let mut buf = ReadBuf::new(&mut self.input[self.end..]);
        ready!(Pin::new(&mut self.port).poll_read(cx, &mut buf))?;
        let n = buf.filled().len();
        self.end += n;
        Poll::Ready(Ok(n))
    }

    /// Carries frames until the session is over. New streams go to `incoming`.
    pub(crate) fn poll_session(
        &mut self,
        cx: &mut Context<'_>,
        session: &Arc<Session>,
        incoming: &mpsc::Sender<Incoming>,
    ) -> Poll<End> {
        session.lock().set_driver(cx);
        for _ in 0..TURN {
            if let Err(end) = self.take_frames(session, incoming) {
                return Poll::Ready(end);
            }
            if let Poll::Ready(Err(error)) = self.poll_send_frames(cx, &mut session.lock()) {
                return Poll::Ready(End::Port(Some(error)));
            }
            match ready!(self.poll_fill(cx)) {
                Ok(0) => return Poll::Ready(End::Port(None)),
                Ok(_) => {}
                Err(error) => return Poll::Ready(End::Port(Some(error))),
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Hands on every whole frame of the input. Nothing of a frame is handed on before its end byte was seen, because the next host's pads
    /// complete a torn frame and must not be taken for data.
    fn take_frames(&mut self, session: &Arc<Session>, incoming: &mpsc::Sender<Incoming>) -> Result<(), End> {
        let mut asked = Vec::new();
        let ended = {
            let mut mux = session.lock();
            loop {
                match frame::decode(&self.input[self.start..self.end]) {
                    Found::Pads(n) => self.start += n,
                    Found::Frame(frame, length) => {
                        // The payload of a data frame, which is behind the stream's id.
                        let data = self.input.get(self.start + HEAD + 4..self.start + length - 1).unwrap_or_default();
                        let taken = mux.take(frame, data);
                        self.start += length;
                        match taken {
                            Ok(stream) => asked.extend(stream),
                            Err(_) => break Err(End::OutOfSync),
                        }
                    }
                    Found::Hello(epoch) => {
                        self.start += HELLO_LEN;
                        break Err(End::Hello(epoch));
                    }
                    Found::Invalid => {
                        self.start += 1;
                        break Err(End::OutOfSync);
                    }
                    Found::Incomplete => break Ok(()),
                }
            }
        };
        for asked in asked {
            // The queue holds as many streams as a session may have. If its receiver is gone, dropping the stream refuses it.
            let _ = incoming.try_send(Incoming::new(session, &asked));
        }
        ended
    }

    /// Sends the session's output.
    fn poll_send_frames(&mut self, cx: &mut Context<'_>, mux: &mut Mux) -> Poll<io::Result<()>> {
        loop {
            mux.put_due();
            let bytes = mux.output.front();
            if bytes.is_empty() {
                return Pin::new(&mut self.port).poll_flush(cx);
            }
            match ready!(Pin::new(&mut self.port).poll_write(cx, bytes))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                n => mux.left(n),
            }
        }
    }
}
