//! A guest whose kernel does what it likes.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::fs;
use std::io::{Read, Write};
use std::path::Path;

use common::{Program, as_structure, text};
use machinen_share::abi::{self, EntryOut, GetattrIn, InHeader, LockIn, OpenIn, OpenOut, ReadIn, opcode};
use machinen_share::request::MAX_REQUEST;
use zerocopy::IntoBytes;

/// In KiB; what the process has ever had in memory.
const MOST_MEMORY: u64 = 64 * 1024;
/// As many requests as are sent before their answers are read: all fit into the sockets.
const BATCH: usize = 64;

fn peak(program: &Program) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", program.child.id())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Sends requests of a kind, each with its body, and gives their answers to `each`, in any order.
fn many(
    guest: &mut Program,
    asked: u32,
    mut requests: impl Iterator<Item = (u64, Vec<u8>)>,
    mut each: impl FnMut(u64, Result<Vec<u8>, i32>),
) {
    loop {
        let sent: Vec<_> = requests.by_ref().take(BATCH).map(|(node, body)| guest.send(asked, node, &body)).collect();
        if sent.is_empty() {
            return;
        }
        for _ in &sent {
            let (unique, answer) = guest.receive();
            each(unique, answer);
        }
    }
}

#[test]
fn whatever_a_guest_holds_the_memory_is_bounded() {
    const DIRECTORIES: usize = 30;
    const FILES: usize = 5000;
    const LOOKUPS: usize = 150_000;
    // In memory where that can be: so many files take minutes elsewhere.
    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    for directory in 0..DIRECTORIES {
        let path = dir.path().join(directory.to_string());
        fs::create_dir(&path).unwrap();
        // Long names, of which the server may keep some.
        (0..FILES).for_each(|file| drop(fs::File::create(path.join(format!("{file:0100}"))).unwrap()));
    }
    // As many descriptors as there may be: root has them, others what they have.
    let mut guest = Program::limited(1 << 20, &[("work", dir.path(), false)]);
    let directories: Vec<_> = (0..DIRECTORIES).map(|n| guest.walk(&format!("work/{n}")).unwrap().node).collect();
    let names: Vec<_> = (0..FILES).map(|file| text(&format!("{file:0100}"))).collect();
    let place = |n: usize| (directories[n / FILES % DIRECTORIES], names[n % FILES].clone());
    let began = std::time::Instant::now();
    let mut told = Vec::new();
    many(&mut guest, opcode::LOOKUP, (0..LOOKUPS).map(place), |_, found| {
        told.push(as_structure::<EntryOut>(&found.unwrap()).node);
    });
    eprintln!("{:?} after {LOOKUPS} lookups: {} KiB", began.elapsed(), peak(&guest));

    let last = guest.lookup(directories[0], &format!("{:0100}", 0)).unwrap().node;

    // Open files until there may be no more, then their locks.
    let mut handles = Vec::new();
    let open = OpenIn { flags: libc::O_RDWR.cast_unsigned(), open_flags: 0 };
    let mut refused = 0;
    let again = (0..).map(|_| (last, open.as_bytes().to_vec())).take(33_500);
    many(&mut guest, opcode::OPEN, again, |_, opened| match opened {
        Ok(opened) => handles.push(as_structure::<OpenOut>(&opened).handle),
        Err(errno) => {
            assert_eq!(errno, libc::ENFILE);
            refused += 1;
        }
    });
    assert!(refused > 0 && handles.len() > 1000);
    let lock = |owner: u64, start: u64| LockIn {
        handle: handles[0],
        owner,
        start,
        end: start,
        kind: libc::F_RDLCK.cast_unsigned(),
        ..LockIn::default()
    };
    let mut refused = 0;
    let locks = told.iter().rev().take(17_000).map(|node| (*node, lock(1, 0).as_bytes().to_vec()));
    let ranges = (0..5000).map(|n| (last, lock(7, 2 * n).as_bytes().to_vec()));
    many(&mut guest, opcode::SETLK, locks.chain(ranges), |_, locked| {
        if let Err(errno) = locked {
            assert_eq!(errno, libc::ENOLCK);
            refused += 1;
        }
    });
    assert!(refused > 0);
    // Large answers, at once.
    let read = ReadIn { handle: handles[0], size: u32::MAX, ..ReadIn::default() };
    let large = fs::File::options().write(true).open(dir.path().join("0").join(format!("{:0100}", 0))).unwrap();
    large.set_len(1 << 30).unwrap();
    many(&mut guest, opcode::READ, (0..200).map(|_| (last, read.as_bytes().to_vec())), |_, data| {
        assert_eq!(data.unwrap().len(), 1 << 20);
    });
    assert_eq!(guest.lookup(directories[0], "nothing").unwrap_err(), libc::ENOENT);
    let peak = peak(&guest);
    eprintln!("in the end, with {} files open: {peak} KiB", handles.len());
    assert!(peak <= MOST_MEMORY, "{peak} KiB");
}

