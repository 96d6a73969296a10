//! Tests of archives that are damaged at random.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::Path;

use tempfile::TempDir;

use crate::Target;
use crate::tests::pack;

/// The disk space, in bytes, of everything below `directory`.
fn disk_use(directory: &Path) -> u64 {
    let below = |entry: fs::DirEntry| {
        let found = entry.path().symlink_metadata().unwrap();
        if found.is_dir() { disk_use(&entry.path()) } else { found.blocks() * 512 }
    };
    fs::read_dir(directory).unwrap().map(|entry| below(entry.unwrap())).sum()
}

/// A generator that gives the same numbers every time.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 33).unwrap() % limit
    }
}

/// Damages an archive. In half of the cases it corrects the headers' checksums afterwards, so that the damage itself is met.
fn damaged(bytes: &[u8], numbers: &mut Numbers) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..=numbers.below(6) {
        let at = numbers.below(bytes.len());
        match numbers.below(5) {
            0 => bytes[at] = u8::try_from(numbers.below(256)).unwrap(),
            1 => bytes[at] ^= 1 << numbers.below(8),
            2 => bytes.truncate((at + 1).max(512)),
            3 => {
                let from = numbers.below(bytes.len()) / 512 * 512;
                let block = bytes[from..bytes.len().min(from + 512)].to_vec();
                let at = at / 512 * 512;
                let room = block.len().min(bytes.len() - at);
                bytes[at..at + room].copy_from_slice(&block[..room]);
            }
            // The kind of an entry, or a digit of its size.
            _ => {
                let field = if numbers.below(2) == 0 { 156 } else { 124 + numbers.below(11) };
                let at = at / 512 * 512 + field;
                if at < bytes.len() {
                    bytes[at] = b"01234567LKxgSDVM"[numbers.below(16)];
                }
            }
        }
    }
    if numbers.below(2) == 0 {
        for header in bytes.chunks_exact_mut(512).filter(|header| header[257..].starts_with(b"ustar")) {
            let sum: u32 =
                header[..148].iter().chain(&header[156..]).map(|&byte| u32::from(byte)).sum::<u32>() + 8 * 32;
            header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
    }
    bytes
}

#[test]
fn no_archive_leads_out_or_fills_the_disk_or_panics() {
    let from = TempDir::new().unwrap();
    let path = |name: &str| from.path().join(name);
    fs::create_dir_all(path(&format!("d/{}", "n".repeat(120)))).unwrap();
    fs::write(path(&format!("d/{}/f", "n".repeat(120))), "long").unwrap();
    fs::write(path("d/file"), vec![7; 3000]).unwrap();
    fs::hard_link(path("d/file"), path("d/same")).unwrap();
    symlink("d/file", path("link")).unwrap();
    let sparse = fs::File::create(path("sparse")).unwrap();
    sparse.set_len(1 << 20).unwrap();
    sparse.write_all_at(b"middle", 500_000).unwrap();
    let (_, whole) = pack(from.path(), &[]);

    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    let (mut refused, mut taken) = (0, 0);
    for _ in 0..3000 {
        let bytes = damaged(&whole, &mut numbers);
        let around = TempDir::new_in("/dev/shm").unwrap();
        let target = around.path().join("target");
        match Target::open(&target).unwrap().for_caller().unpack(bytes.as_slice()) {
            Ok(_) => taken += 1,
            Err(_) => refused += 1,
        }
        assert_eq!(fs::read_dir(around.path()).unwrap().count(), 1);
        assert!(disk_use(&target) <= 8 * bytes.len() as u64, "{} for {}", disk_use(&target), bytes.len());
        rustix::fs::chmod(&target, 0o700.into()).unwrap();
    }
    assert!(refused > 500 && taken > 200, "{refused} refused, {taken} taken");
}
