//! Tests the frame codec with the golden frames, with which TypeScript's codec is tested as well, and with arbitrary bytes.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

use bytes::BytesMut;
use machinen_protocol::frame::{Frame, FrameError, HEADER, Kind, MAX_PAYLOAD, MAX_REQUEST, decode, encode, header};
use proptest::prelude::*;
use serde::Deserialize;
use serde_json::Value;

const GOLDEN: &str = include_str!("../../../test/golden/agent-frames.json");

#[derive(Deserialize)]
struct Golden {
    valid: Vec<Valid>,
    invalid: Vec<Invalid>,
}

#[derive(Deserialize)]
struct Valid {
    name: String,
    hex: String,
    r#type: String,
    json: Option<Value>,
    bytes: Option<String>,
}

#[derive(Deserialize)]
struct Invalid {
    name: String,
    hex: String,
    reason: String,
}

fn golden() -> Golden {
    serde_json::from_str(GOLDEN).unwrap()
}

fn unhex(text: &str) -> Vec<u8> {
    assert!(text.len().is_multiple_of(2));
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

/// All kinds of frames.
fn kinds() -> Vec<Kind> {
    (0..=u8::MAX).filter_map(Kind::from_wire).collect()
}

fn decode_all(pieces: impl Iterator<Item = Vec<u8>>) -> Result<Vec<Frame>, FrameError> {
    let (mut buffer, mut frames) = (BytesMut::new(), Vec::new());
    for piece in pieces {
        buffer.extend_from_slice(&piece);
        while let Some(frame) = decode(&mut buffer)? {
            frames.push(frame);
        }
    }
    assert!(buffer.is_empty(), "bytes left over");
    Ok(frames)
}

#[test]
fn golden_frames_decode_and_encode() {
    for valid in golden().valid {
        let bytes = unhex(&valid.hex);
        let frames = decode_all([bytes.clone()].into_iter()).unwrap();
        let [frame] = frames.as_slice() else { panic!("{}: {} frames", valid.name, frames.len()) };
        assert_eq!(format!("{:?}", frame.kind).to_lowercase(), valid.r#type, "{}", valid.name);
        match (valid.json, valid.bytes) {
            (Some(json), None) => {
                assert_eq!(serde_json::from_slice::<Value>(&frame.payload).unwrap(), json, "{}", valid.name);
            }
            (None, Some(payload)) => assert_eq!(frame.payload, unhex(&payload), "{}", valid.name),
            _ => panic!("{}: either json or bytes", valid.name),
        }
        assert_eq!(encode(frame.kind, &frame.payload).unwrap(), bytes, "{}", valid.name);
    }
}

#[test]
fn golden_frames_cover_every_kind() {
    let golden = golden();
    for kind in kinds() {
        let name = format!("{kind:?}").to_lowercase();
        assert!(golden.valid.iter().any(|valid| valid.r#type == name), "{name}");
    }
}

#[test]
fn golden_non_frames_are_refused() {
    for invalid in golden().invalid {
        let reason = match decode(&mut unhex(&invalid.hex).as_slice().into()) {
            Err(FrameError::UnknownKind { .. }) => "unknown-type",
            Err(FrameError::TooLong { .. }) => "too-long",
            Err(FrameError::WrongLength { .. }) => "wrong-length",
            Ok(None) => "incomplete",
            Ok(Some(frame)) => panic!("{}: {frame:?}", invalid.name),
        };
        assert_eq!(reason, invalid.reason, "{}", invalid.name);
    }
}

#[test]
fn limits_hold_on_both_ends() {
    for (kind, limit) in [(Kind::Data, MAX_PAYLOAD), (Kind::Stdout, MAX_PAYLOAD), (Kind::Request, MAX_REQUEST)] {
        let frames = decode_all([encode(kind, &vec![1; limit]).unwrap()].into_iter()).unwrap();
        assert_eq!(frames[0].payload.len(), limit);
        assert_eq!(header(kind, limit + 1), Err(FrameError::TooLong { kind, length: limit + 1 }));
    }
    assert!(header(Kind::Request, usize::MAX).is_err());
}

fn frame() -> impl Strategy<Value = (Kind, Vec<u8>)> {
    (prop::sample::select(kinds()), prop::collection::vec(any::<u8>(), 0..300)).prop_map(|(kind, mut payload)| {
        let length = match kind {
            Kind::Eof => 0,
            Kind::Signal => 1,
            Kind::Resize | Kind::Credit => 4,
            _ => payload.len(),
        };
        payload.resize(length, 7);
        (kind, payload)
    })
}

proptest! {
    #[test]
    fn frames_survive_any_split(frames in prop::collection::vec(frame(), 0..8), cut in 1usize..200) {
        let bytes: Vec<u8> = frames.iter().flat_map(|(kind, payload)| encode(*kind, payload).unwrap()).collect();
        let decoded = decode_all(bytes.chunks(cut).map(<[u8]>::to_vec)).unwrap();
        let decoded: Vec<_> = decoded.into_iter().map(|frame| (frame.kind, frame.payload.to_vec())).collect();
        prop_assert_eq!(decoded, frames);
    }

    #[test]
    fn garbage_is_an_error_or_incomplete_and_never_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        let mut buffer = BytesMut::from(bytes.as_slice());
        while let Ok(Some(_)) = decode(&mut buffer) {}
    }

    #[test]
    fn a_wrong_header_is_refused_before_its_payload(kind in any::<u8>(), length in any::<u32>()) {
        let mut bytes = vec![kind];
        bytes.extend_from_slice(&length.to_be_bytes());
        prop_assert_eq!(bytes.len(), HEADER);
        let limit = Kind::from_wire(kind).map(Kind::limit);
        let decoded = decode(&mut bytes.as_slice().into());
        prop_assert!(decoded.is_err() || limit.is_some_and(|limit| length as usize <= limit));
    }
}
