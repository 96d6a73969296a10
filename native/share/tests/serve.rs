//! The program, from its first line to its end, with a guest that speaks FUSE messages.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::fs;
use std::os::unix::fs::MetadataExt;

use common::{Program, as_structure, names, plan, text};
use machinen_protocol::share::SETTLE;
use machinen_share::abi::{self, AttrOut, EntryOut, GetattrIn, LockIn, ROOT, ReadIn, notify, opcode};
use zerocopy::IntoBytes;

/// `FUSE_STATX`, which the server does not know.
const STATX: u32 = 52;

#[test]
fn a_guest_finds_its_shares_and_reads_and_writes_files() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("hello"), "from the host").unwrap();
    fs::write(dir.path().join("single"), "alone").unwrap();
    let single = dir.path().join("single");
    let mut guest = Program::serving(&[("work", dir.path(), false), ("single", &single, false)]);

    let listed = guest.call(opcode::READDIR, ROOT, ReadIn { size: 4096, ..ReadIn::default() }.as_bytes()).unwrap();
    assert_eq!(names(&listed), ["work", "single"]);
    let found = guest.walk("work/hello").unwrap();
    assert_eq!((found.attr.size, found.attr.ino), (13, fs::metadata(dir.path().join("hello")).unwrap().ino()));
    let handle = guest.open(found.node, libc::O_RDWR).unwrap();
    assert_eq!(guest.read(found.node, handle, 5, 100).unwrap(), b"the host");
    guest.write(found.node, handle, 9, b"guest").unwrap();
    assert_eq!(fs::read(dir.path().join("hello")).unwrap(), b"from the guest");

    let alone = guest.walk("single").unwrap();
    assert_eq!(alone.attr.mode & libc::S_IFMT, libc::S_IFREG);
    let handle = guest.open(alone.node, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(alone.node, handle, 0, 100).unwrap(), b"alone");
    assert_eq!(guest.walk("nothing").unwrap_err(), libc::ENOENT);
}

#[test]
fn the_root_is_the_servers_own_and_stays_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let mut guest = Program::serving(&[("work", dir.path(), false)]);
    let attr: AttrOut = as_structure(&guest.call(opcode::GETATTR, ROOT, GetattrIn::default().as_bytes()).unwrap());
    assert_eq!((attr.attr.mode, attr.attr.uid), (0o040_555, 0));
    let mkdir = [abi::MkdirIn { mode: 0o755, umask: 0 }.as_bytes(), &text("new")].concat();
    assert_eq!(guest.call(opcode::MKDIR, ROOT, &mkdir).unwrap_err(), libc::EROFS);
    assert_eq!(guest.call(opcode::RMDIR, ROOT, &text("work")).unwrap_err(), libc::EROFS);
    let work = guest.walk("work").unwrap();
    let rename = [abi::RenameIn { new_parent: ROOT }.as_bytes(), &text("a"), &text("b")].concat();
    fs::write(dir.path().join("a"), "").unwrap();
    assert!(guest.call(opcode::RENAME, work.node, &rename).is_err());
    assert!(dir.path().join("a").exists());
}

#[test]
fn what_is_read_only_is_that_and_gets_no_second_name_in_another_share() {
    let (ro, rw) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fs::write(ro.path().join("kept"), "kept").unwrap();
    let mut guest = Program::serving(&[("ro", ro.path(), true), ("rw", rw.path(), false)]);
    let (kept, into) = (guest.walk("ro/kept").unwrap(), guest.walk("rw").unwrap());
    assert_eq!(guest.open(kept.node, libc::O_RDWR).unwrap_err(), libc::EROFS);
    let chmod = abi::SetattrIn { valid: abi::setattr::MODE, mode: 0o777, ..abi::SetattrIn::default() };
    assert_eq!(guest.call(opcode::SETATTR, kept.node, chmod.as_bytes()).unwrap_err(), libc::EROFS);
    // What the server does not know is that, whatever the share: the guest then does without it (STATX).
    for node in [kept.node, ROOT] {
        assert_eq!(guest.call(STATX, node, &[0; 24]).unwrap_err(), libc::ENOSYS);
    }
    let link = [abi::LinkIn { node: kept.node }.as_bytes(), &text("mine")].concat();
    assert_eq!(guest.call(opcode::LINK, into.node, &link).unwrap_err(), libc::EXDEV);
    // Its handle is of no use with a node that may be written.
    fs::write(rw.path().join("other"), "other").unwrap();
    let other = guest.walk("rw/other").unwrap();
    let handle = guest.open(kept.node, libc::O_RDONLY).unwrap();
    assert_eq!(guest.write(other.node, handle, 0, b"x").unwrap_err(), libc::EBADF);
    assert_eq!(fs::read(ro.path().join("kept")).unwrap(), b"kept");
}

