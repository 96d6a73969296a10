//! Tests of the server of shares: when it is started, what it is told, and what becomes of a VM whose server fails. The server is a script.

// Clippy exempts test functions only, not what they call.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Shim, lives, start_with};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// The server's part of every script that is to serve: it reads the first line, and answers.
const GREET: &str = "read -r hello <&4; echo '{\"ok\":true,\"confinement\":[\"landlock\"],\"lost\":[]}' >&4;";

/// A shim whose guest shares a directory, with these scripts as server and VMM. The VMM has its end as descriptor 8.
fn start(server: &str, vmm: &str) -> Shim {
    start_with(&[], |plan| {
        plan["vmm"]["argv"] = json!(["sh", "-c", vmm]);
        plan["shares"] = json!({
            "fd": 8, "argv": ["sh", "-c", server], "env": {"FROM_PLAN": "shares"},
            "parts": [
                {"tag": "one", "path": "/srv/one", "readOnly": true},
                {"tag": "two", "path": "/srv/two", "readOnly": false, "uid": 7, "gid": 8},
            ],
            "state": "/srv/state",
        });
    })
}

/// What the VMM prints on its console, as lines.
fn printed(shim: &mut Shim) -> Vec<String> {
    shim.exited()["consoleTail"].as_str().unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn the_server_is_told_what_it_serves_and_the_vmm_talks_to_it() {
    let server = format!("{GREET} read -r asked <&3; echo \"$asked, $FROM_PLAN, $hello\" >&3; cat <&3 >/dev/null");
    let mut shim = start(&server, "echo ping >&8; read -r answer <&8; echo \"$answer\" >&4");
    let started = shim.event();
    assert_eq!(started["event"], "started");
    assert_eq!(started["shares"], json!({"confinement": ["landlock"], "lost": []}));
    let printed = printed(&mut shim);
    let (asked, hello) = printed[0].split_once(", shares, ").unwrap();
    assert_eq!(asked, "ping");
    let expected = json!({
        "version": 1, "state": "/srv/state",
        "shares": [
            {"tag": "one", "path": "/srv/one", "readOnly": true},
            {"tag": "two", "path": "/srv/two", "readOnly": false, "uid": 7, "gid": 8},
        ],
    });
    assert_eq!(serde_json::from_str::<Value>(hello).unwrap(), expected);
    assert_eq!(printed.len(), 1, "its end with the VMM's is nothing to tell: {printed:?}");
}

#[test]
fn what_the_server_has_lost_of_a_saved_guest_is_told() {
    let lost = json!([{"tag": "one", "path": "a/b", "why": "it is another file"}]);
    let server = format!("read -r hello <&4; echo '{}' >&4; cat <&3", json!({"ok": true, "lost": lost}));
    let mut shim = start(&server, "true");
    assert_eq!(shim.event()["shares"], json!({"confinement": [], "lost": lost}));
    shim.exited();
}

#[test]
fn what_the_server_refuses_is_the_failure() {
    let refusal = "{\"ok\":false,\"code\":\"ENOENT\",\"message\":\"/srv/one: No such file or directory\"}";
    let mut shim = start(&format!("read -r hello <&4; echo '{refusal}' >&4; cat <&4"), "echo never >/srv/never");
    let failed = shim.failed();
    assert_eq!((&failed["step"], &failed["code"]), (&json!("shares"), &json!("ENOENT")));
    assert_eq!(failed["message"], "/srv/one: No such file or directory");
    shim.assert_nothing_left();
}

#[test]
fn a_server_that_does_not_answer_properly_is_a_failure() {
    let endless = "yes | tr -d '\\n' >&4";
    let ended = "machinen-share: it ended with code 3, having printed: no good";
    for (server, message) in [
        ("read -r hello <&4; echo no good >&2; exit 3", ended),
        ("echo no good; exit 3", ended),
        ("echo '{\"ok\":false}' >&4; cat <&4", "machinen-share: invalid data"),
        (endless, "machinen-share: invalid data"),
    ] {
        let mut shim = start(server, "true");
        let failed = shim.failed();
        assert_eq!((&failed["step"], &failed["message"]), (&json!("shares"), &json!(message)), "{server}");
        assert_eq!(failed["subject"], "machinen-share");
        shim.assert_nothing_left();
    }
}

#[test]
fn a_server_that_cannot_be_started_is_a_failure() {
    let mut shim = start_with(&["serve"], |plan| {
        plan["shares"] = json!({"fd": 8, "argv": ["machinen-no-such-server"], "env": {}, "parts": []});
    });
    let failed = shim.failed();
    assert_eq!((&failed["step"], &failed["code"]), (&json!("shares"), &json!("ENOENT")));
    assert_eq!(failed["subject"], "machinen-share");
    shim.assert_nothing_left();
}

#[test]
fn a_vm_that_is_no_longer_wanted_waits_for_no_server() {
    let marked = tempfile::tempdir().unwrap();
    let mark = marked.path().join("mark");
    let mut shim = start(&format!("echo $$ >{}; exec cat <&3", mark.display()), "true");
    shim.until(|_| std::fs::read_to_string(&mark).is_ok_and(|text| text.ends_with('\n')));
    let server = json!(std::fs::read_to_string(&mark).unwrap().trim().parse::<u32>().unwrap());
    shim.signal(Signal::TERM);
    assert_eq!(shim.failed()["code"], "ECANCELED");
    assert!(!lives(&server));
    shim.assert_nothing_left();
}

/// A VM that runs, and its server's pid.
fn running(server: &str) -> (Shim, i32) {
    let shim = start(&format!("{GREET} echo $$ >&3; {server}"), "read -r pid <&8; echo \"$pid\" >&4; exec cat <&3");
    assert_eq!(shim.event()["event"], "started");
    let console = || std::fs::read_to_string(shim.path("console.log")).unwrap_or_default();
    shim.until(|_| console().ends_with('\n'));
    let pid = console().trim().parse().unwrap();
    (shim, pid)
}

#[test]
fn a_vm_outlives_its_server_and_says_so() {
    let (mut shim, server) = running("exec cat <&3");
    assert_eq!(shim.entry().get("liveMountsLost"), None);
    kill_process(Pid::from_raw(server).unwrap(), Signal::KILL).unwrap();
    shim.until(|shim| shim.entry().get("liveMountsLost").is_some());
    let what = "machinen-share was ended by signal 9: the shared directories are gone";
    assert_eq!(shim.entry()["liveMountsLost"], what);
    shim.until(|shim| {
        std::fs::read_to_string(shim.path("console.log")).unwrap().ends_with(&format!("machinen: {what}\n"))
    });
    assert!(lives(&shim.entry()["vmm"]["pid"]));
    shim.control(r#"{"op":"kill"}"#);
    shim.exited();
}

#[test]
fn a_server_that_ends_in_order_before_its_vm_is_told_as_well() {
    let (mut shim, _) = running("exit 0");
    shim.until(|shim| shim.entry().get("liveMountsLost").is_some());
    shim.control(r#"{"op":"kill"}"#);
    shim.exited();
}

#[test]
fn the_server_ends_with_its_vm() {
    // It ignores that the stream ends.
    let (mut shim, server) = running("exec sleep 1000");
    shim.control(r#"{"op":"kill"}"#);
    shim.exited();
    assert!(!lives(&json!(server)));
}

#[test]
fn the_server_ends_with_its_shim() {
    let (mut shim, server) = running("exec sleep 1000");
    shim.child.kill().unwrap();
    shim.child.wait().unwrap();
    shim.until(|_| !lives(&json!(server)));
}
