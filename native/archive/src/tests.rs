//! Tests of packer and unpacker together, and of streams that never end or end too soon.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

use tar::{Builder, EntryType, Header};
use tempfile::TempDir;

use super::{ChunkWriter, Source, Target};
use crate::Error;

pub fn unpack(target: &Path, archive: impl Read) -> Result<u64, Error> {
    Target::open(target).unwrap().unpack(archive)
}

pub fn pack(path: &Path, excludes: &[String]) -> (u64, Vec<u8>) {
    collect(&Source::open(path, excludes, true).unwrap())
}

fn collect(source: &Source) -> (u64, Vec<u8>) {
    let mut bytes = Vec::new();
    let chunks = ChunkWriter::new(0, |chunk| {
        bytes.extend_from_slice(&chunk);
        Ok(chunk)
    });
    let entries = source.pack(chunks).unwrap();
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
    let target = Target::open(to.path()).unwrap().for_caller();
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

#[test]
fn a_file_is_what_a_read_gives_whatever_its_size_is_said_to_be() {
    let to = TempDir::new().unwrap();
    for file in ["/proc/version", "/proc/kallsyms", "/sys/kernel/mm/transparent_hugepage/enabled"] {
        let Ok(content) = fs::read(file) else { continue };
        assert_ne!(content.len() as u64, fs::metadata(file).unwrap().len(), "{file} tells its size");
        let (_, bytes) = pack(Path::new(file), &[]);
        Target::file(to.path().join("copy")).unwrap().unpack(bytes.as_slice()).unwrap();
        assert!(fs::read(to.path().join("copy")).unwrap() == content, "{file}");
    }
    // A file that says it is empty and is larger than the beginning that is read.
    assert!(fs::read("/proc/kallsyms").unwrap().len() > 1 << 20);
}

#[test]
fn a_file_that_becomes_shorter_is_packed_again_as_it_is() {
    let (from, to) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let path = from.path().join("file");
    fs::write(&path, vec![7; 2 << 20]).unwrap();
    let mut bytes = Vec::new();
    let source = Source::open(from.path(), &[], true).unwrap();
    let entries = source
        .pack(ChunkWriter::new(0, |chunk| {
            if bytes.is_empty() {
                fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(300_000).unwrap();
            }
            bytes.extend_from_slice(&chunk);
            Ok(chunk)
        }))
        .unwrap();
    assert_eq!((entries, unpack(to.path(), bytes.as_slice()).unwrap()), (1, 2));
    assert!(fs::read(to.path().join("file")).unwrap() == vec![7; 300_000]);
}

#[test]
fn times_are_exact_to_the_nanosecond_before_1970_and_far_away() {
    let (from, to) = (TempDir::new_in("/dev/shm").unwrap(), TempDir::new_in("/dev/shm").unwrap());
    let times =
        [(0, 0), (1_700_000_000, 123_456_789), (-1, 500_000_000), (-2_000_000_000, 0), (1 << 34, 1), (1 << 36, 0)];
    for (n, &(tv_sec, tv_nsec)) in times.iter().enumerate() {
        let time = rustix::fs::Timespec { tv_sec, tv_nsec };
        let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
        fs::write(from.path().join(n.to_string()), "").unwrap();
        fs::create_dir(from.path().join(format!("d{n}"))).unwrap();
        symlink("x", from.path().join(format!("l{n}"))).unwrap();
        for name in [n.to_string(), format!("d{n}"), format!("l{n}")] {
            let at = from.path().join(name);
            rustix::fs::utimensat(rustix::fs::CWD, &at, &times, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).unwrap();
        }
    }
    let (_, bytes) = pack(from.path(), &[]);
    unpack(to.path(), bytes.as_slice()).unwrap();
    for (n, &(tv_sec, tv_nsec)) in times.iter().enumerate() {
        for name in [n.to_string(), format!("d{n}"), format!("l{n}")] {
            let found = to.path().join(&name).symlink_metadata().unwrap();
            assert_eq!((found.mtime(), found.mtime_nsec()), (tv_sec, tv_nsec), "{name}");
        }
    }
}

#[test]
fn a_link_is_itself_or_what_it_leads_to() {
    let from = TempDir::new().unwrap();
    fs::create_dir(from.path().join("dir")).unwrap();
    fs::write(from.path().join("dir/file"), "x").unwrap();
    symlink("dir", from.path().join("way")).unwrap();
    for (follow, is_link) in [(false, true), (true, false)] {
        let to = TempDir::new().unwrap();
        let (_, bytes) = collect(&Source::open(from.path().join("way"), &[], follow).unwrap());
        if is_link {
            Target::file(to.path().join("copy")).unwrap().unpack(bytes.as_slice()).unwrap();
            assert_eq!(fs::read_link(to.path().join("copy")).unwrap(), Path::new("dir"));
        } else {
            unpack(to.path(), bytes.as_slice()).unwrap();
            assert!(to.path().join("file").exists());
        }
    }
}

/// While a directory is packed, another thread keeps exchanging it with a link to another directory.
#[test]
fn a_swapped_link_leads_nowhere_else() {
    let (from, secret) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let (sub, kept, way) = (from.path().join("sub"), from.path().join("kept"), from.path().join("way"));
    fs::create_dir(&sub).unwrap();
    for n in 0..50 {
        fs::write(sub.join(n.to_string()), "mine").unwrap();
        fs::write(secret.path().join(n.to_string()), "secret").unwrap();
    }
    let holds = |bytes: &[u8], text: &[u8]| bytes.windows(text.len()).any(|window| window == text);
    let over = std::sync::atomic::AtomicBool::new(false);
    let packed = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(std::sync::atomic::Ordering::Relaxed) {
                fs::rename(&sub, &kept).unwrap();
                symlink(secret.path(), &way).unwrap();
                fs::rename(&way, &sub).unwrap();
                fs::remove_file(&sub).unwrap();
                fs::rename(&kept, &sub).unwrap();
            }
        });
        let mut packed: Vec<(bool, Vec<u8>)> = Vec::new();
        // On a busy host the other thread may be the first at every turn for a while.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        let mut found = false;
        while packed.len() < 300 || !found && std::time::Instant::now() < deadline {
            let source = Source::open(from.path(), &["kept".to_owned()], true).unwrap();
            let mut bytes = Vec::new();
            let done = source.pack(ChunkWriter::new(0, |chunk| {
                bytes.extend_from_slice(&chunk);
                Ok(chunk)
            }));
            found |= done.is_ok() && holds(&bytes, b"mine");
            packed.push((done.is_ok(), bytes));
        }
        over.store(true, std::sync::atomic::Ordering::Relaxed);
        packed
    });
    assert!(packed.iter().any(|(done, bytes)| *done && holds(bytes, b"mine")));
    assert!(packed.iter().all(|(_, bytes)| !holds(bytes, b"secret\0")));
}

