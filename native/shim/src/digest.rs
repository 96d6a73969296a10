//! The digest of a file's content, which does not depend on where its holes are.

use crate::files;
use machinen_archive::next_data;
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use std::ffi::OsString;
use std::fmt::Write;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::ExitCode;

const BLOCK: u64 = 4096;
static ZEROS: [u8; 4096] = [0; 4096];
/// How many bytes are read at once; a multiple of the block.
const BUFFER: u64 = 1 << 20;

#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Digest {
    size_bytes: u64,
    /// The bytes of all blocks that are not all zero.
    data_bytes: u64,
    sha256: String,
}

/// Prints a line for each file, until one cannot be read.
pub fn main(files: &[OsString]) -> ExitCode {
    for file in files {
        let line = digest(Path::new(file)).and_then(|digest| serde_json::to_string(&digest).map_err(io::Error::from));
        match line {
            Ok(line) => println!("{line}"),
            Err(error) => {
                eprintln!("{}: {error}", file.display());
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}

fn digest(path: &Path) -> io::Result<Digest> {
    let file = files::open(path)?;
    let size = file.metadata()?.len();
    let mut hash = Sha256::new();
    let (mut at, mut data) = (0, 0);
    while let Some(range) = next_data(&file, at, size)? {
        // A range of data need not begin and end at the blocks' borders.
        let start = (range.start - range.start % BLOCK).max(at);
        at = range.end.next_multiple_of(BLOCK).min(size);
        data += add(&mut hash, &file, start, at)?;
    }
    hash.update(size.to_be_bytes());
    let mut sha256 = String::new();
    for byte in hash.finalize() {
        // Writing to a string cannot fail.
        let _ = write!(sha256, "{byte:02x}");
    }
    Ok(Digest { size_bytes: size, data_bytes: data, sha256 })
}

/// Adds the blocks from `at` to `end` that are not all zero to the hash. Returns their bytes.
fn add(hash: &mut Sha256, file: &File, mut at: u64, end: u64) -> io::Result<u64> {
    let mut data = 0;
    let mut buffer = vec![0; usize::try_from((end - at).min(BUFFER)).map_err(io::Error::other)?];
    while at < end {
        let room = usize::try_from(end - at).map_or(buffer.len(), |rest| rest.min(buffer.len()));
        let read = &mut buffer[..room];
        file.read_exact_at(read, at)?;
        for block in read.chunks(usize::try_from(BLOCK).unwrap_or(usize::MAX)) {
            if *block != ZEROS[..block.len()] {
                hash.update(at.to_be_bytes());
                hash.update(block);
                data += block.len() as u64;
            }
            at += block.len() as u64;
        }
    }
    Ok(data)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The digest as docs/protocol.md defines it, computed the simple way.
    fn naive(content: &[u8]) -> Digest {
        let (mut counted, mut data) = (Vec::new(), 0);
        for (n, block) in content.chunks(4096).enumerate() {
            if block.iter().any(|&byte| byte != 0) {
                counted.extend_from_slice(&(n as u64 * 4096).to_be_bytes());
                counted.extend_from_slice(block);
                data += block.len() as u64;
            }
        }
        let size_bytes = content.len() as u64;
        counted.extend_from_slice(&size_bytes.to_be_bytes());
        let sha256 = Sha256::digest(&counted).iter().map(|byte| format!("{byte:02x}")).collect();
        Digest { size_bytes, data_bytes: data, sha256 }
    }

    #[test]
    fn every_shape_of_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        for (size, data) in [
            (0, vec![]),
            (1, vec![]),
            (1, vec![0]),
            (4096, vec![4095]),
            (4097, vec![4096]),
            (3 << 20, vec![]),
            (3 << 20, vec![5000, 1 << 20, (1 << 20) + 70_000, (3 << 20) - 1]),
            ((5 << 20) + 77, vec![(5 << 20) + 76, 9999]),
        ] {
            let file = File::create(&path).unwrap();
            file.set_len(size).unwrap();
            let mut content = vec![0; usize::try_from(size).unwrap()];
            for at in data {
                file.write_all_at(&[7], at).unwrap();
                content[usize::try_from(at).unwrap()] = 7;
            }
            assert_eq!(digest(&path).unwrap(), naive(&content), "{size}");
            // Written zeros and holes give the same digest.
            std::fs::write(&path, &content).unwrap();
            assert_eq!(digest(&path).unwrap(), naive(&content), "{size}");
        }
    }

    #[test]
    fn a_known_one() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("empty"), b"").unwrap();
        // SHA-256 of eight zero bytes, by sha256sum.
        let expected = "af5570f5a1810b7af78caf4bc70a660f0df51e42baf91d4de5b2328de0e83dfc";
        assert_eq!(digest(&dir.path().join("empty")).unwrap().sha256, expected);
        assert!(digest(dir.path()).is_err());
    }
}
