//! A log in a file of limited size, read by others while it is written.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use tokio::sync::watch;

/// What of the log can be read. Positions count bytes since its beginning, also across rotations.
#[derive(Clone, Copy, Debug, Default)]
pub struct Extent {
    /// Where the file before the current one begins; equal to `start` without one.
    pub oldest: u64,
    /// Where the current file begins.
    pub start: u64,
    pub end: u64,
    /// Nothing will follow.
    pub closed: bool,
}

/// The log. Writing never fails and never waits for readers: what cannot be written is lost.
pub struct Log {
    path: PathBuf,
    max: u64,
    file: Mutex<Option<File>>,
    extent: watch::Sender<Extent>,
}

impl Log {
    pub fn new(path: PathBuf, max: u64) -> Self {
        let file = create(&path).ok();
        Log { path, max: max.max(1), file: Mutex::new(file), extent: watch::Sender::default() }
    }

    /// Appends; at `max` bytes the file becomes `<path>.1`, of which there is one.
    pub fn write(&self, mut bytes: &[u8]) {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let mut extent = *self.extent.borrow();
        while !bytes.is_empty() {
            let room = self.max.saturating_sub(extent.end - extent.start);
            if room == 0 || file.is_none() {
                let kept = file.is_none() || std::fs::rename(&self.path, self.previous()).is_ok();
                *file = create(&self.path).ok();
                extent.oldest = if kept && room == 0 { extent.start } else { extent.end };
                extent.start = extent.end;
            }
            let length =
                usize::try_from(self.max - (extent.end - extent.start)).map_or(bytes.len(), |n| n.min(bytes.len()));
            match file.as_mut().map(|file| file.write(&bytes[..length])) {
                Some(Ok(n @ 1..)) => {
                    extent.end += n as u64;
                    bytes = &bytes[n..];
                }
                Some(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                _ => break,
            }
        }
        self.extent.send_replace(extent);
    }

    /// Nothing will follow.
    pub fn close(&self) {
        self.extent.send_modify(|extent| extent.closed = true);
    }

    /// For readers: what there is, and a wake-up when there is more.
    pub fn subscribe(&self) -> watch::Receiver<Extent> {
        self.extent.subscribe()
    }

    /// Resolves when nobody reads it any more.
    pub async fn unread(&self) {
        self.extent.closed().await;
    }

    /// Reads at a position that lies in `extent`, which must be the current one.
    pub fn read(&self, extent: Extent, at: u64, buffer: &mut [u8]) -> io::Result<usize> {
        if at >= extent.start {
            return File::open(&self.path)?.read_at(buffer, at - extent.start);
        }
        let length = usize::try_from(extent.start - at).map_or(buffer.len(), |n| n.min(buffer.len()));
        File::open(self.previous())?.read_at(&mut buffer[..length], at - extent.oldest)
    }

    fn previous(&self) -> PathBuf {
        let mut path = self.path.clone().into_os_string();
        path.push(".1");
        path.into()
    }
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_all(log: &Log) -> Vec<u8> {
        let extent = *log.subscribe().borrow();
        let (mut at, mut all, mut buffer) = (extent.oldest, Vec::new(), [0; 7]);
        while at < extent.end {
            let n = log.read(extent, at, &mut buffer).unwrap();
            assert!(n > 0);
            all.extend_from_slice(&buffer[..n]);
            at += n as u64;
        }
        all
    }

    #[test]
    fn it_rotates_and_stays_readable() {
        let dir = tempfile::tempdir().unwrap();
        let log = Log::new(dir.path().join("log"), 10);
        assert!(read_all(&log).is_empty());
        log.write(b"0123456");
        assert_eq!(read_all(&log), b"0123456");
        log.write(b"789abc");
        assert_eq!(read_all(&log), b"0123456789abc");
        log.write(b"defghijklmnopqrstuvwxyz");
        assert_eq!(read_all(&log), b"klmnopqrstuvwxyz");
    }
}
