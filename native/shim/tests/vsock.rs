//! Tests of the sockets on the host and the ports in the guest.

// Clippy exempts test functions only, not what they call.
#![allow(clippy::unwrap_used)]

mod common;

use common::{rest, start, start_ready};
use serde_json::json;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

#[test]
fn echo_with_half_close() {
    let shim = start(&["serve"]);
    let mut stream = shim.dial(7);
    let sent: Vec<u8> = (0..5_000_000u32).flat_map(|n| n.to_le_bytes()).collect();
    let mut writer = stream.try_clone().unwrap();
    let copy = sent.clone();
    let writing = std::thread::spawn(move || {
        writer.write_all(&copy).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    assert!(rest(&mut stream) == sent);
    writing.join().unwrap();
}

#[test]
fn what_follows_the_connect_line_at_once_is_not_lost() {
    let shim = start(&["serve"]);
    let mut stream = UnixStream::connect(shim.path("vsock.sock")).unwrap();
    stream.write_all(b"CONNECT 7\nearly").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let answer = String::from_utf8(rest(&mut stream)).unwrap();
    assert!(answer.starts_with("OK ") && answer.ends_with("\nearly"), "{answer:?}");
}

#[test]
fn refused_ports_end_without_a_greeting() {
    let shim = start(&["serve"]);
    assert!(rest(&mut shim.connect(9)).is_empty());
}

#[test]
fn hostile_connect_lines() {
    let shim = start_ready(&["serve"]);
    for line in [
        "\n",
        "CONNECT\n",
        "CONNECT x\n",
        "CONNECT 7\r\n",
        "CONNECT 99999999999\n",
        "GET / HTTP/1.1\r\n",
        "CONNECT -7\n",
        "\0\0\n",
    ] {
        let mut stream = UnixStream::connect(shim.path("vsock.sock")).unwrap();
        stream.write_all(line.as_bytes()).unwrap();
        // A socket that is closed with unread bytes is reset.
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert!(answer.is_empty(), "{line:?}");
    }
    let mut endless = UnixStream::connect(shim.path("vsock.sock")).unwrap();
    while endless.write_all(&[b'1'; 4096]).is_ok() {}
    drop(UnixStream::connect(shim.path("vsock.sock")).unwrap());
    assert!(shim.dial(7).write_all(b"x").is_ok());
}

#[test]
fn silent_clients_do_not_keep_others_out() {
    let shim = start_ready(&["serve"]);
    let silent: Vec<_> = (0..200).map(|_| UnixStream::connect(shim.path("vsock.sock")).unwrap()).collect();
    let mut stream = shim.dial(7);
    stream.write_all(b"x").unwrap();
    stream.read_exact(&mut [0]).unwrap();
    drop(silent);
}

#[test]
fn a_client_that_does_not_read_stalls_only_itself() {
    let shim = start_ready(&["serve"]);
    let mut stalled = shim.dial(7);
    stalled.set_write_timeout(Some(std::time::Duration::from_millis(300))).unwrap();
    while stalled.write_all(&[1; 65_536]).is_ok() {}
    let mut stream = shim.dial(7);
    for _ in 0..100 {
        stream.write_all(b"x").unwrap();
        stream.read_exact(&mut [0]).unwrap();
    }
}

#[test]
fn the_guest_dials_the_host() {
    let shim = start_ready(&["serve"]);
    let listener = shim.listen(5000);
    let mut near = shim.dial(10);
    near.write_all(&5000u32.to_be_bytes()).unwrap();
    let (mut far, _) = listener.accept().unwrap();
    near.write_all(b"question").unwrap();
    near.shutdown(Shutdown::Write).unwrap();
    assert_eq!(rest(&mut far), b"question");
    far.write_all(b"answer").unwrap();
    far.shutdown(Shutdown::Write).unwrap();
    assert_eq!(rest(&mut near), b"answer");
}

#[test]
fn the_guest_dials_a_port_without_a_listener() {
    let shim = start_ready(&["serve"]);
    let mut near = shim.dial(10);
    near.write_all(&5001u32.to_be_bytes()).unwrap();
    let mut answer = Vec::new();
    let _ = near.read_to_end(&mut answer);
    assert!(answer.is_empty());
}

#[test]
fn the_doorbell_is_answered_by_the_shim() {
    let shim = start_ready(&["serve"]);
    assert_eq!(shim.entry()["state"], json!("running"));
    shim.until(|shim| std::fs::read_to_string(shim.path("vmm.log")).unwrap().contains("doorbell: {\"nowMs\":1"));
}

#[test]
fn the_doorbell_is_passed_on_to_a_starter_that_listens() {
    // The listener exists before the VMM, as a starter's does.
    let home = tempfile::tempdir().unwrap();
    let plan = common::plan(home.path(), &[&common::fake_vmm(), "serve"]);
    let listener = std::os::unix::net::UnixListener::bind(home.path().join("vm/vsock.sock_1979")).unwrap();
    let mut shim = common::spawn(home);
    shim.send(&format!("{plan}\n"));
    let (mut bell, _) = listener.accept().unwrap();
    let mut rung = String::new();
    BufReader::new(bell.try_clone().unwrap()).read_line(&mut rung).unwrap();
    assert_eq!(rung, "{\"version\":1,\"agent\":\"0.0.0\"}\n");
    assert_eq!(shim.entry()["state"], json!("running"));
    bell.write_all(b"{\"nowMs\":7}\n").unwrap();
    drop(bell);
    shim.until(|shim| std::fs::read_to_string(shim.path("vmm.log")).unwrap().contains("doorbell: {\"nowMs\":7}"));
}

/// A call of the guest to the lifecycle port, whose bytes the test sends.
fn lifecycle_call(shim: &common::Shim) -> UnixStream {
    let mut near = shim.dial(10);
    near.write_all(&1980u32.to_be_bytes()).unwrap();
    near
}

/// Whether the other end closes the connection; it says nothing.
fn has_ended(call: &mut UnixStream) -> bool {
    call.set_read_timeout(Some(std::time::Duration::from_secs(5))).unwrap();
    match call.read(&mut [0]) {
        Ok(n) => n == 0,
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
    }
}

/// A frame of section 3, or its beginning.
fn frame(kind: u8, length: usize, payload: &[u8]) -> Vec<u8> {
    [&[kind], &u32::try_from(length).unwrap().to_be_bytes()[..], payload].concat()
}

#[test]
fn an_end_frame_longer_than_any_end_is_not_held() {
    let mut shim = start_ready(&["serve"]);
    for length in [4097, 1 << 20] {
        let mut call = lifecycle_call(&shim);
        call.write_all(&frame(19, length, b"{")).unwrap();
        assert!(has_ended(&mut call), "it is still listened to");
    }
    // The longest frame that is allowed counts.
    let end = format!("{{\"code\":3,\"signal\":null{}}}", " ".repeat(4096 - 24));
    assert_eq!(end.len(), 4096);
    let mut call = lifecycle_call(&shim);
    call.write_all(&frame(19, end.len(), end.as_bytes())).unwrap();
    assert_eq!(call.read(&mut [0]).unwrap(), 0);
    shim.signal(rustix::process::Signal::TERM);
    assert_eq!(shim.exited()["main"], json!({"code": 3, "signal": null}));
}

#[test]
fn eight_calls_at_once_reach_the_lifecycle_port() {
    let shim = start_ready(&["serve"]);
    let mut calls: Vec<_> = (0..8)
        .map(|_| {
            let mut call = lifecycle_call(&shim);
            call.write_all(&frame(17, 2, b"x\n")).unwrap();
            call
        })
        .collect();
    shim.until(|shim| std::fs::read(shim.path("output.log")).is_ok_and(|log| log.len() == 16));
    let mut ninth = lifecycle_call(&shim);
    assert!(has_ended(&mut ninth), "it was let in");
    // A call that ends makes room. The next ends too, by its last frame if it is let in, and only then its output is recorded.
    drop(calls.pop());
    shim.until(|shim| {
        let mut next = lifecycle_call(shim);
        let _ = next.write_all(&[frame(17, 2, b"y\n"), frame(19, 2, b"{}")].concat());
        assert!(has_ended(&mut next));
        std::fs::read(shim.path("output.log")).is_ok_and(|log| log.contains(&b'y'))
    });
}

/// Processor time a process or a thread has used, in clock ticks.
fn ticks(of: &str) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{of}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[test]
fn without_descriptors_clients_wait_and_nothing_spins() {
    let shim = start(&["serve"]);
    // The entry says when the guest is ready. A client that asks could still hold a descriptor of the shim below.
    shim.until(|shim| shim.entry()["state"] == "running");
    let limit = |n: usize| {
        let limit = format!("--nofile={n}:4096");
        let pid = shim.child.id().to_string();
        assert!(std::process::Command::new("prlimit").args(["--pid", &pid, &limit]).status().unwrap().success());
    };
    let is_open = |fd: &usize| std::fs::read_link(format!("/proc/{}/fd/{fd}", shim.child.id())).is_ok();
    limit((0..).find(|fd| !is_open(fd)).unwrap());
    let mut waiting = shim.connect(7);
    // Waits as long as this thread takes to use 50 ticks: on a busy host a spinning shim would get no more than this thread does.
    let pid = shim.child.id().to_string();
    let (before, began) = (ticks(&pid), ticks("thread-self"));
    while ticks("thread-self") < began + 50 {}
    let used = ticks(&pid) - before;
    assert!(used < 10, "{used} ticks, of 50");
    limit(4096);
    waiting.write_all(b"x").unwrap();
    let mut greeting = [0; 5];
    waiting.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting, b"OK 7\n");
}
