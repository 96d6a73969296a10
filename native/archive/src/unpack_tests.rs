use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use tar::{Builder, Header};

use super::*;

/// An archive of entries `(type, name, link target or content)`. The names are written as they are: the crate's own setters refuse
/// hostile ones.
fn archive(entries: &[(EntryType, &str, &str)]) -> Vec<u8> {
    let owner = fs::metadata(std::env::temp_dir().parent().unwrap()).map(|found| (found.uid(), found.gid())).unwrap();
    let mut builder = Builder::new(Vec::new());
    for &(kind, name, rest) in entries {
        let mut header = Header::new_gnu();
        let old = header.as_old_mut();
        old.name[..name.len()].copy_from_slice(name.as_bytes());
        let link = matches!(kind, EntryType::Link | EntryType::Symlink);
        if link {
            old.linkname[..rest.len()].copy_from_slice(rest.as_bytes());
        }
        let content = if link { "" } else { rest };
        header.set_entry_type(kind);
        header.set_mode(0o750);
        header.set_uid(owner.0.into());
        header.set_gid(owner.1.into());
        header.set_mtime(1_000_000_000);
        header.set_size(content.len() as u64);
        header.set_cksum();
        builder.append(&header, content.as_bytes()).unwrap();
    }
    builder.into_inner().unwrap()
}

fn unpack(bytes: &[u8], target: &Path) -> Result<u64, Error> {
    Target::open(target).unwrap().unpack(bytes)
}

/// A target directory beside a directory that must not be touched.
fn places() -> (tempfile::TempDir, PathBuf, PathBuf) {
    let temporary = tempfile::tempdir().unwrap();
    let (target, outside) = (temporary.path().join("target"), temporary.path().join("outside"));
    fs::create_dir(&target).unwrap();
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("secret"), "untouched").unwrap();
    (temporary, target, outside)
}

#[test]
fn restores_modes_times_and_links() {
    let (_temporary, target, _) = places();
    let bytes = archive(&[
        (EntryType::Directory, "d/", ""),
        (EntryType::Regular, "d/file", "content"),
        (EntryType::Link, "d/same", "d/file"),
        (EntryType::Symlink, "absolute", "/etc/passwd"),
        (EntryType::Fifo, "fifo", ""),
    ]);
    // Unpacks twice: the second time replaces what is there.
    for _ in 0..2 {
        assert_eq!(unpack(&bytes, &target).unwrap(), 5);
    }
    let file = fs::metadata(target.join("d/file")).unwrap();
    assert_eq!((file.permissions().mode() & 0o7777, file.mtime(), file.nlink()), (0o750, 1_000_000_000, 2));
    assert_eq!(fs::read_to_string(target.join("d/same")).unwrap(), "content");
    assert_eq!(fs::metadata(target.join("d")).unwrap().mtime(), 1_000_000_000);
    assert_eq!(fs::read_link(target.join("absolute")).unwrap(), Path::new("/etc/passwd"));
}

#[test]
fn goes_through_a_directory_link_that_stays_inside() {
    let (_temporary, target, _) = places();
    fs::create_dir_all(target.join("usr/bin")).unwrap();
    symlink("usr/bin", target.join("bin")).unwrap();
    unpack(&archive(&[(EntryType::Directory, "bin/", ""), (EntryType::Regular, "bin/tool", "x")]), &target).unwrap();
    assert!(target.join("usr/bin/tool").exists());
}

#[test]
fn refuses_every_way_out() {
    let hostile: [&[(EntryType, &str, &str)]; 9] = [
        &[(EntryType::Regular, "../outside/new", "x")],
        &[(EntryType::Regular, "a/../../outside/new", "x")],
        &[(EntryType::Regular, "/tmp/machinen-absolute", "x")],
        &[(EntryType::Symlink, "l", "../outside"), (EntryType::Regular, "l/secret", "x")],
        &[(EntryType::Symlink, "l", "../outside"), (EntryType::Directory, "l/made/", "")],
        &[(EntryType::Symlink, "l", "../outside"), (EntryType::Directory, "l", "")],
        &[(EntryType::Symlink, "l", "../outside"), (EntryType::Fifo, "l/deep/fifo", "")],
        &[(EntryType::Link, "stolen", "../outside/secret")],
        &[(EntryType::Symlink, "l", "../outside"), (EntryType::Link, "stolen", "l/secret")],
    ];
    for entries in hostile {
        let (_temporary, target, outside) = places();
        let before = fs::metadata(&outside).unwrap().permissions().mode();
        assert!(matches!(unpack(&archive(entries), &target).unwrap_err(), Error::Refused(_)), "{entries:?}");
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 1, "{entries:?}");
        assert_eq!(fs::read_to_string(outside.join("secret")).unwrap(), "untouched", "{entries:?}");
        assert_eq!(fs::metadata(&outside).unwrap().permissions().mode(), before, "{entries:?}");
        assert!(!target.join("stolen").exists(), "{entries:?}");
    }
}

#[test]
fn replaces_a_link_rather_than_writing_through_it() {
    let (_temporary, target, outside) = places();
    symlink(outside.join("secret"), target.join("file")).unwrap();
    unpack(&archive(&[(EntryType::Regular, "file", "new")]), &target).unwrap();
    assert_eq!(fs::read_to_string(outside.join("secret")).unwrap(), "untouched");
    assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "new");
}

#[test]
fn refuses_an_archive_cut_short() {
    let (_temporary, target, _) = places();
    let bytes = archive(&[(EntryType::Regular, "file", "content")]);
    assert!(unpack(&bytes[..515], &target).is_err());
    assert!(unpack(b"no archive at all", &target).is_err());
}
