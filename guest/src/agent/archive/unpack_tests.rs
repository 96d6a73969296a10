use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};

use tar::{Builder, Header};
use tempfile::TempDir;

use super::*;
use crate::agent::archive::pack::Source;

fn header(kind: EntryType, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(0o640);
    header.set_mtime(1_000_000_000);
    // SAFETY: these take and give plain numbers.
    let (uid, gid) = unsafe { (libc::getuid(), libc::getgid()) };
    header.set_uid(uid.into());
    header.set_gid(gid.into());
    header
}

/// An archive of entries whose names are taken literally, as no decent packer would.
fn archive(entries: &[(EntryType, &str, &str)]) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    for (kind, name, content) in entries {
        let is_link = matches!(kind, EntryType::Symlink | EntryType::Link);
        let data = if is_link { "" } else { content };
        let mut header = header(*kind, data.len() as u64);
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        if is_link {
            header.set_link_name_literal(content).unwrap();
        }
        header.set_cksum();
        builder.append(&header, data.as_bytes()).unwrap();
    }
    builder.into_inner().unwrap()
}

fn unpack(target: &Path, archive: &[u8]) -> Result<u64, ErrorReply> {
    Target::open(target.to_str().unwrap()).unwrap().unpack(archive)
}

/// Unpacks into `target` beside `secret`, and expects a refusal that leaves the rest alone.
fn refused(entries: &[(EntryType, &str, &str)]) -> ErrorReply {
    let place = TempDir::new().unwrap();
    fs::write(place.path().join("secret"), "untouched").unwrap();
    let reply = unpack(&place.path().join("target"), &archive(entries)).unwrap_err();
    assert_eq!(fs::read_to_string(place.path().join("secret")).unwrap(), "untouched");
    let mut left: Vec<_> = fs::read_dir(place.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["secret", "target"]);
    reply
}

#[test]
fn names_that_lead_out_are_refused() {
    for name in ["../secret", "a/../../secret", "/secret", "..", "/"] {
        let reply = refused(&[(EntryType::Regular, name, "x")]);
        assert_eq!(reply.code, Code::BadRequest, "{name}");
    }
}

#[test]
fn symbolic_links_that_lead_out_are_not_followed() {
    for to in ["..", "/", "/tmp", "../target/.."] {
        let link = (EntryType::Symlink, "link", to);
        for second in [(EntryType::Regular, "link/secret", "x"), (EntryType::Directory, "link/new", "")] {
            assert_eq!(refused(&[link, second]).code, Code::BadRequest, "{to}");
        }
        assert_eq!(refused(&[link, (EntryType::Link, "new", "link/secret")]).code, Code::BadRequest, "{to}");
    }
}

#[test]
fn hard_links_to_the_outside_are_refused() {
    for to in ["../secret", "/etc/passwd"] {
        assert_eq!(refused(&[(EntryType::Link, "new", to)]).code, Code::BadRequest);
    }
}

#[test]
fn a_file_replaces_a_link_instead_of_writing_through_it() {
    let place = TempDir::new().unwrap();
    let target = place.path().join("target");
    fs::write(place.path().join("secret"), "untouched").unwrap();
    unpack(&target, &archive(&[(EntryType::Symlink, "f", "../secret"), (EntryType::Regular, "f", "new")])).unwrap();
    assert_eq!(fs::read_to_string(place.path().join("secret")).unwrap(), "untouched");
    assert_eq!(fs::read_to_string(target.join("f")).unwrap(), "new");
}

#[test]
fn links_that_stay_inside_are_followed() {
    let place = TempDir::new().unwrap();
    fs::create_dir_all(place.path().join("usr/lib")).unwrap();
    symlink("usr/lib", place.path().join("lib")).unwrap();
    let count =
        unpack(place.path(), &archive(&[(EntryType::Directory, "lib/", ""), (EntryType::Regular, "lib/x", "y")]));
    assert_eq!(count.unwrap(), 2);
    assert_eq!(fs::read_to_string(place.path().join("usr/lib/x")).unwrap(), "y");
}

#[test]
fn endless_headers_are_refused_before_they_fill_the_memory() {
    let mut long = header(EntryType::GNULongName, 1 << 40);
    long.as_mut_bytes()[..4].copy_from_slice(b"long");
    long.set_cksum();
    let endless = long.as_bytes().chain(io::repeat(b'x'));
    let place = TempDir::new().unwrap();
    let reply = Target::open(place.path().to_str().unwrap()).unwrap().unpack(endless).unwrap_err();
    assert_eq!(reply.code, Code::BadRequest);
}

#[test]
fn a_truncated_archive_is_an_error_wherever_it_ends() {
    let whole = archive(&[(EntryType::Regular, "a", "content"), (EntryType::Regular, "b", "content")]);
    for length in [1, 511, 515, 519, 1000, 1100, 1536 + 3] {
        let place = TempDir::new().unwrap();
        let done = unpack(place.path(), &whole[..length]);
        assert_eq!(done.unwrap_err().code, Code::BadRequest, "{length}");
    }
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
    let excludes = ["*.log".to_owned(), "skip".to_owned()];
    let mut bytes = Vec::new();
    let packed = Source::open(from.path().to_str().unwrap(), &excludes).unwrap().pack(&mut bytes).unwrap();
    assert_eq!(packed, 7);

    let to = TempDir::new().unwrap();
    assert_eq!(unpack(to.path(), &bytes).unwrap(), packed);
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
    let mut bytes = Vec::new();
    assert_eq!(Source::open(from.path().join("one").to_str().unwrap(), &[]).unwrap().pack(&mut bytes).unwrap(), 1);
    let to = TempDir::new().unwrap();
    unpack(to.path(), &bytes).unwrap();
    assert_eq!(fs::read_to_string(to.path().join("one")).unwrap(), "1");
}