#[test]
fn a_guest_is_told_of_what_others_change_and_told_no_faster_than_it_takes_it() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "").unwrap();
    let mut guest = Program::serving(&[("work", dir.path(), false)]);
    // The server must have read the acknowledgement of its first notice before it lets a guest believe anything.
    let file = std::iter::repeat_with(|| guest.walk("work/file").unwrap()).find(|file| file.entry_valid > 0).unwrap();
    let work = guest.walk("work").unwrap();
    assert!(file.attr_valid > 0 && work.attr_valid > 0);
    fs::write(dir.path().join("file"), "more").unwrap();
    let told: abi::InvalidateInode = as_structure(&guest.wait_for_notice(notify::INVALIDATE_INODE));
    assert_eq!(told.node, file.node);
    let told: abi::InvalidateEntry = as_structure(&guest.wait_for_notice(notify::INVALIDATE_ENTRY));
    assert_eq!((told.parent, told.flags), (work.node, notify::EXPIRE_ONLY));
    // More than are sent at once: they only come if the first have been acknowledged.
    for n in 0..1000 {
        fs::write(dir.path().join(n.to_string()), "").unwrap();
    }
    for _ in 0..1000 {
        guest.wait_for_notice(notify::INVALIDATE_ENTRY);
    }
}

#[test]
fn what_cannot_be_served_is_told_by_code_and_path() {
    let mut program = Program::start();
    let missing = std::path::Path::new("/nowhere/at/all");
    let answer = program.ask(&plan(&[("work", missing, false)]));
    assert_eq!(answer["code"], "ENOENT");
    assert_eq!(answer["message"], "/nowhere/at/all: No such file or directory");
    assert!(!program.child.wait().unwrap().success());
}

#[test]
fn it_ends_with_either_connection() {
    let dir = tempfile::tempdir().unwrap();
    let mut program = Program::serving(&[("work", dir.path(), false)]);
    program.guest.shutdown(std::net::Shutdown::Both).unwrap();
    assert!(program.child.wait().unwrap().success());
    let mut program = Program::serving(&[("work", dir.path(), false)]);
    program.control.get_mut().shutdown(std::net::Shutdown::Both).unwrap();
    assert!(program.child.wait().unwrap().success());
}

#[test]
fn few_descriptors_serve_a_large_directory() {
    let dir = tempfile::tempdir().unwrap();
    let names: Vec<_> = (0..2000).map(|n| n.to_string()).collect();
    names.iter().for_each(|name| fs::write(dir.path().join(name), name).unwrap());
    let mut guest = Program::limited(512, &[("work", dir.path(), false)]);
    let work = guest.walk("work").unwrap();
    let first = guest.lookup(work.node, "0").unwrap();
    let handle = guest.open(first.node, libc::O_RDONLY).unwrap();
    let directory = [abi::MkdirIn { mode: 0o755, umask: 0 }.as_bytes(), &text("directory")].concat();
    let directory: EntryOut = as_structure(&guest.call(opcode::MKDIR, work.node, &directory).unwrap());
    let told: Vec<_> = names.iter().map(|name| guest.lookup(work.node, name).unwrap().node).collect();
    // What is open, and directories, stay; other numbers are to be looked up again, and are the same then.
    assert_eq!(guest.read(first.node, handle, 0, 9).unwrap(), b"0");
    assert!(guest.call(opcode::GETATTR, directory.node, GetattrIn::default().as_bytes()).is_ok());
    assert_eq!(guest.call(opcode::GETATTR, told[100], GetattrIn::default().as_bytes()).unwrap_err(), libc::ESTALE);
    assert_eq!(guest.lookup(work.node, "100").unwrap().node, told[100]);
    assert!(guest.call(opcode::GETATTR, told[100], GetattrIn::default().as_bytes()).is_ok());
}

