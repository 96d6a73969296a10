//! Tests of copies to and from a guest (`push`, `pull`), in which the test plays the guest's agent.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use rustix::event::{PollFd, PollFlags, Timespec};
use tempfile::TempDir;

const REQUEST: u8 = 1;
const DATA: u8 = 2;
const EOF: u8 = 3;
const STARTED: u8 = 16;
const END: u8 = 19;
const ERROR: u8 = 20;

/// A shim with one end of a connection, and the other end.
fn start(arguments: &[&str]) -> (Child, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let child = Command::new(env!("CARGO_BIN_EXE_machinen-shim"))
        .args(arguments)
        .stdin(Stdio::from(std::os::fd::OwnedFd::from(theirs)))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    (child, ours)
}

fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
    [&[kind], &u32::try_from(payload.len()).unwrap().to_be_bytes()[..], payload].concat()
}

fn receive(stream: &mut UnixStream) -> Option<(u8, Vec<u8>)> {
    let mut head = [0; 5];
    stream.read_exact(&mut head).ok()?;
    let mut payload = vec![0; u32::from_be_bytes(head[1..].try_into().unwrap()) as usize];
    stream.read_exact(&mut payload).ok()?;
    Some((head[0], payload))
}

/// Unpacks by tar what a shim pushes.
fn pushed(arguments: &[&str], to: &Path) -> Output {
    let (child, mut stream) = start(arguments);
    assert_eq!(receive(&mut stream).unwrap(), (REQUEST, b"{}".to_vec()));
    stream.write_all(&frame(STARTED, b"{}")).unwrap();
    let mut tar = Vec::new();
    while let Some((kind, payload)) = receive(&mut stream) {
        if kind == EOF {
            break;
        }
        assert_eq!(kind, DATA);
        tar.extend(payload);
    }
    stream.write_all(&frame(END, br#"{"entries":1}"#)).unwrap();
    let mut unpacking = Command::new("tar").args(["-x", "-C"]).arg(to).stdin(Stdio::piped()).spawn().unwrap();
    unpacking.stdin.take().unwrap().write_all(&tar).unwrap();
    assert!(unpacking.wait().unwrap().success());
    child.wait_with_output().unwrap()
}

#[test]
fn a_tree_and_a_link_are_pushed_and_other_frames_passed_on() {
    let (from, to) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    fs::create_dir(from.path().join("d")).unwrap();
    fs::write(from.path().join("d/file"), "content").unwrap();
    symlink("d/file", from.path().join("link")).unwrap();
    let source = from.path().to_str().unwrap();
    let output = pushed(&["push", "{}", "follow", source, "unused", "link"], to.path());
    assert!(output.status.success(), "{output:?}");
    assert_eq!(output.stdout, [frame(STARTED, b"{}"), frame(END, br#"{"entries":1}"#)].concat());
    assert_eq!(fs::read_to_string(to.path().join("d/file")).unwrap(), "content");
    assert!(!to.path().join("link").exists());

    let link = from.path().join("link");
    for (links, is_link) in [("link", true), ("follow", false)] {
        assert!(pushed(&["push", "{}", links, link.to_str().unwrap(), "new"], to.path()).status.success());
        assert_eq!(to.path().join("new").is_symlink(), is_link);
        assert!(to.path().join("new").exists());
    }
}

#[test]
fn a_refused_push_reads_no_more_files() {
    let from = TempDir::new().unwrap();
    for n in 0..40 {
        // Real data, because holes would not be read.
        fs::write(from.path().join(format!("{n:02}")), vec![7; 4 << 20]).unwrap();
    }
    let (child, mut stream) = start(&["push", "{}", "follow", from.path().to_str().unwrap(), "unused"]);
    receive(&mut stream).unwrap();
    stream.write_all(&frame(STARTED, b"{}")).unwrap();
    receive(&mut stream).unwrap();
    let refusal = frame(ERROR, br#"{"code":"AGENT_NO_SPACE","message":"full"}"#);
    stream.write_all(&refusal).unwrap();
    // The test takes no data until the shim has hung up, because the shim hears the refusal on a thread of its own.
    let mut hung_up = [PollFd::new(&stream, PollFlags::RDHUP)];
    let patience = Timespec { tv_sec: 20, tv_nsec: 0 };
    assert_eq!(rustix::event::poll(&mut hung_up, Some(&patience)), Ok(1), "the shim has not hung up");
    let mut rest = 0;
    let mut buffer = vec![0; 1 << 20];
    while let Ok(n @ 1..) = stream.read(&mut buffer) {
        rest += n;
    }
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(output.stdout.ends_with(&refusal));
    assert!(rest < 40 << 20, "{rest} bytes came after the refusal");
}

/// One file as tar makes it.
fn archive(content: &[u8]) -> Vec<u8> {
    let from = TempDir::new().unwrap();
    fs::write(from.path().join("file"), content).unwrap();
    Command::new("tar").args(["-c", "-C"]).arg(from.path()).arg("file").output().unwrap().stdout
}

/// Runs `pull` and sends it these frames.
fn pulled(kind: &str, path: &Path, limit: &str, frames: &[Vec<u8>]) -> Output {
    let (child, mut stream) = start(&["pull", "{}", kind, path.to_str().unwrap(), limit]);
    // Without a place to unpack to, the process sends no request.
    let _ = receive(&mut stream);
    for frame in frames {
        // The process may have ended already.
        let _ = stream.write_all(frame);
    }
    drop(stream);
    child.wait_with_output().unwrap()
}

#[test]
fn a_pull_makes_the_file_only_when_it_came_whole() {
    let to = TempDir::new().unwrap();
    let target = to.path().join("copy");
    let tar = archive(&[7; 50_000]);
    let started = frame(STARTED, b"{}");
    let end = [frame(EOF, b""), frame(END, b"{}")].concat();
    let names = || fs::read_dir(to.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>();

    for broken in [vec![], vec![started.clone()], vec![started.clone(), frame(DATA, &tar[..30_000])]] {
        // The caller sees that the last frame is missing.
        assert!(pulled("file", &target, "1000000", &broken).status.success());
        assert!(names().is_empty(), "{:?}", names());
    }
    let refused = [started.clone(), frame(DATA, &tar[..30_000]), frame(ERROR, b"{}")];
    assert!(pulled("file", &target, "1000000", &refused).status.success());
    assert!(names().is_empty());

    let short = [started.clone(), frame(DATA, &tar[..30_000]), end.clone()];
    assert_eq!(pulled("file", &target, "1000000", &short).status.code(), Some(1));
    assert!(names().is_empty());

    let whole = [started, frame(DATA, &tar), end];
    let large = pulled("file", &target, &(tar.len() - 1).to_string(), &whole);
    assert_eq!((large.status.code(), names().len()), (Some(3), 0), "{large:?}");
    assert!(pulled("file", &target, &tar.len().to_string(), &whole).status.success());
    assert!(fs::read(&target).unwrap() == [7; 50_000]);
    assert_eq!(names(), ["copy"]);
}

#[test]
fn a_pull_that_is_killed_leaves_nothing() {
    let to = TempDir::new().unwrap();
    let tar = archive(&vec![7; 3_000_000]);
    let (mut child, mut stream) =
        start(&["pull", "{}", "directory", to.path().to_str().unwrap(), "18446744073709551615"]);
    receive(&mut stream).unwrap();
    stream.write_all(&frame(STARTED, b"{}")).unwrap();
    // More than the buffers between the two hold: the shim is writing the file when the last of it has been taken.
    for piece in tar[..2_500_000].chunks(100_000) {
        stream.write_all(&frame(DATA, piece)).unwrap();
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(fs::read_dir(to.path()).unwrap().count(), 0);
}

#[test]
fn a_device_is_not_replaced() {
    let to = TempDir::new().unwrap();
    let fifo = to.path().join("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let output = pulled("file", &fifo, "1000000", &[frame(STARTED, b"{}"), frame(DATA, &archive(b"x"))]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("fifo"), "{output:?}");
    assert!(fs::metadata(&fifo).unwrap().file_type().is_fifo());
}
