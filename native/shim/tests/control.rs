//! Tests of the control socket.

// Clippy exempts test functions only, not what they call.
#![allow(clippy::unwrap_used)]

mod common;

use common::{SHIM, Shim, line, rest, start, start_as, start_ready, start_with};
use serde_json::{Value, json};
use std::io::{BufRead, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::Duration;

const OK: &str = r#"{"ok":true}"#;

fn ok() -> Value {
    serde_json::from_str(OK).unwrap()
}

#[test]
fn stop_and_all_clients_that_wait() {
    let mut shim = start_ready(&["serve"]);
    let mut waiting: Vec<_> = (0..3).map(|_| shim.control(r#"{"op":"wait"}"#)).collect();
    for client in &mut waiting {
        assert_eq!(line(client), ok());
    }
    let mut stopping = shim.control(r#"{"op":"stop"}"#);
    assert_eq!(line(&mut stopping), ok());
    let exit = shim.exited();
    assert_eq!((&exit["reason"], &exit["orderly"]), (&json!("stop"), &json!(true)));
    for client in waiting.iter_mut().chain([&mut stopping]) {
        assert_eq!(line(client), json!({"event": "exited", "exit": exit}));
        assert!(rest(client).is_empty());
    }
}

#[test]
fn stop_with_a_grace_of_its_own() {
    let mut shim = start_ready(&["serve", "--deaf"]);
    let mut stopping = shim.control(r#"{"op":"stop","graceMs":100}"#);
    assert_eq!(line(&mut stopping), ok());
    assert_eq!(shim.exited()["vmm"]["signal"], 9);
}

#[test]
fn kill() {
    let mut shim = start_ready(&["serve"]);
    let mut client = shim.control(r#"{"op":"kill"}"#);
    assert_eq!(line(&mut client), ok());
    let exit = shim.exited();
    assert_eq!((&exit["reason"], &exit["vmm"]["signal"]), (&json!("kill"), &json!(9)));
    assert_eq!(line(&mut client)["exit"], exit);
}

#[test]
fn the_first_request_to_end_is_the_reason() {
    let mut shim = start_with(&["serve", "--deaf"], |plan| plan["graceMs"] = json!(3_600_000));
    shim.event();
    shim.until(|shim| shim.status()["ready"] == true);
    assert_eq!(line(&mut shim.control(r#"{"op":"stop"}"#)), ok());
    assert_eq!(line(&mut shim.control(r#"{"op":"kill"}"#)), ok());
    assert_eq!(shim.exited()["reason"], "stop");
}

#[test]
fn a_client_that_asks_and_leaves_is_heard() {
    let mut shim = start_ready(&["serve"]);
    drop(shim.control(r#"{"op":"stop"}"#));
    assert_eq!(shim.exited()["orderly"], true);
}

#[test]
fn detach() {
    let mut shim = start_ready(&["serve"]);
    assert_eq!(line(&mut shim.control(r#"{"op":"detach"}"#)), ok());
    shim.stdin = None;
    let status = shim.status();
    assert_eq!(
        (&status["ready"], &status["detached"], &shim.entry()["detached"]),
        (&json!(true), &json!(true), &json!(true))
    );
    assert!(status["uptimeMs"].is_u64());
    assert_eq!(line(&mut shim.control(r#"{"op":"stop"}"#)), ok());
    assert_eq!(shim.exited()["reason"], "stop");
}

#[test]
fn logs_as_they_are() {
    let shim = start_ready(&["serve"]);
    let mut printer = shim.dial(8);
    printer.write_all(b"one\ntwo\n").unwrap();
    printer.shutdown(Shutdown::Write).unwrap();
    // The guest has printed it; the shim reads it when it does.
    rest(&mut printer);
    shim.until(|shim| std::fs::read(shim.path("console.log")).unwrap() == b"booted\none\ntwo\n");
    for (request, expected) in [
        (r#"{"op":"logs","source":"console","follow":false}"#, "booted\none\ntwo\n"),
        (r#"{"op":"logs","source":"console","tailBytes":4}"#, "two\n"),
        (r#"{"op":"logs","source":"console","tailBytes":0}"#, ""),
        (r#"{"op":"logs","source":"console","tailBytes":18446744073709551615}"#, "booted\none\ntwo\n"),
        (r#"{"op":"logs","source":"output"}"#, ""),
    ] {
        let mut client = shim.control(request);
        assert_eq!(line(&mut client), ok());
        assert_eq!(String::from_utf8(rest(&mut client)).unwrap(), expected, "{request}");
    }
}

#[test]
fn logs_that_are_followed_to_the_end() {
    let mut shim = start_ready(&["serve"]);
    let mut client = shim.control(r#"{"op":"logs","source":"console","follow":true,"tailBytes":0}"#);
    assert_eq!(line(&mut client), ok());
    let mut printer = shim.dial(8);
    for n in 0..100 {
        printer.write_all(format!("line {n}\n").as_bytes()).unwrap();
        let mut text = String::new();
        while {
            client.read_line(&mut text).unwrap();
            text == "booted\n"
        } {
            text.clear();
        }
        assert_eq!(text, format!("line {n}\n"));
    }
    shim.stdin = None;
    assert!(rest(&mut client).is_empty());
    shim.exited();
}

#[test]
fn followers_see_everything_across_rotations_and_slow_ones_hold_back_no_other() {
    let mut shim = start_with(&["serve"], |plan| plan["console"]["maxBytes"] = json!(400_000));
    shim.event();
    let follow = r#"{"op":"logs","source":"console","follow":true}"#;
    let (mut slow, mut reader) = (shim.control(follow), shim.control(follow));
    assert_eq!((line(&mut slow), line(&mut reader)), (ok(), ok()));
    reader.read_exact(&mut [0; "booted\n".len()]).unwrap();
    let mut printer = shim.dial(8);
    for n in 0..100u8 {
        let piece = [n; 50_000];
        printer.write_all(&piece).unwrap();
        let mut read = [0; 50_000];
        reader.read_exact(&mut read).unwrap();
        assert!(read == piece, "piece {n}");
    }
    let kept = |name: &str| std::fs::metadata(shim.path(name)).unwrap().len();
    assert!(kept("console.log") <= 400_000 && kept("console.log.1") == 400_000);
    // The slow client has missed some bytes, but not the end.
    let last = std::thread::spawn(move || rest(&mut slow));
    shim.stdin = None;
    assert!(rest(&mut reader).is_empty());
    let exit = shim.exited();
    assert_eq!(exit["orderly"], true);
    let text = last.join().unwrap();
    assert!(text.starts_with(b"booted\n") && text.ends_with(&[99; 50_000]) && text.len() < 5_000_000);
}

#[test]
fn output_of_a_detached_main_command() {
    let mut shim = start_ready(&["serve", "--main", "0"]);
    let mut client = shim.control(r#"{"op":"logs","source":"output","follow":true}"#);
    assert_eq!(line(&mut client), ok());
    shim.dial(9);
    assert_eq!(rest(&mut client), b"out\nerr\n");
    assert_eq!(shim.exited()["main"]["code"], 0);
}

#[test]
fn hostile_requests() {
    let shim = start(&["serve"]);
    for request in [
        "",
        "null",
        "[]",
        "{}",
        r#"{"op":"format"}"#,
        r#"{"op":7}"#,
        r#"{"op":"logs","source":"../x"}"#,
        r#"{"op":"stop","graceMs":-1}"#,
        "\0",
        &"[".repeat(4000),
    ] {
        let answer = line(&mut shim.control(request));
        assert_eq!(answer["ok"], false, "{request}");
        assert!(answer["message"].is_string());
    }
    let mut endless = UnixStream::connect(shim.path("control.sock")).unwrap();
    while endless.write_all(&[b' '; 4096]).is_ok() {}
    let half = UnixStream::connect(shim.path("control.sock")).unwrap();
    half.shutdown(Shutdown::Write).unwrap();
    assert_eq!(shim.status()["ok"], true);
}

#[test]
fn clients_that_stay_do_not_lock_out_those_that_act() {
    let mut shim = start_ready(&["serve"]);
    let follow = r#"{"op":"logs","source":"output","follow":true}"#;
    let mut staying: Vec<_> = [r#"{"op":"wait"}"#, follow].iter().cycle().take(96).map(|it| shim.control(it)).collect();
    for client in &mut staying {
        assert_eq!(line(client), ok());
    }
    let refused: Vec<_> = (0..40).map(|_| line(&mut shim.control(r#"{"op":"wait"}"#))).collect();
    assert!(refused.iter().all(|answer| answer["code"] == "EBUSY"));
    assert_eq!(shim.status()["ok"], true);
    // Clients that have left make room.
    staying.truncate(90);
    shim.until(|shim| line(&mut shim.control(r#"{"op":"wait"}"#)) == ok());
    assert_eq!(line(&mut shim.control(r#"{"op":"stop"}"#)), ok());
    assert_eq!(shim.exited()["orderly"], true);
}

/// What the shim has used of a processor, in clock ticks.
fn ticks(shim: &Shim) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", shim.child.id())).unwrap();
    let fields: Vec<_> = stat.rsplit_once(')').unwrap().1.split_ascii_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[test]
fn out_of_descriptors_it_neither_spins_nor_goes_deaf() {
    let mut limited = Command::new("prlimit");
    limited.args(["--nofile=64:64", SHIM]);
    let mut shim = start_as(limited, &["serve"], |plan| plan["graceMs"] = json!(3_600_000));
    shim.event();
    shim.until(|shim| shim.status()["ready"] == true);
    let mut waiting = shim.control(r#"{"op":"wait"}"#);
    assert_eq!(line(&mut waiting), ok());
    // Clients of the guest use up all descriptors, and silent control clients some of those that are kept back.
    let guests: Vec<_> = (0..40).map(|_| shim.connect(7)).collect();
    let fds = || std::fs::read_dir(format!("/proc/{}/fd", shim.child.id())).unwrap().count();
    shim.until(|_| fds() >= 60);
    let silent: Vec<_> = (0..4).map(|_| UnixStream::connect(shim.path("control.sock")).unwrap()).collect();
    assert_eq!(shim.status()["ok"], true);
    let before = ticks(&shim);
    std::thread::sleep(Duration::from_secs(1));
    assert!(ticks(&shim) - before < 30, "{} of 100 ticks", ticks(&shim) - before);
    assert_eq!(line(&mut shim.control(r#"{"op":"stop"}"#)), ok());
    drop((guests, silent));
    assert_eq!(shim.exited()["orderly"], true);
    assert_eq!(line(&mut waiting)["event"], "exited");
}

#[test]
fn more_control_clients_than_descriptors_do_not_spin() {
    let mut limited = Command::new("prlimit");
    limited.args(["--nofile=40:40", SHIM]);
    let shim = start_as(limited, &["serve"], |_| ());
    shim.event();
    shim.until(|shim| shim.status()["ready"] == true);
    let silent: Vec<_> = (0..40).map(|_| UnixStream::connect(shim.path("control.sock")).unwrap()).collect();
    let fds = || std::fs::read_dir(format!("/proc/{}/fd", shim.child.id())).unwrap().count();
    shim.until(|_| fds() >= 40);
    let before = ticks(&shim);
    std::thread::sleep(Duration::from_secs(1));
    assert!(ticks(&shim) - before < 30, "{} of 100 ticks", ticks(&shim) - before);
    drop(silent);
    assert_eq!(shim.status()["ok"], true);
}

#[test]
fn silent_clients_do_not_delay_the_end() {
    let mut shim = start_ready(&["serve"]);
    let silent: Vec<_> = (0..50).map(|_| UnixStream::connect(shim.path("control.sock")).unwrap()).collect();
    let mut waiting = shim.control(r#"{"op":"wait"}"#);
    assert_eq!(line(&mut waiting), ok());
    shim.stdin = None;
    let exit = shim.exited();
    assert_eq!(line(&mut waiting)["exit"], exit);
    drop(silent);
}
