//! A log in a file of limited size, which others read while it is written.
//!
//! A thread of its own writes the file, because a disk that stalls must not stall the shim, which serves everything else of the VM from one
//! thread. The bytes that wait for the disk are bounded; bytes that do not fit are dropped, and the log says how many.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use tokio::sync::{Notify, watch};

/// How many bytes may wait for the disk.
const WAITING: usize = 1 << 20;

/// The part of the log that can be read. Positions count bytes since the log's beginning, also across rotations.
#[derive(Clone, Debug, Default)]
pub struct Extent {
    /// Where the previous file begins; equal to `start` if there is none.
    pub oldest: u64,
    /// Where the current file begins.
    pub start: u64,
    pub end: u64,
    /// No more bytes will follow.
    pub closed: bool,
    /// The previous file, kept open so that a reader finds what it was told of, whatever is rotated meanwhile.
    previous: Option<Arc<File>>,
    current: Option<Arc<File>>,
}

impl Extent {
    /// Reads at a position within the extent.
    pub fn read(&self, at: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let (file, at, length) = if at >= self.start {
            (&self.current, at - self.start, self.end - at)
        } else {
            (&self.previous, at - self.oldest, self.start - at)
        };
        let length = usize::try_from(length).map_or(buffer.len(), |length| length.min(buffer.len()));
        file.as_ref().map_or(Ok(0), |file| file.read_at(&mut buffer[..length], at))
    }
}

/// The log. Writing never fails and never waits: what cannot be written is lost.
pub struct Log {
    queue: Arc<Queue>,
    extent: Arc<watch::Sender<Extent>>,
}

impl Log {
    /// Opens the log and starts its thread.
    ///
    /// # Errors
    /// When no thread can be started. A file that cannot be made is tried again with each write.
    pub fn new(path: PathBuf, max: u64) -> io::Result<Self> {
        let (queue, extent) = (Arc::<Queue>::default(), Arc::<watch::Sender<Extent>>::default());
        let files = Files { current: create(&path).ok(), previous: None, path, max: max.max(1) };
        let (waiting, known) = (Arc::clone(&queue), Arc::clone(&extent));
        std::thread::Builder::new().name("log".into()).spawn(move || write_all(&waiting, files, &known))?;
        Ok(Log { queue, extent })
    }

    /// Appends bytes. At `max` bytes the file is renamed to `<path>.1`, replacing the one before.
    pub fn write(&self, bytes: &[u8]) {
        self.queue.push(bytes);
    }

    /// Appends bytes, and waits for room first. Nothing is dropped. It is for a writer that can be held back.
    pub async fn write_all(&self, bytes: &[u8]) {
        loop {
            // Registered before the check, so that room that is made after it is not missed.
            let room = self.queue.room.notified();
            if self.queue.push_whole(bytes) {
                return;
            }
            room.await;
        }
    }

    /// Closes the log. The extent says `closed` once everything is written.
    pub fn close(&self) {
        self.queue.close();
    }

    /// For readers: the extent, and a wake-up when it grows.
    pub fn subscribe(&self) -> watch::Receiver<Extent> {
        self.extent.subscribe()
    }

    /// Resolves when a closed log is written and no reader is left.
    pub async fn finished(&self) {
        // Waiting cannot fail, because the log itself owns the sender.
        let _ = self.extent.subscribe().wait_for(|extent| extent.closed).await;
        self.extent.closed().await;
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.queue.close();
    }
}

/// The bytes that wait for the disk.
#[derive(Default)]
struct Queue {
    state: Mutex<Waiting>,
    changed: Condvar,
    room: Notify,
}

