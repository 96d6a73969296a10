//! Tests of all the ways in which a VM can end.

// Clippy exempts test functions only, not what they call.
#![allow(clippy::unwrap_used)]

mod common;

use common::{PATIENCE, lives, start, start_ready, start_with};
use rustix::process::Signal;
use serde_json::json;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

#[test]
fn owner_lost() {
    let mut shim = start_ready(&["serve"]);
    shim.stdin = None;
    let exit = shim.exited();
    assert_eq!(exit["reason"], "owner-lost");
    assert_eq!((&exit["orderly"], &exit["vmm"]), (&json!(true), &json!({"code": 0, "signal": null})));
}

#[test]
fn a_detached_vm_outlives_its_owner() {
    let mut shim = start_with(&["serve"], |plan| plan["detached"] = json!(true));
    shim.event();
    shim.stdin = None;
    shim.until(|shim| shim.status()["ready"] == true);
    shim.signal(Signal::TERM);
    assert_eq!(shim.exited()["reason"], "stop");
}

#[test]
fn killing_the_shim_kills_the_vmm() {
    let mut shim = start_with(&["mute"], |_| ());
    let started = shim.event();
    shim.child.kill().unwrap();
    shim.child.wait().unwrap();
    shim.until(|_| !lives(&started["vmm"]["pid"]));
}

#[test]
fn a_deaf_guest_is_killed_after_the_grace() {
    let mut shim = start_with(&["serve", "--deaf"], |plan| plan["graceMs"] = json!(300));
    shim.event();
    shim.until(|shim| shim.status()["ready"] == true);
    let since = Instant::now();
    shim.signal(Signal::TERM);
    let exit = shim.exited();
    assert!(since.elapsed() >= Duration::from_millis(300));
    assert_eq!((&exit["reason"], &exit["orderly"]), (&json!("stop"), &json!(false)));
    assert_eq!(exit["vmm"], json!({"code": null, "signal": 9}));
}

#[test]
fn a_second_signal_does_not_wait_for_the_grace() {
    let mut shim = start_with(&["serve", "--deaf"], |plan| plan["graceMs"] = json!(3_600_000));
    shim.event();
    shim.until(|shim| shim.status()["ready"] == true);
    shim.signal(Signal::TERM);
    // Another signal, because two pending signals of the same number count as one.
    shim.signal(Signal::INT);
    assert_eq!(shim.exited()["vmm"]["signal"], 9);
}

#[test]
fn a_guest_that_never_came_up_is_killed_at_once() {
    let mut shim = start_with(&["mute"], |plan| plan["graceMs"] = json!(3_600_000));
    shim.event();
    shim.signal(Signal::TERM);
    assert_eq!(shim.exited()["vmm"]["signal"], 9);
}

#[test]
fn endless_graces_are_no_trouble() {
    let mut shim = start_with(&["serve"], |plan| plan["graceMs"] = json!(u64::MAX));
    shim.event();
    shim.until(|shim| shim.status()["ready"] == true);
    shim.signal(Signal::TERM);
    assert_eq!(shim.exited()["orderly"], true);
}

#[test]
fn hang_ups_are_ignored() {
    let mut shim = start_ready(&["serve"]);
    shim.signal(Signal::HUP);
    assert_eq!(shim.status()["ok"], true);
    shim.stdin = None;
    assert_eq!(shim.exited()["reason"], "owner-lost");
}

#[test]
fn a_vmm_that_fails_at_once() {
    let mut shim = start(&["fail", "3", "qemu: no such machine"]);
    let exit = shim.exited();
    assert_eq!((&exit["reason"], &exit["main"]), (&json!("vmm"), &json!(null)));
    assert_eq!(exit["vmm"], json!({"code": 3, "signal": null}));
    assert_eq!(exit["vmmLogTail"], "qemu: no such machine\n");
}

#[test]
fn the_main_command_ends() {
    let mut shim = start_ready(&["serve", "--main", "42"]);
    shim.dial(9);
    let exit = shim.exited();
    assert_eq!(exit["main"], json!({"code": 42, "signal": null}));
    assert_eq!((&exit["reason"], &exit["orderly"]), (&json!("guest"), &json!(true)));
    assert_eq!(exit["consoleTail"], "booted\n");
}