/// A name that vanishes between two look-ups leaves nothing behind that would describe the next entry.
#[test]
fn what_vanishes_gives_nothing_to_the_next() {
    let from = TempDir::new().unwrap();
    let over = std::sync::atomic::AtomicBool::new(false);
    fs::write(from.path().join("z"), "").unwrap();
    let marked = from.path().join("a");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(std::sync::atomic::Ordering::Relaxed) {
                let beside = from.path().join("machinen-config.json");
                fs::write(&beside, "").unwrap();
                rustix::fs::setxattr(&beside, "user.mark", b"x", rustix::fs::XattrFlags::empty()).unwrap();
                fs::rename(&beside, &marked).unwrap();
                fs::remove_file(&marked).unwrap();
            }
        });
        let mut seen = 0;
        for _ in 0..2000 {
            let (_, bytes) = collect(&Source::filesystem(from.path(), None).unwrap());
            let mut archive = tar::Archive::new(bytes.as_slice());
            for entry in archive.entries().unwrap() {
                let mut entry = entry.unwrap();
                let marks = entry.pax_extensions().unwrap().into_iter().flatten().count();
                match entry.path().unwrap().to_str().unwrap() {
                    "a" => seen += 1,
                    name => assert_eq!(marks, 0, "{name}"),
                }
            }
        }
        over.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(seen > 0);
    });
}

#[test]
fn one_file_replaces_files_and_what_links_lead_to_and_nothing_else() {
    let (from, to) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let at = |name: &str| to.path().join(name);
    fs::write(from.path().join("new"), "new").unwrap();
    let (_, bytes) = pack(&from.path().join("new"), &[]);
    fs::write(at("real"), "old").unwrap();
    fs::hard_link(at("real"), at("other")).unwrap();
    symlink("real", at("link")).unwrap();
    Target::file(at("link")).unwrap().unpack(bytes.as_slice()).unwrap();
    assert_eq!(fs::read_link(at("link")).unwrap(), Path::new("real"));
    assert_eq!(fs::read_to_string(at("real")).unwrap(), "new");
    assert_eq!(fs::read_to_string(at("other")).unwrap(), "old");

    symlink("nowhere", at("dangling")).unwrap();
    fs::create_dir(at("dir")).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, at("fifo"), rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    for name in ["dangling", "dir", "fifo"] {
        assert!(Target::file(at(name)).is_err(), "{name}");
    }
    let (_, directory) = pack(from.path().parent().unwrap(), &["*".to_owned()]);
    assert!(matches!(Target::file(at("x")).unwrap().unpack(directory.as_slice()), Err(Error::Refused(_))));
    assert!(!at("x").exists());
}

#[test]
fn a_file_has_its_name_only_when_it_is_whole() {
    let (from, to) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    fs::write(from.path().join("file"), vec![7; 100_000]).unwrap();
    let (_, bytes) = pack(from.path(), &[]);
    for half in [bytes.len() / 2, 600] {
        unpack(to.path(), &bytes[..half]).unwrap_err();
        assert_eq!(fs::read_dir(to.path()).unwrap().count(), 0);
    }
    fs::write(to.path().join("file"), "old").unwrap();
    unpack(to.path(), &bytes[..bytes.len() / 2]).unwrap_err();
    assert_eq!(fs::read_to_string(to.path().join("file")).unwrap(), "old");
    unpack(to.path(), bytes.as_slice()).unwrap();
    assert_eq!(fs::read(to.path().join("file")).unwrap().len(), 100_000);
}