#[derive(Default)]
struct Waiting {
    bytes: Vec<u8>,
    /// How many bytes came after these and did not fit.
    dropped: u64,
    closed: bool,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, bytes: &[u8]) {
        let mut waiting = self.lock();
        // After a drop everything else is dropped too, so that the note about it stands where the gap is.
        let room = if waiting.dropped > 0 { 0 } else { WAITING - waiting.bytes.len() };
        let (kept, lost) = bytes.split_at(room.min(bytes.len()));
        waiting.bytes.extend_from_slice(kept);
        waiting.dropped += lost.len() as u64;
        self.changed.notify_one();
    }

    /// Appends the bytes if all of them fit, or if nothing waits and they are more than ever fit. Returns whether it did.
    fn push_whole(&self, bytes: &[u8]) -> bool {
        let mut waiting = self.lock();
        let fits = waiting.dropped == 0 && waiting.bytes.len() + bytes.len() <= WAITING.max(bytes.len());
        if fits {
            waiting.bytes.extend_from_slice(bytes);
            self.changed.notify_one();
        }
        fits
    }

    fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_one();
    }

    /// Waits for bytes to write, and exchanges them for `empty`. `None`: no more will follow.
    fn take(&self, empty: Vec<u8>) -> Option<(Vec<u8>, u64)> {
        let waits = |waiting: &mut Waiting| waiting.bytes.is_empty() && waiting.dropped == 0 && !waiting.closed;
        let mut waiting = self.changed.wait_while(self.lock(), waits).unwrap_or_else(PoisonError::into_inner);
        if waiting.bytes.is_empty() && waiting.dropped == 0 {
            return None;
        }
        self.room.notify_waiters();
        Some((std::mem::replace(&mut waiting.bytes, empty), std::mem::take(&mut waiting.dropped)))
    }
}

/// The log's thread.
fn write_all(queue: &Queue, mut files: Files, extent: &watch::Sender<Extent>) {
    let mut at = Extent { current: files.current.clone(), ..Extent::default() };
    extent.send_replace(at.clone());
    let mut empty = Vec::new();
    while let Some((mut bytes, dropped)) = queue.take(empty) {
        files.write(&bytes, &mut at);
        if dropped > 0 {
            let note = format!("\nmachinen: {dropped} bytes are missing here: the disk was too slow for them\n");
            files.write(note.as_bytes(), &mut at);
        }
        extent.send_replace(at.clone());
        bytes.clear();
        empty = bytes;
    }
    at.closed = true;
    extent.send_replace(at);
}

struct Files {
    path: PathBuf,
    max: u64,
    current: Option<Arc<File>>,
    previous: Option<Arc<File>>,
}

