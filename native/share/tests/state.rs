//! A server that goes on where another has left off, as after the guest was copied.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::fs::{self, File};
use std::io::{IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::path::Path;

use common::{Program, names, plan};
use machinen_protocol::share::LOCKS;
use machinen_share::abi::{self, FlushIn, ForgetIn, LockIn, ReadIn, flag, notify, opcode};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};
use zerocopy::IntoBytes;

/// Has the program write its state to a file.
fn save(program: &mut Program, to: &Path) {
    let file = File::create(to).unwrap();
    let files = [file.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(&files)));
    let line = b"{\"op\":\"save\"}\n";
    sendmsg(program.control.get_ref(), &[IoSlice::new(line)], &mut ancillary, SendFlags::empty()).unwrap();
    let mut answer = String::new();
    std::io::BufRead::read_line(&mut program.control, &mut answer).unwrap();
    assert_eq!(answer, "{\"ok\":true}\n");
}

/// A program that goes on with a state, and what it says first.
fn gone_on(shares: &[(&str, &Path, bool)], state: &Path) -> (Program, Value) {
    let mut program = Program::start();
    let mut plan = plan(shares);
    plan["state"] = json!(state);
    let answer = program.ask(&plan);
    (program, answer)
}

#[test]
fn what_was_open_is_open_and_numbers_mean_the_same_files() {
    let (dir, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let state = state.path().join("state");
    fs::create_dir_all(dir.path().join("a/b")).unwrap();
    fs::write(dir.path().join("a/b/kept"), "kept").unwrap();
    let shares: [(&str, &Path, bool); 1] = [("work", dir.path(), false)];
    let mut before = Program::serving(&shares);
    let found = before.walk("work/a/b/kept").unwrap();
    let directory = before.walk("work/a/b").unwrap();
    let handle = before.open(found.node, libc::O_RDWR | libc::O_APPEND).unwrap();
    let listed = before.call(opcode::OPENDIR, directory.node, &[0; 8]).unwrap();
    let list = u64::from_ne_bytes(listed[..8].try_into().unwrap());
    save(&mut before, &state);
    // The original goes on, and closes what the copy has open as well.
    before.write(found.node, handle, 0, b", more").unwrap();
    drop(before);

    let (mut guest, answer) = gone_on(&shares, &state);
    assert_eq!((&answer["ok"], &answer["lost"]), (&json!(true), &json!([])), "{answer}");
    assert_eq!(guest.read(found.node, handle, 0, 100).unwrap(), b"kept, more");
    guest.write(found.node, handle, 0, b"!").unwrap();
    assert_eq!(fs::read(dir.path().join("a/b/kept")).unwrap(), b"kept, more!");
    assert_eq!(guest.walk("work/a/b/kept").unwrap().node, found.node);
    let read = ReadIn { handle: list, size: 4096, ..ReadIn::default() };
    let entries = guest.call(opcode::READDIR, directory.node, read.as_bytes()).unwrap();
    assert!(names(&entries).contains(&"kept".to_owned()));
    // Numbers are not given twice: neither those before nor those of handles.
    fs::write(dir.path().join("new"), "").unwrap();
    assert!(guest.walk("work/new").unwrap().node > found.node);
    assert!(guest.open(found.node, libc::O_RDONLY).unwrap() > handle.max(list));
    // Three for the three times it was told of it.
    guest.send(opcode::FORGET, found.node, ForgetIn { lookups: 2 }.as_bytes());
    assert_eq!(guest.read(found.node, handle, 0, 4).unwrap(), b"kept");
}

#[test]
fn what_is_gone_or_another_is_an_error_for_itself_alone() {
    let (dir, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let state = state.path().join("state");
    for name in ["removed", "replaced", "nameless", "kept"] {
        fs::write(dir.path().join(name), name).unwrap();
    }
    let shares: [(&str, &Path, bool); 1] = [("work", dir.path(), false)];
    let mut before = Program::serving(&shares);
    let files: Vec<_> = ["removed", "replaced", "nameless", "kept"]
        .map(|name| {
            let node = before.walk(&format!("work/{name}")).unwrap().node;
            (node, before.open(node, libc::O_RDONLY).unwrap())
        })
        .into();
    fs::remove_file(dir.path().join("nameless")).unwrap();
    save(&mut before, &state);
    drop(before);
    fs::remove_file(dir.path().join("removed")).unwrap();
    fs::write(dir.path().join("other"), "replaced").unwrap();
    fs::rename(dir.path().join("other"), dir.path().join("replaced")).unwrap();

    let (mut guest, answer) = gone_on(&shares, &state);
    let mut lost: Vec<&str> =
        answer["lost"].as_array().unwrap().iter().map(|lost| lost["path"].as_str().unwrap()).collect();
    lost.sort_unstable();
    assert_eq!(lost, ["", "removed", "replaced"], "{answer}");
    let why = |path: &str| {
        let lost = answer["lost"].as_array().unwrap().iter().find(|lost| lost["path"] == path).unwrap();
        lost["why"].as_str().unwrap()
    };
    assert_eq!(why("removed"), "No such file or directory");
    assert_eq!((why("replaced"), why("")), ("another file has its name", "it had no name any more"));
    for (node, handle) in &files[..3] {
        assert_eq!(guest.read(*node, *handle, 0, 8).unwrap_err(), libc::EIO);
    }
    assert_eq!(guest.read(files[3].0, files[3].1, 0, 8).unwrap(), b"kept");
    // By name there is the new one.
    let replaced = guest.walk("work/replaced").unwrap();
    assert_ne!(replaced.node, files[1].0);
    let handle = guest.open(replaced.node, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(replaced.node, handle, 0, 8).unwrap(), b"replaced");
}

#[test]
fn what_was_open_for_writing_can_only_be_read_in_a_copy_whose_share_is_read_only() {
    let (dir, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let state = state.path().join("state");
    fs::write(dir.path().join("file"), "kept").unwrap();
    let mut before = Program::serving(&[("work", dir.path(), false)]);
    let node = before.walk("work/file").unwrap().node;
    let handle = before.open(node, libc::O_RDWR).unwrap();
    save(&mut before, &state);
    drop(before);

    let (mut guest, answer) = gone_on(&[("work", dir.path(), true)], &state);
    assert_eq!(answer["lost"], json!([]), "{answer}");
    assert_eq!(guest.read(node, handle, 0, 8).unwrap(), b"kept");
    assert_eq!(guest.write(node, handle, 0, b"lost").unwrap_err(), libc::EROFS);
    assert_eq!(fs::read(dir.path().join("file")).unwrap(), b"kept");
}

#[test]
fn a_state_reaches_nothing_outside_its_shares() {
    let (dir, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let file = state.path().join("state");
    fs::create_dir(dir.path().join("share")).unwrap();
    fs::write(dir.path().join("secret"), "secret").unwrap();
    fs::write(dir.path().join("share/inside"), "inside").unwrap();
    std::os::unix::fs::symlink("../secret", dir.path().join("share/link")).unwrap();
    let share = dir.path().join("share");
    let shares: [(&str, &Path, bool); 1] = [("work", &share, false)];
    let mut before = Program::serving(&shares);
    let inside = before.walk("work/inside").unwrap();
    let handle = before.open(inside.node, libc::O_RDONLY).unwrap();
    save(&mut before, &file);
    drop(before);
    let saved = fs::read_to_string(&file).unwrap();
    for path in ["../secret", "/etc/passwd", "link", "", ".", "..", "inside/../../secret"] {
        let mut forged = File::create(state.path().join("forged")).unwrap();
        forged.write_all(saved.replace("\"inside\"", &json!(path).to_string()).as_bytes()).unwrap();
        let (mut guest, answer) = gone_on(&shares, &state.path().join("forged"));
        assert_eq!(answer["lost"].as_array().unwrap().len(), 1, "{path}: {answer}");
        assert_eq!(guest.read(inside.node, handle, 0, 8).unwrap_err(), libc::EIO);
    }
}

#[test]
fn nonsense_is_refused_and_nothing_is_the_state_of_a_server_that_had_ended() {
    let (dir, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let file = state.path().join("state");
    let shares: [(&str, &Path, bool); 1] = [("work", dir.path(), false)];
    for nonsense in [
        "x",
        "{}\n",
        "{\"version\":1",
        "{\"version\":9,\"tags\":[\"work\"],\"started\":true,\"next_node\":9,\"next_handle\":0,\"devices\":[],\"nodes\":0,\"handles\":0}\n",
    ] {
        fs::write(&file, nonsense).unwrap();
        let (_, answer) = gone_on(&shares, &file);
        assert_eq!((&answer["ok"], &answer["code"]), (&json!(false), &json!("EINVAL")), "{nonsense}: {answer}");
    }
    fs::write(&file, "").unwrap();
    let (mut guest, answer) = gone_on(&shares, &file);
    assert_eq!(answer["ok"], true);
    guest.init();
    guest.walk("work").unwrap();
}

#[test]
fn locks_are_listed_as_long_as_they_are_held() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "0123456789").unwrap();
    let mut guest = Program::serving(&[("work", dir.path(), false)]);
    let node = guest.walk("work/file").unwrap().node;
    let handle = guest.open(node, libc::O_RDWR).unwrap();
    let lock = |kind: i32, start, end, flags| LockIn {
        handle,
        owner: 9,
        start,
        end,
        kind: kind.cast_unsigned(),
        pid: 77,
        flags,
        ..LockIn::default()
    };
    let held = |guest: &mut Program| guest.call(LOCKS, 0, &[]).unwrap();
    let one = [&77u32.to_ne_bytes()[..], &9u32.to_ne_bytes(), b"work/file"].concat();
    for flags in [0, flag::LOCK_FLOCK] {
        assert_eq!(held(&mut guest), b"");
        guest.call(opcode::SETLK, node, lock(libc::F_WRLCK, 2, 5, flags).as_bytes()).unwrap();
        assert_eq!(held(&mut guest), one);
        guest.call(opcode::SETLK, node, lock(libc::F_UNLCK, 2, 5, flags).as_bytes()).unwrap();
    }
    guest.call(opcode::SETLK, node, lock(libc::F_WRLCK, 2, 5, 0).as_bytes()).unwrap();
    guest.call(opcode::SETLK, node, lock(libc::F_UNLCK, 3, 3, 0).as_bytes()).unwrap();
    assert_eq!(held(&mut guest), one);
    guest.call(opcode::FLUSH, node, FlushIn { handle, lock_owner: 9, ..FlushIn::default() }.as_bytes()).unwrap();
    assert_eq!(held(&mut guest), b"");
}

#[test]
fn a_copy_is_told_what_changed_and_goes_on_believing_the_rest() {
    let (dir, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (path, state) = (dir.path(), state.path().join("state"));
    fs::create_dir(path.join("in")).unwrap();
    for name in ["same", "written", "renamed", "removed"] {
        fs::write(path.join("in").join(name), name).unwrap();
    }
    let shares: [(&str, &Path, bool); 1] = [("work", path, false)];
    let mut before = Program::serving(&shares);
    let valid = std::iter::repeat_with(|| before.walk("work/in/same").unwrap()).find(|found| found.entry_valid > 0);
    let same = valid.unwrap();
    let [written, renamed, removed] =
        ["written", "renamed", "removed"].map(|name| before.walk(&format!("work/in/{name}")).unwrap().node);
    assert!(before.walk("work/in/absent").is_err());
    let directory = before.walk("work/in").unwrap().node;
    save(&mut before, &state);
    drop(before);
    fs::write(path.join("in/written"), "more").unwrap();
    fs::rename(path.join("in/renamed"), path.join("in/absent")).unwrap();
    fs::remove_file(path.join("in/removed")).unwrap();

    let (mut guest, answer) = gone_on(&shares, &state);
    assert_eq!(answer["ok"], true, "{answer}");
    guest.wait_until_caught_up();
    let named = |code: i32| guest.notices.iter().filter(move |notice| notice.0 == code);
    let inodes: Vec<_> = named(notify::INVALIDATE_INODE)
        .map(|(_, body)| common::as_structure::<abi::InvalidateInode>(body).node)
        .collect();
    assert!([written, renamed, removed, directory].iter().all(|node| inodes.contains(node)), "{inodes:?}");
    assert!(!inodes.contains(&same.node));
    let mut names: Vec<_> = named(notify::INVALIDATE_ENTRY)
        .filter(|(_, body)| common::as_structure::<abi::InvalidateEntry>(body).parent == directory)
        .map(|(_, body)| String::from_utf8_lossy(&body[size_of::<abi::InvalidateEntry>()..body.len() - 1]).into_owned())
        .collect();
    names.sort();
    assert_eq!(names, ["absent", "removed", "renamed", "written"]);
    // What has not changed is still watched.
    guest.notices.clear();
    fs::write(path.join("in/same"), "not any more").unwrap();
    let told: abi::InvalidateInode = common::as_structure(&guest.wait_for_notice(notify::INVALIDATE_INODE));
    assert_eq!(told.node, same.node);
}
