//! Encodes and decodes frames. These are pure functions; `link.rs` and `mux/` decide when they are called.

/// Identifies one session; random, chosen by the host.
pub(crate) type Epoch = [u8; 16];
/// Identifies a stream. The host opens odd ones, the guest even ones.
pub(crate) type Id = u32;

const PAD: u8 = 0;
const HELLO: u8 = 1;
const OPEN: u8 = 2;
const ACCEPT: u8 = 3;
const DATA: u8 = 4;
const CREDIT: u8 = 5;
const FINISH: u8 = 6;
const RESET: u8 = 7;
const VERSION: u8 = 3;
const END: u8 = 0x5a;
/// The byte that a guest sends when it has dropped a session. No frame begins with it.
pub(crate) const NO_FRAME: u8 = 0xff;
/// Bytes before the body: the kind and a u32 length.
pub(crate) const HEAD: usize = 5;
/// The body of a hello: version and epoch.
const HELLO_BODY: u8 = 17;
/// The length of a whole hello, with head and end byte.
pub(crate) const HELLO_LEN: usize = HEAD + HELLO_BODY as usize + 1;
/// Longest body.
const MAX_BODY: usize = 65_536;
/// The stream's id, which begins every body but a hello's.
const ID: usize = 4;
/// Longest payload of one data frame.
pub(crate) const MAX_DATA: usize = MAX_BODY - ID;
/// The bytes of a data frame besides its payload.
pub(crate) const DATA_OVERHEAD: usize = HEAD + ID + 1;
/// Longest frame: what a receiver must be able to hold, because nothing is delivered before the end byte was seen.
pub(crate) const MAX_FRAME: usize = HEAD + MAX_BODY + 1;
/// Pads a host sends before it takes over: enough to complete any torn frame with zeros, wherever it was torn.
pub(crate) const TAKEOVER_PADS: usize = 65_544;

/// Why a stream is reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    /// The stream's user has dropped it.
    Dropped = 0,
    /// There is no listener at the port.
    Refused = 1,
    /// There are too many streams.
    Busy = 2,
}

/// What a session consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Frame {
    /// A new stream to a port. `urgent`: it may be one of the reserve.
    Open { id: Id, port: u32, urgent: bool },
    /// The stream was accepted.
    Accept { id: Id },
    /// `length` bytes of the stream, from `HEAD + 4` on.
    Data { id: Id, length: usize },
    /// The receiver of this frame may send so many more bytes.
    Credit { id: Id, bytes: u32 },
    /// The sender of this sends no more data.
    Finish { id: Id },
    /// The sender of this has forgotten the stream.
    Reset { id: Id, reason: Reason },
}

/// What is found at the start of a buffer.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// So many pad bytes.
    Pads(usize),
    /// A hello, `HELLO_LEN` bytes.
    Hello(Epoch),
    /// A frame of so many bytes.
    Frame(Frame, usize),
    /// A beginning that may become valid with more bytes.
    Incomplete,
    /// Not a frame: the peer is out of sync.
    Invalid,
}

/// Reads the frame at the start of `buf`.
pub(crate) fn decode(buf: &[u8]) -> Found {
    match buf.first() {
        None => Found::Incomplete,
        Some(&PAD) => Found::Pads(buf.iter().position(|&b| b != PAD).unwrap_or(buf.len())),
        Some(&HELLO) => hello(buf),
        Some(&kind) => {
            let lengths = match kind {
                OPEN => ID + 5..=ID + 5,
                ACCEPT | FINISH => ID..=ID,
                DATA => ID + 1..=MAX_BODY,
                CREDIT => ID + 4..=ID + 4,
                RESET => ID + 1..=ID + 1,
                _ => return Found::Invalid,
            };
            let Some(length) = number(&buf[1..]) else { return Found::Incomplete };
            let length = length as usize;
            // The length is checked before anything is kept of the frame.
            if !lengths.contains(&length) {
                return Found::Invalid;
            }
            match buf.get(HEAD + length) {
                None => Found::Incomplete,
                Some(&END) => frame(kind, &buf[HEAD..HEAD + length])
                    .map_or(Found::Invalid, |frame| Found::Frame(frame, HEAD + length + 1)),
                Some(_) => Found::Invalid,
            }
        }
    }
}

fn number(buf: &[u8]) -> Option<u32> {
    buf.first_chunk().map(|bytes| u32::from_be_bytes(*bytes))
}

