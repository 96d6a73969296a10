//! Tests of frames as bytes.

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
        assert_eq!((payloads, epochs), (b"beforeafter".to_vec(), vec![[5; 16]]), "{:?} torn after {at}", decode(whole));
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
