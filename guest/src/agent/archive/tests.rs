//! Packer and unpacker together, and streams that never end or end too soon.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

use tar::{Builder, EntryType, Header};
use tempfile::TempDir;

use super::pack::Source;
use super::unpack::Target;
use crate::reply::{Code, ErrorReply};

fn unpack(target: &Path, archive: impl Read) -> Result<u64, ErrorReply> {
    Target::open(target.to_str().unwrap()).unwrap().unpack(archive)
}

fn pack(path: &Path, excludes: &[String]) -> (u64, Vec<u8>) {
    let mut bytes = Vec::new();
    let entries = Source::open(path.to_str().unwrap(), excludes).unwrap().pack(&mut bytes).unwrap();
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
        assert_eq!(unpack(to.path(), &whole[..length]).unwrap_err().code, Code::BadRequest, "{length}");
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
    assert_eq!(reply.code, Code::BadRequest);
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

    let mut bytes = Vec::new();
    Source::filesystem(from.path(), Some(1000)).unwrap().pack(&mut bytes).unwrap();
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