#[test]
fn a_lock_is_waited_for_until_it_is_free_or_the_wait_is_interrupted() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "").unwrap();
    let mut guest = Program::serving(&[("work", dir.path(), false)]);
    let node = guest.walk("work/file").unwrap().node;
    let handles = [(); 2].map(|()| guest.open(node, libc::O_RDWR).unwrap());
    for flags in [0, abi::flag::LOCK_FLOCK] {
        let lock = |owner: usize, kind: i32| LockIn {
            handle: handles[owner],
            owner: owner as u64,
            end: i64::MAX.cast_unsigned(),
            kind: kind.cast_unsigned(),
            pid: 7,
            flags,
            ..LockIn::default()
        };
        guest.call(opcode::SETLK, node, lock(0, libc::F_WRLCK).as_bytes()).unwrap();
        assert_eq!(guest.call(opcode::SETLK, node, lock(1, libc::F_RDLCK).as_bytes()).unwrap_err(), libc::EAGAIN);
        let waiting = guest.send(opcode::SETLKW, node, lock(1, libc::F_RDLCK).as_bytes());
        guest.send(opcode::INTERRUPT, 0, abi::InterruptIn { unique: waiting }.as_bytes());
        assert_eq!(guest.receive(), (waiting, Err(libc::EINTR)));
        let waiting = guest.send(opcode::SETLKW, node, lock(1, libc::F_RDLCK).as_bytes());
        let unlocking = guest.send(opcode::SETLK, node, lock(0, libc::F_UNLCK).as_bytes());
        let mut answers = [guest.receive(), guest.receive()];
        answers.sort_unstable();
        assert_eq!(answers, [(waiting, Ok(Vec::new())), (unlocking, Ok(Vec::new()))]);
        guest.call(opcode::SETLK, node, lock(1, libc::F_UNLCK).as_bytes()).unwrap();
    }
}

#[test]
fn it_serves_confined_and_as_an_ordinary_user() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "text").unwrap();
    let mut users = vec![None];
    if fs::metadata(dir.path()).unwrap().uid() == 0 {
        users.push(Some(65_534));
    }
    for user in users {
        if let Some(user) = user {
            std::os::unix::fs::chown(dir.path(), Some(user), Some(user)).unwrap();
            std::os::unix::fs::chown(dir.path().join("file"), Some(user), Some(user)).unwrap();
        }
        let mut guest = Program::start_as(user);
        let answer = guest.ask(&plan(&[("work", dir.path(), false)]));
        assert_eq!(answer["ok"], true, "{answer}");
        guest.init();
        eprintln!("confinement: {}", answer["confinement"]);
        let status = fs::read_to_string(format!("/proc/{}/status", guest.child.id())).unwrap();
        assert!(status.contains("NoNewPrivs:\t1") && status.contains("Seccomp:\t2"), "{status}");
        // What is its user's is the guest's root's, and so is what is made.
        let (work, file) = (guest.walk("work").unwrap(), guest.walk("work/file").unwrap());
        assert_eq!((file.attr.uid, file.attr.gid), (0, 0));
        let made = guest.create(work.node, "new", libc::O_RDWR).unwrap();
        guest.write(made.entry.node, made.open.handle, 0, b"made").unwrap();
        assert_eq!((made.entry.attr.uid, made.entry.attr.gid), (0, 0));
        assert_eq!(fs::metadata(dir.path().join("new")).unwrap().uid(), user.unwrap_or(file.attr.uid));
        fs::remove_file(dir.path().join("new")).unwrap();
    }
}

#[test]
fn what_changed_before_it_was_asked_has_been_told_when_it_answers() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "old").unwrap();
    let mut guest = Program::serving(&[("work", dir.path(), false)]);
    let (work, file) = (guest.walk("work").unwrap().node, guest.walk("work/file").unwrap());
    // Asked without a change: nothing is told.
    guest.call(SETTLE, 0, &[]).unwrap();
    for round in 0..20 {
        guest.lookup(work, "file").unwrap();
        guest.notices.clear();
        fs::write(dir.path().join("file"), format!("new {round}")).unwrap();
        guest.call(SETTLE, 0, &[]).unwrap();
        let told = guest.notices.iter().any(|(code, body)| {
            *code == abi::notify::INVALIDATE_INODE && as_structure::<abi::InvalidateInode>(body).node == file.node
        });
        assert!(told, "round {round}: {:?}", guest.notices);
    }
}

/// The most groups of fanotify is a matter of the namespace, so here it can be none.
#[test]
fn it_serves_without_caches_where_changes_cannot_be_watched() {
    if !std::process::Command::new("unshare").args(["-Ur", "true"]).status().is_ok_and(|status| status.success()) {
        eprintln!("skipped: this user may make no user namespace");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "text").unwrap();
    let mut guest = Program::start_in_namespace("echo 0 >/proc/sys/user/max_fanotify_groups");
    let answer = guest.ask(&plan(&[("work", dir.path(), false)]));
    assert_eq!(answer["ok"], true, "{answer}");
    guest.init();
    guest.wait_until_caught_up();
    for _ in 0..10 {
        let file = guest.walk("work/file").unwrap();
        assert_eq!((file.entry_valid, file.attr_valid, file.attr.size), (0, 0, 4));
    }
    let file = guest.walk("work/file").unwrap();
    let handle = guest.open(file.node, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(file.node, handle, 0, 100).unwrap(), b"text");
}
