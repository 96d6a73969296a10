//! Makes the VM's own copies of files. Holes stay holes, and blocks are shared where the file system can do that.

use crate::error::Error;
use crate::plan::FileCopy;
use machinen_archive::next_data;
use rustix::fs::copy_file_range;
use rustix::io::Errno;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

/// How many bytes are copied in one call; `cancel` is checked after each.
const STEP: u64 = 64 << 20;
const BUFFER: usize = 256 * 1024;

/// Makes all copies. Returns the number of bytes written. After a failure no copy is left.
///
/// # Errors
/// The first one; `ECANCELED` when `cancel` was set meanwhile.
pub fn copy_all(copies: &[FileCopy], cancel: &AtomicBool) -> Result<u64, Error> {
    let mut bytes = 0;
    for (done, plan) in copies.iter().enumerate() {
        match copy(plan, cancel) {
            Ok(copied) => bytes += copied,
            Err(error) => {
                for plan in &copies[..done] {
                    let _ = std::fs::remove_file(&plan.to);
                }
                return Err(Error::io(plan.to.display(), error));
            }
        }
    }
    Ok(bytes)
}

/// Opens a regular file for reading.
pub fn open(path: &Path) -> io::Result<File> {
    // With NONBLOCK, because opening a fifo would otherwise wait for a writer.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(ErrorKind::InvalidInput, "not a regular file"));
    }
    Ok(file)
}

/// Makes a file that must not exist yet.
pub fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)
}

fn copy(plan: &FileCopy, cancel: &AtomicBool) -> io::Result<u64> {
    let from = open(&plan.from)?;
    let to = create(&plan.to)?;
    let copied = copy_content(&from, &to, plan.size.unwrap_or(0), cancel);
    if copied.is_err() {
        let _ = std::fs::remove_file(&plan.to);
    }
    copied
}

/// Copies the data and extends the copy to `size`. Returns the number of bytes written.
pub fn copy_content(from: &File, to: &File, size: u64, cancel: &AtomicBool) -> io::Result<u64> {
    let length = from.metadata()?.len();
    let (mut at, mut bytes) = (0, 0);
    while let Some(data) = next_data(from, at, length)? {
        bytes += copy_range(from, to, data.start, data.end, cancel)?;
        at = data.end;
    }
    to.set_len(length.max(size))?;
    Ok(bytes)
}

fn copy_range(from: &File, to: &File, start: u64, end: u64, cancel: &AtomicBool) -> io::Result<u64> {
    let (mut at, mut in_kernel) = (start, true);
    let mut buffer = Vec::new();
    while at < end {
        if cancel.load(Ordering::Relaxed) {
            return Err(Errno::CANCELED.into());
        }
        let copied = if in_kernel {
            match copy_in_kernel(from, to, at, (end - at).min(STEP)) {
                // The file system, the pair of file systems or the kernel cannot do this.
                Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP | Errno::PERM) | Ok(0) => {
                    in_kernel = false;
                    continue;
                }
                result => result?,
            }
        } else {
            buffer.resize(BUFFER, 0);
            copy_by_hand(from, to, at, end - at, &mut buffer)?
        };
        if copied == 0 {
            // The file became shorter meanwhile; the missing part becomes a hole.
            break;
        }
        at += copied;
    }
    Ok(at - start)
}

fn copy_in_kernel(from: &File, to: &File, at: u64, length: u64) -> Result<u64, Errno> {
    let (mut offset_in, mut offset_out) = (at, at);
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    copy_file_range(from, Some(&mut offset_in), to, Some(&mut offset_out), length).map(|n| n as u64)
}

fn copy_by_hand(from: &File, to: &File, at: u64, length: u64, buffer: &mut [u8]) -> io::Result<u64> {
    let length = buffer.len().min(usize::try_from(length).unwrap_or(usize::MAX));
    let n = from.read_at(&mut buffer[..length], at)?;
    to.write_all_at(&buffer[..n], at)?;
    Ok(n as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    fn plan(dir: &Path, size: Option<u64>) -> FileCopy {
        FileCopy { from: dir.join("from"), to: dir.join("to"), size }
    }

    #[test]
    fn holes_stay_holes_and_size_extends() {
        let dir = tempfile::tempdir().unwrap();
        let from = File::create(dir.path().join("from")).unwrap();
        from.write_all_at(&[1; 5000], 1 << 20).unwrap();
        from.write_all_at(&[2; 5000], 300 << 20).unwrap();
        from.set_len(1 << 30).unwrap();
        let plan = plan(dir.path(), Some(2 << 30));
        copy(&plan, &AtomicBool::new(false)).unwrap();
        let copy = File::open(&plan.to).unwrap();
        let metadata = copy.metadata().unwrap();
        assert_eq!((metadata.len(), metadata.mode() & 0o777), (2 << 30, 0o600));
        assert!(metadata.blocks() * 512 < 100_000, "{} blocks", metadata.blocks());
        for (at, byte) in [(1 << 20, 1), (300 << 20, 2)] {
            let mut read = [0; 5001];
            copy.read_exact_at(&mut read, at).unwrap();
            assert!(read[..5000] == [byte; 5000] && read[5000] == 0);
        }
    }

    #[test]
    fn existing_files_are_not_touched() {
        let dir = tempfile::tempdir().unwrap();
        let plan = plan(dir.path(), None);
        std::fs::write(&plan.from, b"new").unwrap();
        std::fs::write(&plan.to, b"old").unwrap();
        assert_eq!(copy_all(&[plan], &AtomicBool::new(false)).unwrap_err().code(), "EEXIST");
        assert_eq!(std::fs::read(dir.path().join("to")).unwrap(), b"old");
    }

    #[test]
    fn across_filesystems_it_is_copied_by_hand() {
        let (dir, memory) = (tempfile::tempdir().unwrap(), tempfile::tempdir_in("/dev/shm").unwrap());
        let content: Vec<u8> = (0..1_000_000u32).flat_map(u32::to_le_bytes).collect();
        std::fs::write(dir.path().join("from"), &content).unwrap();
        let plan = FileCopy { from: dir.path().join("from"), to: memory.path().join("to"), size: Some(0) };
        copy_all(&[plan], &AtomicBool::new(false)).unwrap();
        assert!(std::fs::read(memory.path().join("to")).unwrap() == content);
    }

    #[test]
    fn a_failed_or_cancelled_copy_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("from"), b"x").unwrap();
        let second = FileCopy { from: "/dev/null".into(), to: dir.path().join("second"), size: None };
        assert!(copy_all(&[plan(dir.path(), None), second], &AtomicBool::new(false)).is_err());
        assert!(copy_all(&[plan(dir.path(), None)], &AtomicBool::new(true)).is_err());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
