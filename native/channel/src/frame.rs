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
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What a receiver in sync gets from `bytes` that arrive in the given pieces: frames with their data, and hellos in between.
    fn receive<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> (Vec<(Frame, Vec<u8>)>, Vec<Epoch>) {
        let (mut buf, mut frames, mut epochs, mut synced) = (Vec::new(), Vec::new(), Vec::new(), true);
        for piece in pieces {
            buf.extend_from_slice(piece);
            loop {
                if !synced {
                    match find_hello(&buf) {
                        Search::Skip(n) => {
                            buf.drain(..n);
                            break;
                        }
                        Search::Found(at, _) => {
                            buf.drain(..at);
                            synced = true;
                        }
                    }
                }
                match decode(&buf) {
                    Found::Pads(n) => drop(buf.drain(..n)),
                    Found::Hello(epoch) => {
                        epochs.push(epoch);
                        buf.drain(..HELLO_LEN);
                    }
                    Found::Frame(frame, length) => {
                        frames.push((frame, buf[HEAD + ID..length - 1].to_vec()));
                        buf.drain(..length);
                    }
                    Found::Incomplete => break,
                    Found::Invalid => {
                        synced = false;
                        buf.drain(..1);
                    }
                }
            }
        }
        (frames, epochs)
    }

    fn data(id: Id, payload: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        put_data_head(&mut out, id, payload.len());
        out.extend(payload);
        put_end(&mut out);
        out
    }

    fn bytes(frame: Frame) -> Vec<u8> {
        let mut out = Vec::new();
        put(&mut out, frame);
        out
    }

    fn hello_bytes(epoch: &Epoch) -> Vec<u8> {
        let mut out = Vec::new();
        put_hello(&mut out, epoch);
        out
    }

    /// One of each kind that carries no data.
    fn controls() -> [Frame; 7] {
        [
            Frame::Open { id: 7, port: 1978, urgent: false },
            Frame::Open { id: u32::MAX, port: u32::MAX, urgent: true },
            Frame::Accept { id: 8 },
            Frame::Credit { id: 9, bytes: 65_536 },
            Frame::Finish { id: 10 },
            Frame::Reset { id: 11, reason: Reason::Refused },
            Frame::Reset { id: 11, reason: Reason::Busy },
        ]
    }

    #[test]
    fn bytes_are_those_of_the_protocol() {
        assert_eq!(data(3, b"ab"), [4, 0, 0, 0, 6, 0, 0, 0, 3, b'a', b'b', 0x5a]);
        let open = Frame::Open { id: 3, port: 1978, urgent: true };
        assert_eq!(bytes(open), [2, 0, 0, 0, 9, 0, 0, 0, 3, 0, 0, 7, 0xba, 1, 0x5a]);
        assert_eq!(bytes(Frame::Accept { id: 3 }), [3, 0, 0, 0, 4, 0, 0, 0, 3, 0x5a]);
        assert_eq!(bytes(Frame::Credit { id: 3, bytes: 256 }), [5, 0, 0, 0, 8, 0, 0, 0, 3, 0, 0, 1, 0, 0x5a]);
        assert_eq!(bytes(Frame::Finish { id: 3 }), [6, 0, 0, 0, 4, 0, 0, 0, 3, 0x5a]);
        assert_eq!(bytes(Frame::Reset { id: 3, reason: Reason::Busy }), [7, 0, 0, 0, 5, 0, 0, 0, 3, 2, 0x5a]);
        let hello = hello_bytes(&[7; 16]);
        assert_eq!(hello[..6], [1, 0, 0, 0, 17, 3]);
        assert_eq!((hello.len(), hello[22]), (HELLO_LEN, 0x5a));
    }

    #[test]
    fn every_split_gives_the_same() {
        let mut all = hello_bytes(&[9; 16]);
        for frame in controls() {
            all.extend(bytes(frame));
            all.extend([0, 0, 0]);
        }
        all.extend(data(1, b"hello"));
        all.extend(data(1, &[2; 300]));
        let expected = receive([&all[..]].into_iter());
        let frames: Vec<Frame> = expected.0.iter().map(|(frame, _)| *frame).collect();
        assert_eq!(frames[..7], controls());
        assert_eq!(frames[7..], [Frame::Data { id: 1, length: 5 }, Frame::Data { id: 1, length: 300 }]);
        assert_eq!((&expected.0[7].1[..], expected.0[8].1.len()), (&b"hello"[..], 300));
        for at in 0..=all.len() {
            let (left, right) = all.split_at(at);
            assert_eq!(receive([left, right].into_iter()), expected, "split at {at}");
        }
        assert_eq!(receive(all.chunks(1)), expected);
    }

    #[test]
    fn the_longest_frame_is_as_long_as_a_receiver_keeps_room_for() {
        let longest = data(1, &vec![3; MAX_DATA]);
        assert_eq!(longest.len(), MAX_FRAME);
        assert_eq!(decode(&longest), Found::Frame(Frame::Data { id: 1, length: MAX_DATA }, MAX_FRAME));
        assert_eq!(decode(&data(1, &vec![3; MAX_DATA + 1])), Found::Invalid);
    }

    #[test]
    fn lengths_that_a_kind_does_not_have_are_refused_before_their_body() {
        assert_eq!(decode(&[4, 0, 0, 0, 4]), Found::Invalid);
        assert_eq!(decode(&[4, 0, 1, 0, 1]), Found::Invalid);
        assert_eq!(decode(&[4, 0, 1, 0, 0]), Found::Incomplete);
        assert_eq!(decode(&[1, 0, 0, 0, 18]), Found::Invalid);
        for frame in controls() {
            let mut longer = bytes(frame)[..HEAD].to_vec();
            assert_eq!(decode(&longer), Found::Incomplete);
            longer[4] += 1;
            assert_eq!(decode(&longer), Found::Invalid);
            longer[4] -= 2;
            assert_eq!(decode(&longer), Found::Invalid);
        }
    }

    #[test]
    fn what_no_peer_of_ours_says_is_no_frame() {
        // The hello of the version before this one.
        assert_eq!(decode(&[1, 0, 0, 0, 17, VERSION - 1]), Found::Invalid);
        assert_eq!(decode(&[8]), Found::Invalid);
        assert_eq!(decode(&[NO_FRAME]), Found::Invalid);
        let mut urgent = bytes(Frame::Open { id: 1, port: 1, urgent: true });
        urgent[13] = 2;
        assert_eq!(decode(&urgent), Found::Invalid);
        let mut reset = bytes(Frame::Reset { id: 1, reason: Reason::Busy });
        reset[9] = 3;
        assert_eq!(decode(&reset), Found::Invalid);
        for frame in controls() {
            let mut end = bytes(frame);
            *end.last_mut().unwrap() = 0;
            assert_eq!(decode(&end), Found::Invalid);
        }
    }

    #[test]
    fn pads_complete_a_frame_torn_anywhere_and_nothing_of_it_is_delivered() {
        let torn = |whole: &[u8], at: usize| {
            let mut all = data(1, b"before");
            all.extend_from_slice(&whole[..at]);
            all.resize(all.len() + TAKEOVER_PADS, 0);
            all.extend(hello_bytes(&[5; 16]));
            all.extend(data(1, b"after"));
            let (frames, epochs) = receive(all.chunks(100_000));
            let payloads: Vec<u8> = frames.into_iter().flat_map(|(_, data)| data).collect();
            assert_eq!(
                (payloads, epochs),
                (b"beforeafter".to_vec(), vec![[5; 16]]),
                "{:?} torn after {at}",
                decode(whole)
            );
        };
        let whole = data(1, &[0xaa; MAX_DATA]);
        for at in (0..40).chain((40..whole.len() - 40).step_by(4099)).chain(whole.len() - 40..whole.len()) {
            torn(&whole, at);
        }
        for frame in controls() {
            let whole = bytes(frame);
            for at in 0..whole.len() {
                torn(&whole, at);
            }
        }
    }

    proptest! {
        #[test]
        fn garbage_never_panics_and_never_blocks_a_hello(garbage in prop::collection::vec(0u8..8, 0..2000), cut in 1usize..50) {
            let mut bytes = garbage;
            bytes.resize(bytes.len() + TAKEOVER_PADS, 0);
            bytes.extend(hello_bytes(&[8; 16]));
            let (_, epochs) = receive(bytes.chunks(cut * 997));
            prop_assert_eq!(epochs.last(), Some(&[8; 16]));
        }

        #[test]
        fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            decode(&bytes);
            find_hello(&bytes);
            receive(bytes.chunks(7));
        }
    }
}
