//! Packer and unpacker together, and streams that never end or end too soon.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

use tar::{Builder, EntryType, Header};
use tempfile::TempDir;

use super::{Pieces, Source, Target};
use crate::Error;

fn unpack(target: &Path, archive: impl Read) -> Result<u64, Error> {
    Target::open(target.to_str().unwrap()).unwrap().unpack(archive)
}

fn pack(path: &Path, excludes: &[String]) -> (u64, Vec<u8>) {
    collect(&Source::open(path.to_str().unwrap(), excludes).unwrap())
}

fn collect(source: &Source) -> (u64, Vec<u8>) {
    let mut bytes = Vec::new();
    let pieces = Pieces::new(0, |piece| {
        bytes.extend_from_slice(&piece);
        Ok(piece)
    });
    let entries = source.pack(pieces).unwrap();
    (entries, bytes)
}

#[test]
fn what_was_packed_comes_out_the_same() {
    let from = TempDir::new().unwrap();
    let path = |name: &str| from.path().join(name);
    let deep = format!("d/{}/{}", "n".repeat(120), "m".repeat(120));
    fs::create_dir_all(path(&deep)).unwrap();
    fs::write(path("d/file"), "content").unwrap();
    fs::write(path(&format!("{deep}/f")), vec![7; 100_000]).unwrap();
    fs::hard_link(path("d/file"), path("d/other")).unwrap();
    symlink("file", path("d/link")).unwrap();
    fs::write(path("d/x.log"), "").unwrap();
    fs::create_dir_all(path("skip/below")).unwrap();
    let (packed, bytes) = pack(from.path(), &["*.log".to_owned(), "skip".to_owned()]);
    assert_eq!(packed, 7);

    let to = TempDir::new().unwrap();
    assert_eq!(unpack(to.path(), bytes.as_slice()).unwrap(), packed);
    for name in ["d", "d/file", "d/link", &deep, &format!("{deep}/f")] {
        let (old, new) = (path(name).symlink_metadata().unwrap(), to.path().join(name).symlink_metadata().unwrap());
        assert_eq!((old.mode(), old.uid(), old.mtime()), (new.mode(), new.uid(), new.mtime()), "{name}");
    }
    let inode = |name: &str| to.path().join(name).metadata().unwrap().ino();
    assert_eq!(inode("d/file"), inode("d/other"));
    assert_eq!(fs::read(to.path().join(format!("{deep}/f"))).unwrap(), vec![7; 100_000]);
    assert!(!to.path().join("skip").exists() && !to.path().join("d/x.log").exists());
}

#[test]
fn a_single_file_is_one_entry_by_its_name() {
    let from = TempDir::new().unwrap();
    fs::write(from.path().join("one"), "1").unwrap();
    let (packed, bytes) = pack(&from.path().join("one"), &[]);
    assert_eq!(packed, 1);
    let to = TempDir::new().unwrap();
    unpack(to.path(), bytes.as_slice()).unwrap();
    assert_eq!(fs::read_to_string(to.path().join("one")).unwrap(), "1");
}

#[test]
fn an_archive_may_end_anywhere_and_is_an_error_in_an_entry() {
    let from = TempDir::new().unwrap();
    fs::write(from.path().join("a"), "content").unwrap();
    fs::write(from.path().join("b"), "content").unwrap();
    let (_, whole) = pack(from.path(), &[]);
    for length in [1, 511, 515, 1030, 1536 + 3] {
        let to = TempDir::new().unwrap();
        assert!(matches!(unpack(to.path(), &whole[..length]).unwrap_err(), Error::Refused(_)), "{length}");
    }
}

#[test]
fn endless_headers_are_refused_before_they_fill_the_memory() {
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::GNULongName);
    header.set_size(1 << 40);
    header.set_cksum();
    let to = TempDir::new().unwrap();
    let reply = unpack(to.path(), header.as_bytes().chain(io::repeat(b'x'))).unwrap_err();
    assert!(matches!(reply, Error::Refused(_)));
}

#[test]
fn what_follows_the_end_of_an_archive_is_read_and_ignored() {
    let to = TempDir::new().unwrap();
    let mut end = Builder::new(Vec::new()).into_inner().unwrap();
    end.resize(100_000, 0);
    let mut rest = end.as_slice();
    assert_eq!(unpack(to.path(), &mut rest).unwrap(), 0);
    assert!(rest.is_empty());
}

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

/// One file that pretends to have holes.
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
fn what_is_unpacked_for_a_caller_is_the_callers_and_hands_out_no_rights() {
    let mut builder = Builder::new(Vec::new());
    for (kind, name, mode) in [
        (EntryType::Directory, "d/", 0o555),
        (EntryType::Regular, "d/tool", 0o6755),
        (EntryType::Block, "d/disk", 0o666),
    ] {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_mtime(0);
        header.set_uid(12345);
        header.set_gid(12345);
        header.set_size(0);
        header.set_device_major(0).unwrap();
        header.set_device_minor(0).unwrap();
        builder.append_data(&mut header, name, io::empty()).unwrap();
    }
    let to = TempDir::new().unwrap();
    let target = Target::open(to.path().to_str().unwrap()).unwrap().for_caller();
    target.unpack(builder.into_inner().unwrap().as_slice()).unwrap();
    let (directory, tool) = (to.path().join("d").metadata().unwrap(), to.path().join("d/tool").metadata().unwrap());
    assert_eq!((directory.mode() & 0o7777, tool.mode() & 0o7777), (0o555, 0o755));
    assert_eq!(tool.uid(), to.path().metadata().unwrap().uid());
    assert!(!to.path().join("d/disk").exists());
}

#[test]
fn a_whole_filesystem_keeps_attributes_and_devices_and_has_no_older_configuration() {
    let from = TempDir::new().unwrap();
    let path = |name: &str| from.path().join(name);
    let long = format!("{}/{}", "n".repeat(120), "m".repeat(120));
    fs::create_dir_all(path(&long)).unwrap();
    fs::create_dir(path("sub")).unwrap();
    for name in ["plain", &format!("{long}/marked"), "machinen-config.json", "sub/machinen-config.json"] {
        fs::write(path(name), "content").unwrap();
    }
    fs::hard_link(path(&format!("{long}/marked")), path("second")).unwrap();
    let mark = |name: &str, value: &[u8]| {
        rustix::fs::setxattr(path(name), "user.mark", value, rustix::fs::XattrFlags::empty()).unwrap();
    };
    mark(&format!("{long}/marked"), b"\0\xff=");
    mark("sub", b"on a directory");

    let (_, bytes) = collect(&Source::filesystem(from.path(), Some(1000)).unwrap());
    let mut archive = tar::Archive::new(bytes.as_slice());
    let mut found = std::collections::BTreeMap::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let attributes: Vec<_> = entry
            .pax_extensions()
            .unwrap()
            .into_iter()
            .flatten()
            .map(|record| record.map(|r| (r.key().unwrap().to_owned(), r.value_bytes().to_vec())).unwrap())
            .collect();
        assert_eq!(entry.header().mtime().unwrap(), 1000);
        found.insert(entry.path().unwrap().to_string_lossy().trim_end_matches('/').to_owned(), attributes);
    }
    let attribute = |value: &[u8]| vec![("SCHILY.xattr.user.mark".to_owned(), value.to_vec())];
    assert_eq!(found[&format!("{long}/marked")], attribute(b"\0\xff="));
    assert_eq!(found["sub"], attribute(b"on a directory"));
    assert!(found["plain"].is_empty() && found["second"].is_empty());
    assert!(!found.contains_key("machinen-config.json") && found.contains_key("sub/machinen-config.json"));
}
