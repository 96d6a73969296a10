//! Chunks as bytes. Pure functions: what they are fed and when is the business of `link.rs`.

/// Identifies one session; random, chosen by the host.
pub(crate) type Epoch = [u8; 16];

const PAD: u8 = 0;
const HELLO: u8 = 1;
const DATA: u8 = 2;
const VERSION: u8 = 1;
const END: u8 = 0x5a;
/// Begins nothing: sent by a guest that dropped a session.
pub(crate) const NO_CHUNK: u8 = 0xff;
/// Kind and u32 length.
pub(crate) const HEAD: usize = 5;
/// Version and epoch.
const HELLO_BODY: u8 = 17;
/// A whole hello, head and end byte included.
pub(crate) const HELLO_LEN: usize = HEAD + HELLO_BODY as usize + 1;
/// Longest payload of one data chunk.
pub(crate) const MAX_PAYLOAD: usize = 65_536;
/// Longest chunk: what a receiver must be able to hold, because nothing is delivered before the end byte was seen.
pub(crate) const MAX_CHUNK: usize = HEAD + MAX_PAYLOAD + 1;
/// Pads a host sends before it takes over: enough to complete any torn chunk with zeros, wherever it was torn.
pub(crate) const TAKEOVER_PADS: usize = 65_544;

/// What stands at the start of a buffer.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Chunk {
    /// So many pad bytes.
    Pads(usize),
    /// A hello, `HELLO_LEN` bytes.
    Hello(Epoch),
    /// A complete data chunk whose payload has this length; it begins at `HEAD`.
    Data(usize),
    /// A beginning that may become valid with more bytes.
    Incomplete,
    /// Not a chunk: the peer is out of sync.
    Invalid,
}

/// Reads the chunk at the start of `buf`.
pub(crate) fn decode(buf: &[u8]) -> Chunk {
    match buf.first() {
        None => Chunk::Incomplete,
        Some(&PAD) => Chunk::Pads(buf.iter().position(|&b| b != PAD).unwrap_or(buf.len())),
        Some(&HELLO) => hello(buf),
        Some(&DATA) => {
            let Some(len) = length(buf) else { return Chunk::Incomplete };
            if len == 0 || len > MAX_PAYLOAD {
                return Chunk::Invalid;
            }
            match buf.get(HEAD + len) {
                None => Chunk::Incomplete,
                Some(&END) => Chunk::Data(len),
                Some(_) => Chunk::Invalid,
            }
        }
        Some(_) => Chunk::Invalid,
    }
}

fn length(buf: &[u8]) -> Option<usize> {
    let bytes = buf.get(1..HEAD)?;
    Some(u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize)
}

/// The first six bytes of every hello.
const fn hello_prefix() -> [u8; HEAD + 1] {
    [HELLO, 0, 0, 0, HELLO_BODY, VERSION]
}

fn hello(buf: &[u8]) -> Chunk {
    let prefix = hello_prefix();
    let known = buf.len().min(prefix.len());
    if buf[..known] != prefix[..known] {
        return Chunk::Invalid;
    }
    if buf.len() < HELLO_LEN {
        return Chunk::Incomplete;
    }
    let mut epoch = Epoch::default();
    epoch.copy_from_slice(&buf[prefix.len()..HELLO_LEN - 1]);
    if buf[HELLO_LEN - 1] == END { Chunk::Hello(epoch) } else { Chunk::Invalid }
}

/// What a search for a hello found.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Search {
    /// A hello that starts at this offset.
    Found(usize, Epoch),
    /// None; so many leading bytes cannot be part of one and may be dropped.
    Skip(usize),
}

/// Looks for a valid hello anywhere in `buf`: how an end that lost its place finds the next session.
pub(crate) fn find_hello(buf: &[u8]) -> Search {
    let mut at = 0;
    while let Some(next) = buf[at..].iter().position(|&b| b == HELLO) {
        at += next;
        match hello(&buf[at..]) {
            Chunk::Hello(epoch) => return Search::Found(at, epoch),
            Chunk::Incomplete => return Search::Skip(at),
            _ => at += 1,
        }
    }
    Search::Skip(buf.len())
}

/// Appends a hello.
pub(crate) fn put_hello(out: &mut Vec<u8>, epoch: &Epoch) {
    out.extend_from_slice(&hello_prefix());
    out.extend_from_slice(epoch);
    out.push(END);
}

/// Appends payload to `out` as data chunks, filling the chunk that is still open before starting another.
#[derive(Debug, Default)]
pub(crate) struct Writer {
    /// Where the open chunk starts in `out`.
    open: Option<usize>,
}

impl Writer {
    pub(crate) fn put(&mut self, out: &mut Vec<u8>, mut payload: &[u8]) {
        while !payload.is_empty() {
            let start = *self.open.get_or_insert_with(|| {
                let start = out.len();
                out.extend_from_slice(&[DATA, 0, 0, 0, 0]);
                start
            });
            let room = MAX_PAYLOAD - (out.len() - start - HEAD);
            let (now, later) = payload.split_at(room.min(payload.len()));
            out.extend_from_slice(now);
            if now.len() == room {
                self.finish(out);
            }
            payload = later;
        }
    }

