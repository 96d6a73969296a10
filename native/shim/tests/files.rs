//! Tests of the files that a VMM inherits, and of the digests of files.

// Clippy exempts test functions only, not what they call.
#![allow(clippy::unwrap_used)]

mod common;

use common::start_with;
use serde_json::{Value, json};
use std::fs::File;

#[test]
fn files_to_inherit() {
    let home = tempfile::tempdir().unwrap();
    std::fs::write(home.path().join("state"), b"content").unwrap();
    let mut shim = start_with(&[], |plan| {
        plan["inherit"] = json!([{"fd": 6, "path": home.path().join("state")}]);
        plan["vmm"]["argv"] = json!(["sh", "-c", "cat <&6 >&4; echo x >&6 || echo ' read-only' >&4"]);
    });
    assert_eq!(shim.event()["event"], "started");
    assert_eq!(shim.exited()["consoleTail"], "content read-only\n");
}

#[test]
fn files_that_cannot_be_opened() {
    for (change, code) in [
        ((|plan| plan["memory"] = json!({"fd": 5, "from": "/missing"})) as fn(&mut Value), "ENOENT"),
        (|plan| plan["memory"] = json!({"fd": 5, "from": "/dev/zero"}), "EINVAL"),
        (|plan| plan["memory"] = json!({"fd": 5, "sizeBytes": u64::MAX}), "EINVAL"),
        (|plan| plan["inherit"] = json!([{"fd": 5, "path": "/missing"}]), "ENOENT"),
    ] {
        let mut shim = start_with(&["serve"], change);
        let failed = shim.failed();
        assert_eq!((&failed["step"], &failed["code"]), (&json!("files"), &json!(code)), "{failed}");
        shim.assert_nothing_left();
    }
}

#[test]
fn digests() {
    let home = tempfile::tempdir().unwrap();
    let (hole, zeros) = (home.path().join("hole"), home.path().join("zeros"));
    File::create(&hole).unwrap().set_len(10_000).unwrap();
    std::fs::write(&zeros, [0; 10_000]).unwrap();
    let shim = || std::process::Command::new(env!("CARGO_BIN_EXE_machinen-shim"));
    let output = shim().arg("digest").args([&hole, &zeros]).output().unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((lines.len(), &lines[0]), (2, &lines[1]));
    assert_eq!((&lines[0]["sizeBytes"], &lines[0]["dataBytes"]), (&json!(10_000), &json!(0)));
    let output = shim().args(["digest", "/missing"]).output().unwrap();
    assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0));
    assert!(!output.stderr.is_empty());
}
