//! Frames of one operation's stream: `u8 type, u32 length, payload`. There is no I/O here, so that every split and every hostile length can
//! be tested without a guest.

use bytes::{Buf, Bytes, BytesMut};

/// Bytes before the payload.
pub const HEADER: usize = 5;
/// Largest payload of every frame but a request.
pub const MAX_PAYLOAD: usize = 1 << 20;
/// How many bytes of data a host may send to a command before it is given credit for more.
pub const INPUT_WINDOW: usize = 1 << 20;
/// Largest payload of a request: `argv` and `env` may hold what `execve` accepts, JSON-escaped.
pub const MAX_REQUEST: usize = 4 << 20;

/// The kind of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    Request = 1,
    Data = 2,
    Eof = 3,
    Signal = 4,
    Resize = 5,
    Started = 16,
    Stdout = 17,
    Stderr = 18,
    End = 19,
    Error = 20,
    /// How many more bytes of data the host may send.
    Credit = 21,
}

impl Kind {
    /// The kind with this number on the wire.
    pub const fn from_wire(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Request,
            2 => Self::Data,
            3 => Self::Eof,
            4 => Self::Signal,
            5 => Self::Resize,
            16 => Self::Started,
            17 => Self::Stdout,
            18 => Self::Stderr,
            19 => Self::End,
            20 => Self::Error,
            21 => Self::Credit,
            _ => return None,
        })
    }

    /// Largest payload a frame of this kind may carry.
    pub const fn limit(self) -> usize {
        match self {
            Self::Request => MAX_REQUEST,
            _ => MAX_PAYLOAD,
        }
    }

    /// The one payload length kinds of fixed size accept.
    const fn fixed(self) -> Option<usize> {
        match self {
            Self::Eof => Some(0),
            Self::Signal => Some(1),
            Self::Resize | Self::Credit => Some(4),
            _ => None,
        }
    }
}

/// One frame as received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub kind: Kind,
    pub payload: Bytes,
}

/// Why received bytes are not a frame. The stream cannot be read any further after this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameError {
    UnknownKind { kind: u8 },
    TooLong { kind: Kind, length: usize },
    WrongLength { kind: Kind, length: usize },
}

impl std::fmt::Display for FrameError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::UnknownKind { kind } => write!(f, "unknown frame type {kind}"),
            Self::TooLong { kind, length } => {
                write!(f, "a {kind:?} frame of {length} bytes is longer than {}", kind.limit())
            }
            Self::WrongLength { kind, length } => write!(f, "a {kind:?} frame cannot have {length} bytes"),
        }
    }
}

impl std::error::Error for FrameError {}

/// Takes the first frame off `buffer`, or returns `None` if it needs more bytes. A wrong header is reported as soon as it is there, before
/// anything is buffered for it.
///
/// # Errors
/// What is wrong with the header. The stream cannot be read any further after this.
pub fn decode(buffer: &mut BytesMut) -> Result<Option<Frame>, FrameError> {
    let Some(header) = buffer.first_chunk::<HEADER>() else { return Ok(None) };
    let [kind, length @ ..] = *header;
    let kind = Kind::from_wire(kind).ok_or(FrameError::UnknownKind { kind })?;
    let length = u32::from_be_bytes(length) as usize;
    if length > kind.limit() {
        return Err(FrameError::TooLong { kind, length });
    }
    if kind.fixed().is_some_and(|fixed| fixed != length) {
        return Err(FrameError::WrongLength { kind, length });
    }
    if buffer.len() < HEADER + length {
        return Ok(None);
    }
    buffer.advance(HEADER);
    Ok(Some(Frame { kind, payload: buffer.split_to(length).freeze() }))
}

/// The five bytes before a payload of `length` bytes.
///
/// # Errors
/// `TooLong` beyond the limit of the kind.
pub fn header(kind: Kind, length: usize) -> Result<[u8; HEADER], FrameError> {
    let fits = u32::try_from(length).ok().filter(|_| length <= kind.limit());
    let [a, b, c, d] = fits.ok_or(FrameError::TooLong { kind, length })?.to_be_bytes();
    Ok([kind as u8, a, b, c, d])
}

/// A whole frame, ready for one write.
///
/// # Errors
/// Those of [`header`].
pub fn encode(kind: Kind, payload: &[u8]) -> Result<Vec<u8>, FrameError> {
    let mut bytes = Vec::with_capacity(HEADER + payload.len());
    bytes.extend_from_slice(&header(kind, payload.len())?);
    bytes.extend_from_slice(payload);
    Ok(bytes)
}
