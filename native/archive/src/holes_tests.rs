//! Tests of files with holes, packed and unpacked.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::{Command, Stdio};

use tar::{Builder, EntryType, Header};
use tempfile::TempDir;

use crate::Error;
use crate::tests::{pack, unpack};

fn blocks(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks()
}

#[test]
fn holes_stay_holes_and_do_not_travel() {
    let from = TempDir::new().unwrap();
    let path = |name: &str| from.path().join(name);
    let long = format!("{}/{}", "n".repeat(150), "sparse");
    fs::create_dir(path(&"n".repeat(150))).unwrap();
    for name in ["begins", "ends", &long] {
        let file = fs::File::create(path(name)).unwrap();
        file.set_len(1 << 30).unwrap();
        file.write_all_at(&[7; 5000], if name == "begins" { 0 } else { (1 << 30) - 5000 }).unwrap();
        file.write_all_at(b"middle", 100 << 20).unwrap();
    }
    fs::File::create(path("empty")).unwrap().set_len(1 << 20).unwrap();
    let (_, bytes) = pack(from.path(), &[]);
    assert!(bytes.len() < 100_000, "{}", bytes.len());

    let to = TempDir::new().unwrap();
    unpack(to.path(), bytes.as_slice()).unwrap();
    for name in ["begins", "ends", "empty", &long] {
        let (old, new) = (fs::File::open(path(name)).unwrap(), fs::File::open(to.path().join(name)).unwrap());
        assert_eq!(old.metadata().unwrap().len(), new.metadata().unwrap().len(), "{name}");
        assert!(blocks(&to.path().join(name)) < 100, "{name}");
        for offset in [0, 4096, 100 << 20, (1 << 30) - 5000, (1 << 30) - 100] {
            let (mut was, mut is) = ([1; 100], [2; 100]);
            let read = old.read_at(&mut was, offset).unwrap();
            assert_eq!(read, new.read_at(&mut is, offset).unwrap(), "{name}");
            assert_eq!(was[..read], is[..read], "{name} at {offset}");
        }
    }
}

#[test]
fn other_programs_read_holes_too() {
    let from = TempDir::new().unwrap();
    let file = fs::File::create(from.path().join("sparse")).unwrap();
    file.set_len(1 << 24).unwrap();
    file.write_all_at(b"data", 1 << 20).unwrap();
    let (_, bytes) = pack(from.path(), &[]);
    let to = TempDir::new().unwrap();
    let mut tar = Command::new("tar").args(["-x", "-C"]).arg(to.path()).stdin(Stdio::piped()).spawn().unwrap();
    tar.stdin.take().unwrap().write_all(&bytes).unwrap();
    assert!(tar.wait().unwrap().success());
    assert_eq!(fs::read(to.path().join("sparse")).unwrap(), fs::read(from.path().join("sparse")).unwrap());
}

/// An archive of one file whose headers claim holes.
fn pretending(size: &str, map: &str) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    builder
        .append_pax_extensions(
            [("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"), ("GNU.sparse.realsize", size)]
                .map(|(key, value)| (key, value.as_bytes())),
        )
        .unwrap();
    let mut data = map.as_bytes().to_vec();
    data.resize(1024, 0);
    let mut header = Header::new_gnu();
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(1024);
    builder.append_data(&mut header, "file", data.as_slice()).unwrap();
    builder.into_inner().unwrap()
}

#[test]
fn holes_that_make_no_sense_are_refused() {
    for (size, map) in
        [("x", "1\n0\n512\n"), ("100", "1\n0\n512\n"), ("4096", "2\n0\n512\n0\n0\n"), ("4096", "9"), ("4096", "")]
    {
        let to = TempDir::new().unwrap();
        let refused = unpack(to.path(), pretending(size, map).as_slice()).unwrap_err();
        assert!(matches!(refused, Error::Refused(_)), "{size} {map:?}: {refused}");
    }
    let to = TempDir::new().unwrap();
    unpack(to.path(), pretending("4096", "1\n512\n512\n").as_slice()).unwrap();
}

#[test]
fn the_old_form_of_holes_is_refused() {
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::GNUSparse);
    header.set_path("bomb").unwrap();
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(0);
    let gnu = header.as_gnu_mut().unwrap();
    gnu.sparse[0].offset.copy_from_slice(b"02000000000\0");
    gnu.sparse[0].numbytes.copy_from_slice(b"00000000000\0");
    gnu.realsize.copy_from_slice(b"02000000000\0");
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.resize(10_240, 0);
    let to = TempDir::new().unwrap();
    let refused = unpack(to.path(), bytes.as_slice()).unwrap_err();
    assert!(refused.to_string().contains("PAX 1.0"), "{refused}");
    assert_eq!(fs::read_dir(to.path()).unwrap().count(), 0);
}
