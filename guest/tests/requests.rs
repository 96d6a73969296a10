//! Tests of requests: those of the golden frames are understood, and no others do harm.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

use machinen_guest::request::Request;
use machinen_protocol::frame::decode;
use proptest::prelude::*;
use serde_json::Value;

const GOLDEN: &str = include_str!("../../test/golden/agent-frames.json");

#[test]
fn golden_requests_are_understood() {
    let golden: Value = serde_json::from_str(GOLDEN).unwrap();
    let requests: Vec<_> =
        golden["valid"].as_array().unwrap().iter().filter(|frame| frame["type"] == "request").collect();
    assert!(!requests.is_empty());
    for request in requests {
        let hex = request["hex"].as_str().unwrap();
        let bytes = (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap());
        let frame = decode(&mut bytes.collect()).unwrap().unwrap();
        let parsed = Request::parse(&frame.payload);
        assert!(parsed.is_ok(), "{}: {parsed:?}", request["name"]);
    }
}

proptest! {
    #[test]
    fn requests_of_any_text_never_panic(text in ".{0,200}", path in ".{0,40}") {
        let _ = Request::parse(text.as_bytes());
        for op in ["exec", "main", "write", "read", "push", "pull", "stat", "hostname", "freeze", "rejuvenate", "detach", "dump", "revive", "watch"] {
            let request = serde_json::json!({
                "op": op, "argv": [path], "path": path, "hostname": path, "mode": 1, "seed": path, "nowMs": 1, "machineId": path,
                "generation": path,
            });
            let _ = Request::parse(request.to_string().as_bytes());
        }
    }
}