    /// Completes the open chunk: only then may its bytes be sent.
    pub(crate) fn finish(&mut self, out: &mut Vec<u8>) {
        let Some(start) = self.open.take() else { return };
        // At most MAX_PAYLOAD, `put` sees to that.
        #[allow(clippy::cast_possible_truncation)]
        let len = (out.len() - start - HEAD) as u32;
        out[start + 1..start + HEAD].copy_from_slice(&len.to_be_bytes());
        out.push(END);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Everything a receiver in sync gets from `bytes` that arrive in the given pieces: payload, and hellos in between.
    fn receive<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> (Vec<u8>, Vec<Epoch>) {
        let (mut buf, mut payload, mut epochs, mut synced) = (Vec::new(), Vec::new(), Vec::new(), true);
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
                    Chunk::Pads(n) => drop(buf.drain(..n)),
                    Chunk::Hello(epoch) => {
                        epochs.push(epoch);
                        buf.drain(..HELLO_LEN);
                    }
                    Chunk::Data(len) => {
                        payload.extend_from_slice(&buf[HEAD..HEAD + len]);
                        buf.drain(..HEAD + len + 1);
                    }
                    Chunk::Incomplete => break,
                    Chunk::Invalid => {
                        synced = false;
                        buf.drain(..1);
                    }
                }
            }
        }
        (payload, epochs)
    }

    fn data(payload: &[u8]) -> Vec<u8> {
        let (mut out, mut writer) = (Vec::new(), Writer::default());
        writer.put(&mut out, payload);
        writer.finish(&mut out);
        out
    }

    fn hello_bytes(epoch: &Epoch) -> Vec<u8> {
        let mut out = Vec::new();
        put_hello(&mut out, epoch);
        out
    }

    #[test]
    fn bytes_are_those_of_the_protocol() {
        assert_eq!(data(b"ab"), [2, 0, 0, 0, 2, b'a', b'b', 0x5a]);
        let hello = hello_bytes(&[7; 16]);
        assert_eq!(hello[..6], [1, 0, 0, 0, 17, 1]);
        assert_eq!((hello.len(), hello[22]), (HELLO_LEN, 0x5a));
    }

    #[test]
    fn every_split_gives_the_same() {
        let mut bytes = hello_bytes(&[9; 16]);
        bytes.extend(data(b"hello"));
        bytes.extend([0, 0, 0]);
        bytes.extend(data(&[2; 300]));
        let expected = receive([&bytes[..]].into_iter());
        assert_eq!(expected.0.len(), 305);
        for at in 0..=bytes.len() {
            let (left, right) = bytes.split_at(at);
            assert_eq!(receive([left, right].into_iter()), expected, "split at {at}");
        }
        assert_eq!(receive(bytes.chunks(1)), expected);
    }

    #[test]
    fn payloads_are_cut_at_the_limit() {
        let bytes = data(&vec![3; MAX_PAYLOAD + 1]);
        assert_eq!(bytes.len(), MAX_CHUNK + HEAD + 1 + 1);
        assert_eq!(decode(&bytes), Chunk::Data(MAX_PAYLOAD));
        assert_eq!(decode(&bytes[MAX_CHUNK..]), Chunk::Data(1));
    }

    #[test]
    fn lengths_out_of_range_are_refused_before_their_payload() {
        assert_eq!(decode(&[2, 0, 0, 0, 0]), Chunk::Invalid);
        assert_eq!(decode(&[2, 0, 1, 0, 1]), Chunk::Invalid);
        assert_eq!(decode(&[2, 0, 1, 0, 0]), Chunk::Incomplete);
        assert_eq!(decode(&[1, 0, 0, 0, 18]), Chunk::Invalid);
        assert_eq!(decode(&[1, 0, 0, 0, 17, 2]), Chunk::Invalid);
        assert_eq!(decode(&[3]), Chunk::Invalid);
    }

    #[test]
    fn pads_complete_a_chunk_torn_anywhere_and_nothing_of_it_is_delivered() {
        let whole = data(&[0xaa; MAX_PAYLOAD]);
        let interesting = (0..40).chain((40..whole.len() - 40).step_by(4099)).chain(whole.len() - 40..whole.len());
        for torn in interesting {
            let mut bytes = data(b"before");
            bytes.extend_from_slice(&whole[..torn]);
            bytes.resize(bytes.len() + TAKEOVER_PADS, 0);
            bytes.extend(hello_bytes(&[5; 16]));
            bytes.extend(data(b"after"));
            let (payload, epochs) = receive(bytes.chunks(100_000));
            assert_eq!((payload, epochs), (b"beforeafter".to_vec(), vec![[5; 16]]), "torn after {torn}");
        }
    }

    proptest! {
        #[test]
        fn garbage_never_panics_and_never_blocks_a_hello(garbage in prop::collection::vec(0u8..6, 0..2000), cut in 1usize..50) {
            let mut bytes = garbage;
            bytes.resize(bytes.len() + TAKEOVER_PADS, 0);
            bytes.extend(hello_bytes(&[8; 16]));
            let (_, epochs) = receive(bytes.chunks(cut * 997));
            prop_assert_eq!(epochs.last(), Some(&[8; 16]));
        }

        #[test]
        fn any_writes_come_out_as_they_went_in(
            writes in prop::collection::vec((prop::collection::vec(any::<u8>(), 0..500), 1usize..400, any::<bool>()), 0..20),
            cut in 1usize..100_000,
        ) {
            let (mut out, mut writer, mut expected) = (Vec::new(), Writer::default(), Vec::new());
            for (bytes, times, finish) in &writes {
                let payload = bytes.repeat(*times);
                writer.put(&mut out, &payload);
                expected.extend(payload);
                if *finish { writer.finish(&mut out) }
            }
            writer.finish(&mut out);
            let (payload, epochs) = receive(out.chunks(cut));
            prop_assert!(payload == expected && epochs.is_empty());
        }

        #[test]
        fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            decode(&bytes);
            find_hello(&bytes);
            receive(bytes.chunks(7));
        }
    }
}
