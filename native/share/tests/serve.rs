//! The program, from its first line to its end, with a guest that speaks FUSE messages.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::fs;
use std::os::unix::fs::MetadataExt;

use common::{Program, as_structure, names, plan, text};
use machinen_share::abi::{self, AttrOut, GetattrIn, ROOT, ReadIn, opcode};
use zerocopy::IntoBytes;

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