#[test]
fn numbers_that_were_not_given_are_of_no_use() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "text").unwrap();
    let mut guest = Program::serving(&[("work", dir.path(), false)]);
    let file = guest.walk("work/file").unwrap().node;
    let handle = guest.open(file, libc::O_RDONLY).unwrap();
    for number in (0..2000).chain([u64::MAX, u64::MAX - 1, 1 << 63, 1 << 32]) {
        let expected = if number == handle { Ok(b"text".to_vec()) } else { Err(libc::EBADF) };
        assert_eq!(guest.read(file, number, 0, 9), expected);
        let known = [abi::ROOT, abi::ROOT + 1, file].contains(&number);
        let got = guest.call(opcode::GETATTR, number, GetattrIn::default().as_bytes());
        assert_eq!(got.is_ok(), known, "node {number}");
    }
    // Offsets that do not exist.
    for offset in [u64::MAX, u64::MAX - 4, 1 << 63] {
        assert!(guest.read(file, handle, offset, u32::MAX).is_err());
    }
}

#[test]
fn names_lead_nowhere_else() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("share")).unwrap();
    fs::write(dir.path().join("secret"), "secret").unwrap();
    std::os::unix::fs::symlink("../secret", dir.path().join("share/link")).unwrap();
    let mut guest = Program::serving(&[("work", &dir.path().join("share"), false)]);
    let work = guest.walk("work").unwrap().node;
    for name in ["..", ".", "", "../secret", "/etc/passwd", "link/"] {
        assert_eq!(guest.lookup(work, name).unwrap_err(), libc::EINVAL, "{name}");
        assert_eq!(guest.create(work, name, libc::O_RDWR).err(), Some(libc::EINVAL), "{name}");
    }
    let link = guest.lookup(work, "link").unwrap();
    assert_eq!(link.attr.mode & libc::S_IFMT, libc::S_IFLNK);
    assert!(guest.open(link.node, libc::O_RDONLY).is_err());
    assert!(guest.create(work, "link", libc::O_RDWR).is_err());
    assert_eq!(fs::read(dir.path().join("secret")).unwrap(), b"secret");
}

/// What the server is sent, and how it ends.
fn ends_with(messages: &[u8]) {
    let dir = tempfile::tempdir().unwrap();
    let mut guest = Program::serving(&[("work", dir.path(), false)]);
    guest.guest.write_all(messages).unwrap();
    guest.guest.shutdown(std::net::Shutdown::Write).unwrap();
    let mut rest = Vec::new();
    guest.guest.read_to_end(&mut rest).unwrap();
    guest.child.wait().unwrap();
    assert!(dir.path().exists());
}

#[test]
fn what_is_no_message_ends_the_connection() {
    let header = |len: u32, asked: u32| InHeader { len, opcode: asked, unique: 2, node: 2, ..InHeader::default() };
    ends_with(&[0; 64]);
    ends_with(&[0xff; 64]);
    ends_with(header(39, opcode::GETATTR).as_bytes());
    ends_with(header(u32::MAX, opcode::WRITE).as_bytes());
    ends_with(header(u32::try_from(MAX_REQUEST).unwrap() + 1, opcode::WRITE).as_bytes());
    // Less than it says, then the end.
    ends_with(header(4096, opcode::WRITE).as_bytes());
    ends_with(&header(40, opcode::GETATTR).as_bytes()[..7]);
}

#[test]
fn requests_without_what_they_need_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "text").unwrap();
    let mut guest = Program::serving(&[("work", dir.path(), false)]);
    let file = guest.walk("work/file").unwrap().node;
    let unanswered = [opcode::FORGET, opcode::BATCH_FORGET, opcode::INTERRUPT, opcode::DESTROY, opcode::NOTIFY_REPLY];
    for asked in (0..60).filter(|asked| !unanswered.contains(asked)) {
        for length in [0, 1, 7, 16, 64, 200] {
            // Whatever the answer, there is one.
            let _ = guest.call(asked, file, &vec![0xff; length]);
            let _ = guest.call(asked, 2, &vec![0; length]);
        }
    }
    assert!(Path::new(&dir.path().join("file")).exists());
    guest.walk("work/file").unwrap();
}
