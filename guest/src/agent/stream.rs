//! Frames over a stream of the channel.

use std::io;
use std::path::Path;

use bytes::{Bytes, BytesMut};
use machinen_protocol::frame::{self, Frame, FrameError, HEADER, INPUT_WINDOW, Kind};
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use zeroize::Zeroize;

use crate::reply::{Code, ErrorReply};

/// Free space made for each read from the stream.
const READ_SIZE: usize = 64 * 1024;
/// Bytes of payload in the frames that carry bulk data.
pub const CHUNK: usize = 64 * 1024;
/// How many bytes a host may send to an operation that waits. It is more than all the input it has credit for from the start.
const MAX_WAITING: usize = 2 * INPUT_WINDOW;

/// Why an operation ends without a result.
#[derive(Debug)]
pub enum Abort {
    /// The host is told this.
    Reply(ErrorReply),
    /// The host has gone and cannot be told.
    Gone,
}

impl Abort {
    /// The peer broke the protocol.
    pub fn bad(message: impl Into<String>) -> Self {
        Self::Reply(ErrorReply::new(Code::BadRequest, message))
    }

    /// The kernel refused something about `subject`.
    pub fn io(subject: impl AsRef<Path>, error: &io::Error) -> Self {
        Self::Reply(ErrorReply::io(subject, error))
    }
}

impl From<ErrorReply> for Abort {
    fn from(reply: ErrorReply) -> Self {
        Self::Reply(reply)
    }
}

impl From<FrameError> for Abort {
    fn from(error: FrameError) -> Self {
        Self::bad(error.to_string())
    }
}

/// Reading half.
pub struct FrameReader<R> {
    stream: R,
    buffer: BytesMut,
}

/// Writing half.
pub struct FrameWriter<W> {
    stream: W,
    /// A frame was begun and not finished, because its future was dropped: no other frame can follow.
    torn: bool,
}

/// Both halves of `stream`.
pub fn split<S: AsyncRead + AsyncWrite>(stream: S) -> (FrameReader<ReadHalf<S>>, FrameWriter<WriteHalf<S>>) {
    let (read, write) = tokio::io::split(stream);
    (FrameReader { stream: read, buffer: BytesMut::new() }, FrameWriter::new(write))
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    /// The next frame. A stream that ends, between frames or in one, has lost its host: `Gone`.
    pub async fn next(&mut self) -> Result<Frame, Abort> {
        loop {
            if let Some(frame) = frame::decode(&mut self.buffer)? {
                return Ok(frame);
            }
            self.buffer.reserve(READ_SIZE);
            if !matches!(self.stream.read_buf(&mut self.buffer).await, Ok(1..)) {
                return Err(Abort::Gone);
            }
        }
    }

    /// The next piece of a body that is data frames up to an eof frame (`None`).
    pub async fn body(&mut self) -> Result<Option<Bytes>, Abort> {
        match self.next().await? {
            Frame { kind: Kind::Data, payload } => Ok(Some(payload)),
            Frame { kind: Kind::Eof, .. } => Ok(None),
            Frame { kind, .. } => Err(Abort::bad(format!("unexpected {kind:?} frame"))),
        }
    }

    /// Overwrites what has been read and used up, the frames that `next` gave out and that are no longer held among it.
    pub fn wipe(&mut self) {
        let spare = self.buffer.capacity() - self.buffer.len();
        // Asking for more room than is left makes the buffer reclaim the part before the unread bytes, if no frame holds it any more.
        if self.buffer.try_reclaim(spare + 1) {
            self.buffer.spare_capacity_mut().zeroize();
        }
    }

    /// Waits until the stream ends, and keeps what the host sends meanwhile for `next`. After `MAX_WAITING` bytes it reads no further, so
    /// it does not notice the end.
    pub async fn lost(&mut self) {
        while self.buffer.len() < MAX_WAITING {
            self.buffer.reserve(READ_SIZE);
            if !matches!(self.stream.read_buf(&mut self.buffer).await, Ok(1..)) {
                return;
            }
        }
        std::future::pending().await
    }

    /// Waits until the host has closed the stream, whatever it still sends.
    pub async fn closed(&mut self) {
        loop {
            self.buffer.clear();
            if !matches!(self.stream.read_buf(&mut self.buffer).await, Ok(1..)) {
                return;
            }
        }
    }
}

impl<W: AsyncWrite + Unpin> FrameWriter<W> {
    pub fn new(stream: W) -> Self {
        Self { stream, torn: false }
    }

    pub fn into_inner(self) -> W {
        self.stream
    }

    async fn write(&mut self, frame: &[u8]) -> Result<(), Abort> {
        if self.torn {
            return Err(Abort::Gone);
        }
        self.torn = true;
        self.stream.write_all(frame).await.map_err(|_| Abort::Gone)?;
        self.torn = false;
        Ok(())
    }

    /// Sends one frame.
    pub async fn send(&mut self, kind: Kind, payload: &[u8]) -> Result<(), Abort> {
        let bytes = frame::encode(kind, payload)?;
        self.write(&bytes).await
    }

    /// Sends one frame with a JSON payload.
    pub async fn send_json(&mut self, kind: Kind, payload: &(impl Serialize + ?Sized)) -> Result<(), Abort> {
        let json = serde_json::to_vec(payload).map_err(|error| Abort::io("reply", &error.into()))?;
        self.send(kind, &json).await
    }

    /// Sends the frame in `chunk`.
    pub async fn send_chunk(&mut self, chunk: &mut Chunk, kind: Kind, length: usize) -> Result<(), Abort> {
        self.send_frame(kind, &mut chunk.0[..HEADER + length]).await
    }

    /// Sends a frame whose payload stands in `frame` behind room for the header.
    pub async fn send_frame(&mut self, kind: Kind, frame: &mut [u8]) -> Result<(), Abort> {
        let header = frame::header(kind, frame.len() - HEADER)?;
        frame[..HEADER].copy_from_slice(&header);
        self.write(frame).await
    }

    /// Closes this side of the stream: no more frames follow.
    pub async fn finish(&mut self) {
        // A failure means that the host has gone.
        let _ = self.stream.shutdown().await;
    }
}

/// A buffer for a payload with room for the header before it, so that both leave in one write.
pub struct Chunk(Vec<u8>);

impl Chunk {
    pub fn new() -> Self {
        Self(vec![0; HEADER + CHUNK])
    }

    /// The space for the payload.
    pub fn payload(&mut self) -> &mut [u8] {
        &mut self.0[HEADER..]
    }
}