/// Plays a VMM with a vsock device of its own: the guest is behind the VMM's socket.
#[test]
fn a_vmm_that_serves_the_socket_itself() {
    let home = tempfile::tempdir().unwrap();
    let mut plan = common::plan(home.path(), &[&common::fake_vmm(), "mute"]);
    (plan["channel"], plan["graceMs"]) = (json!(null), json!(300));
    let vsock = UnixListener::bind(home.path().join("vm/vsock.sock")).unwrap();
    let mut shim = common::spawn(home);
    shim.send(&format!("{plan}\n"));
    assert_eq!(shim.event()["event"], "started");
    shim.signal(Signal::TERM);
    let (mut agent, _) = vsock.accept().unwrap();
    let mut asked = [0; "CONNECT 1978\n".len()];
    agent.read_exact(&mut asked).unwrap();
    assert_eq!(&asked, b"CONNECT 1978\n");
    agent.write_all(b"OK 1\n").unwrap();
    let mut request = [0; 5 + r#"{"op":"poweroff"}"#.len()];
    agent.read_exact(&mut request).unwrap();
    assert_eq!(&request, b"\x01\0\0\0\x11{\"op\":\"poweroff\"}");
    let mut lifecycle = UnixStream::connect(shim.path("vsock.sock_1980")).unwrap();
    lifecycle.write_all(b"\x13\0\0\0\x1b{\"code\":143,\"signal\":15   }").unwrap();
    // The end of the stream confirms the announcement.
    assert_eq!(lifecycle.read(&mut [0]).unwrap(), 0);
    let exit = shim.exited();
    assert_eq!((&exit["reason"], &exit["orderly"]), (&json!("stop"), &json!(true)));
    assert_eq!(exit["main"], json!({"code": 143, "signal": 15}));
}

#[test]
fn a_vmm_without_a_guest_behind_its_socket_is_killed_at_once() {
    let mut shim = start_with(&["mute"], |plan| (plan["channel"], plan["graceMs"]) = (json!(null), json!(3_600_000)));
    shim.event();
    shim.stdin = None;
    assert_eq!(shim.exited()["reason"], "owner-lost");
}

#[test]
fn everything_named_in_cleanup_is_removed() {
    let elsewhere = tempfile::tempdir().unwrap();
    let path = |name: &str| elsewhere.path().join(name);
    std::fs::create_dir_all(path("directory/deep")).unwrap();
    std::fs::write(path("file"), "x").unwrap();
    std::fs::create_dir(path("kept")).unwrap();
    std::os::unix::fs::symlink(path("kept"), path("link")).unwrap();
    let mut shim = start_with(&["serve"], |plan| {
        plan["cleanup"] = json!([path("directory"), path("file"), path("link"), path("never-existed")]);
    });
    shim.event();
    shim.stdin = None;
    shim.exited();
    let left: Vec<_> = std::fs::read_dir(elsewhere.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["kept"]);
}

#[test]
fn helpers_that_keep_the_console_open_do_not_keep_the_vm() {
    let mut shim = start_with(&[], |plan| {
        plan["vmm"]["argv"] = json!(["sh", "-c", "sleep 15 & echo $! >&2; echo bye >&4"]);
    });
    shim.event();
    let since = Instant::now();
    let exit = shim.exited();
    assert!(since.elapsed() < PATIENCE / 2);
    assert_eq!(exit["consoleTail"], "bye\n");
}

#[test]
fn stop_is_orderly_while_clients_hold_all_streams() {
    let mut shim = start_ready(&["serve"]);
    let held: Vec<_> = (0..512).map(|_| shim.dial(7)).collect();
    let mut control = shim.control(r#"{"op":"stop"}"#);
    assert_eq!(common::line(&mut control), json!({"ok": true}));
    let exit = shim.exited();
    assert_eq!((&exit["reason"], &exit["orderly"]), (&json!("stop"), &json!(true)));
    assert_eq!(exit["vmm"], json!({"code": 0, "signal": null}));
    drop(held);
}

#[test]
fn the_end_of_a_main_command_is_heard_while_clients_hold_all_streams() {
    let mut shim = start_ready(&["serve", "--main", "7"]);
    let held: Vec<_> = (0..511).map(|_| shim.dial(7)).collect();
    let main = shim.dial(9);
    let exit = shim.exited();
    assert_eq!((&exit["main"], &exit["orderly"]), (&json!({"code": 7, "signal": null}), &json!(true)));
    drop((main, held));
}