/// A frame whose body has a length that its kind allows.
fn frame(kind: u8, body: &[u8]) -> Option<Frame> {
    let (id, rest) = (number(body)?, &body[ID..]);
    Some(match kind {
        OPEN => Frame::Open { id, port: number(rest)?, urgent: flag(rest[4])? },
        ACCEPT => Frame::Accept { id },
        DATA => Frame::Data { id, length: rest.len() },
        CREDIT => Frame::Credit { id, bytes: number(rest)? },
        FINISH => Frame::Finish { id },
        RESET => Frame::Reset { id, reason: reason(rest[0])? },
        _ => return None,
    })
}

fn flag(byte: u8) -> Option<bool> {
    match byte {
        0 => Some(false),
        1 => Some(true),
        _ => None,
    }
}

fn reason(byte: u8) -> Option<Reason> {
    match byte {
        0 => Some(Reason::Dropped),
        1 => Some(Reason::Refused),
        2 => Some(Reason::Busy),
        _ => None,
    }
}

/// The first six bytes of every hello.
const fn hello_prefix() -> [u8; HEAD + 1] {
    [HELLO, 0, 0, 0, HELLO_BODY, VERSION]
}

fn hello(buf: &[u8]) -> Found {
    let prefix = hello_prefix();
    let known = buf.len().min(prefix.len());
    if buf[..known] != prefix[..known] {
        return Found::Invalid;
    }
    if buf.len() < HELLO_LEN {
        return Found::Incomplete;
    }
    let mut epoch = Epoch::default();
    epoch.copy_from_slice(&buf[prefix.len()..HELLO_LEN - 1]);
    if buf[HELLO_LEN - 1] == END { Found::Hello(epoch) } else { Found::Invalid }
}

/// What a search for a hello found.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Search {
    /// A hello that starts at this offset.
    Found(usize, Epoch),
    /// There is no hello; so many leading bytes cannot be part of one and may be dropped.
    Skip(usize),
}

/// Looks for a valid hello anywhere in `buf`. An end that has lost its place finds the next session that way.
pub(crate) fn find_hello(buf: &[u8]) -> Search {
    let mut at = 0;
    while let Some(next) = buf[at..].iter().position(|&b| b == HELLO) {
        at += next;
        match hello(&buf[at..]) {
            Found::Hello(epoch) => return Search::Found(at, epoch),
            Found::Incomplete => return Search::Skip(at),
            _ => at += 1,
        }
    }
    Search::Skip(buf.len())
}

/// Appends a hello.
pub(crate) fn put_hello(out: &mut impl Extend<u8>, epoch: &Epoch) {
    out.extend(hello_prefix());
    out.extend(*epoch);
    out.extend([END]);
}

/// Appends a frame that carries no data.
pub(crate) fn put(out: &mut impl Extend<u8>, frame: Frame) {
    match frame {
        Frame::Open { id, port, urgent } => {
            put_head(out, OPEN, ID + 5, id);
            out.extend(port.to_be_bytes());
            out.extend([u8::from(urgent)]);
        }
        Frame::Accept { id } => put_head(out, ACCEPT, ID, id),
        // A data frame without its payload would be torn; `output.rs` writes both.
        Frame::Data { .. } => return,
        Frame::Credit { id, bytes } => {
            put_head(out, CREDIT, ID + 4, id);
            out.extend(bytes.to_be_bytes());
        }
        Frame::Finish { id } => put_head(out, FINISH, ID, id),
        Frame::Reset { id, reason } => {
            put_head(out, RESET, ID + 1, id);
            out.extend([reason as u8]);
        }
    }
    put_end(out);
}

/// Begins a data frame; its payload and `put_end` are to follow.
pub(crate) fn put_data_head(out: &mut impl Extend<u8>, id: Id, length: usize) {
    put_head(out, DATA, ID + length, id);
}

/// Completes a frame.
pub(crate) fn put_end(out: &mut impl Extend<u8>) {
    out.extend([END]);
}

/// The four bytes at offset 1 of a data frame whose payload has this length.
pub(crate) fn data_length(length: usize) -> [u8; 4] {
    // The length is at most MAX_DATA, so it fits.
    u32::try_from(ID + length).unwrap_or(u32::MAX).to_be_bytes()
}

fn put_head(out: &mut impl Extend<u8>, kind: u8, length: usize, id: Id) {
    out.extend([kind]);
    out.extend(u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
    out.extend(id.to_be_bytes());
}

#[cfg(test)]
#[path = "frame_tests.rs"]
mod tests;