impl Files {
    /// Writes the bytes, as far as the disk takes them.
    fn write(&mut self, mut bytes: &[u8], extent: &mut Extent) {
        while !bytes.is_empty() {
            let room = self.max.saturating_sub(extent.end - extent.start);
            if room == 0 || self.current.is_none() {
                self.rotate(extent);
            }
            let room = self.max - (extent.end - extent.start);
            let length = usize::try_from(room).map_or(bytes.len(), |room| room.min(bytes.len()));
            let Some(file) = &self.current else { break };
            match file.as_ref().write(&bytes[..length]) {
                Ok(n @ 1..) => {
                    extent.end += n as u64;
                    bytes = &bytes[n..];
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                _ => break,
            }
        }
        (extent.previous, extent.current) = (self.previous.clone(), self.current.clone());
    }

    fn rotate(&mut self, extent: &mut Extent) {
        let mut previous = self.path.clone().into_os_string();
        previous.push(".1");
        let kept = self.current.take().filter(|_| std::fs::rename(&self.path, previous).is_ok());
        extent.oldest = if kept.is_some() { extent.start } else { extent.end };
        extent.start = extent.end;
        self.previous = kept;
        self.current = create(&self.path).ok();
    }
}

fn create(path: &Path) -> io::Result<Arc<File>> {
    OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(path).map(Arc::new)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_all(extent: &Extent) -> Vec<u8> {
        let (mut at, mut all, mut buffer) = (extent.oldest, Vec::new(), [0; 7]);
        while at < extent.end {
            let n = extent.read(at, &mut buffer).unwrap();
            assert!(n > 0);
            all.extend_from_slice(&buffer[..n]);
            at += n as u64;
        }
        all
    }

    #[test]
    fn it_rotates_and_stays_readable() {
        let dir = tempfile::tempdir().unwrap();
        let mut extent = Extent::default();
        let path = dir.path().join("log");
        let mut files = Files { current: create(&path).ok(), previous: None, path, max: 10 };
        let mut write = |bytes: &[u8]| {
            files.write(bytes, &mut extent);
            extent.clone()
        };
        assert_eq!(read_all(&write(b"0123456")), b"0123456");
        let before = write(b"789abc");
        assert_eq!(read_all(&before), b"0123456789abc");
        assert_eq!(read_all(&write(b"defghijklmnopqrstuvwxyz")), b"klmnopqrstuvwxyz");
        // A reader that got the extent earlier still finds the same bytes.
        assert_eq!(read_all(&before), b"0123456789abc");
    }

    #[test]
    fn what_waits_for_the_disk_is_bounded_and_says_what_is_missing() {
        let queue = Queue::default();
        queue.push(b"begin");
        queue.push(&vec![b'x'; 3 * WAITING]);
        queue.push(b"end");
        let (bytes, dropped) = queue.take(Vec::new()).unwrap();
        assert_eq!((bytes.len(), dropped), (WAITING, (2 * WAITING + 8) as u64));
        queue.push(b"again");
        queue.close();
        assert_eq!(queue.take(Vec::new()), Some((b"again".to_vec(), 0)));
        assert_eq!(queue.take(Vec::new()), None);
    }

    #[tokio::test]
    async fn a_writer_that_waits_loses_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::RWXU).unwrap();
        let log = Log::new(path.clone(), 1 << 40).unwrap();
        let pieces = 64u8;
        let mut reader = OpenOptions::new().read(true).open(&path).unwrap();
        let mut writing = Box::pin(async {
            for piece in 0..pieces {
                log.write_all(&[piece; 65_536]).await;
            }
        });
        let waited = tokio::time::timeout(std::time::Duration::from_millis(200), &mut writing).await;
        assert!(waited.is_err(), "4 MiB do not fit");
        let read = std::thread::spawn(move || {
            let mut text = vec![0; usize::from(pieces) * 65_536];
            io::Read::read_exact(&mut reader, &mut text).unwrap();
            text
        });
        writing.await;
        log.close();
        log.finished().await;
        let text = read.join().unwrap();
        assert!(text.chunks(65_536).zip(0..pieces).all(|(piece, n)| piece == [n; 65_536]));
    }

    /// A disk that takes nothing: a fifo whose reader does not read.
    #[tokio::test]
    async fn a_stalled_disk_stalls_no_writer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::RWXU).unwrap();
        let log = Log::new(path.clone(), 1 << 40).unwrap();
        let mut reader = OpenOptions::new().read(true).open(&path).unwrap();
        // More than a fifo holds, so that the log's thread is within this write from its first byte until the reader goes on. Without that
        // the thread could still take some of the bytes below, and none would be dropped after those.
        let first = vec![b'a'; 1 << 17];
        log.write(&first);
        io::Read::read_exact(&mut reader, &mut [0]).unwrap();
        for _ in 0..64 {
            log.write(&[b'x'; 65_536]);
        }
        log.close();
        // Everything that waited is written once the disk goes on.
        let note = format!("\nmachinen: {} bytes are missing here: the disk was too slow for them\n", 3 * WAITING);
        let length = first.len() - 1 + WAITING + note.len();
        let read = std::thread::spawn(move || {
            let mut text = vec![0; length];
            io::Read::read_exact(&mut reader, &mut text).unwrap();
            text
        });
        log.finished().await;
        let text = read.join().unwrap();
        assert_eq!(text, [&first[1..], &[b'x'; WAITING], note.as_bytes()].concat());
    }
}
