//! The end of the machine, and what goes to the host's lifecycle port: a detached main command's output, and the announcement that
//! the end is orderly.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use machinen_channel::{Opener, Stream};
use serde::Serialize;
use tokio::io::AsyncReadExt;
use tokio::sync::watch;

use super::attend;
use super::stream::{Abort, Chunk, FrameWriter};
use crate::frame::Kind;
use crate::system::cgroup;
use crate::system::console::reset;

/// The shim listens there.
const PORT: u32 = 1980;
/// How long the announcement may take to reach the host. One that does not answer must not keep the machine alive.
const ANNOUNCED_WITHIN: Duration = Duration::from_secs(1);
/// How long everything may take to be written; the machine's own disk is written by `FREEZE` in any case.
const SYNCED_WITHIN: Duration = Duration::from_secs(10);
/// `FIFREEZE`, `_IOWR('X', 119, int)`: writes everything out and leaves the filesystem as clean as an unmounted one.
const FREEZE: libc::c_ulong = 0xc004_5877;
/// `FITHAW`, `_IOWR('X', 120, int)`.
const THAW: libc::c_ulong = 0xc004_5878;

/// `FITRIM`, `_IOWR('X', 121, struct fstrim_range)`.
const TRIM: libc::c_ulong = 0xc018_5879;

/// The current session's opener, `None` before the first.
pub type Sessions = watch::Receiver<Option<Opener>>;

/// Knows how to end the machine.
pub struct Lifecycle {
    writable: OwnedFd,
    mounted: Option<OwnedFd>,
    sessions: Sessions,
}

impl Lifecycle {
    pub fn new(writable: OwnedFd, mounted: Option<OwnedFd>, sessions: Sessions) -> Self {
        Self { writable, mounted, sessions }
    }

    /// The filesystem that takes the root's writes.
    pub fn writable(&self) -> &OwnedFd {
        &self.writable
    }

    /// Every filesystem that takes writes.
    fn disks(&self) -> impl Iterator<Item = &OwnedFd> {
        std::iter::once(&self.writable).chain(&self.mounted)
    }

    /// Writes everything to the disks and lets nothing more get there: a copy of them is complete and clean.
    pub async fn freeze_disks(&self) -> io::Result<()> {
        for disk in self.disks() {
            let disk = disk.try_clone()?;
            // On a thread: it takes as long as the disk does.
            tokio::task::spawn_blocking(move || freeze_disk(&disk, FREEZE)).await.map_err(io::Error::other)??;
        }
        Ok(())
    }

    /// Ends that. A disk that is not frozen stays as it is.
    pub fn thaw_disks(&self) {
        for disk in self.disks() {
            let _ = freeze_disk(disk, THAW);
        }
    }

    /// Tells the host which of the disk's blocks hold nothing, so that its file has holes there.
    pub async fn trim_disk(&self) -> io::Result<()> {
        let disk = self.writable.try_clone()?;
        tokio::task::spawn_blocking(move || trim(&disk)).await.map_err(io::Error::other)?
    }

    /// A stream to the lifecycle port, opened when first used.
    pub fn output(&self) -> Output {
        Output { sessions: self.sessions.clone(), stream: None, asked: false }
    }

    /// Ends the machine: kills all commands, announces the end with `result` and waits (not for long) until it is `delivered`, brings
    /// the disk in order.
    pub async fn power_off(&self, output: Output, result: &impl Serialize, delivered: impl Future<Output = ()>) -> ! {
        // Failures are not reported on the way down: the machine ends in any case, and whoever looks at the disk sees for himself.
        let _ = cgroup::kill_workload();
        let announced = async { tokio::join!(output.end(result), delivered) };
        let _ = tokio::time::timeout(ANNOUNCED_WITHIN, announced).await;
        // On a thread: a file system whose server does not answer must not keep the machine alive.
        let _ = tokio::time::timeout(SYNCED_WITHIN, tokio::task::spawn_blocking(rustix::fs::sync)).await;
        let _ = freeze_disk(&self.writable, FREEZE);
        reset()
    }
}

/// `struct fstrim_range` (linux/fs.h): all of it.
#[repr(C)]
struct TrimRange {
    start: u64,
    length: u64,
    shortest: u64,
}

fn trim(disk: &OwnedFd) -> io::Result<()> {
    // Blocks are free once the journal says so.
    rustix::fs::syncfs(disk)?;
    let mut range = TrimRange { start: 0, length: u64::MAX, shortest: 0 };
    // SAFETY: the descriptor is open; the kernel reads and writes the structure, which outlives the call.
    if unsafe { libc::ioctl(disk.as_raw_fd(), TRIM, &raw mut range) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn freeze_disk(disk: &OwnedFd, request: libc::c_ulong) -> io::Result<()> {
    // SAFETY: the descriptor is open; the argument is not looked at.
    if unsafe { libc::ioctl(disk.as_raw_fd(), request, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Frames for the lifecycle port. A new host after a restore gets a new stream, which begins with the frame the old one did not
/// take; between two hosts the frame waits. A host that refuses gets nothing.
pub struct Output {
    sessions: Sessions,
    stream: Option<FrameWriter<Stream>>,
    /// The current session has been tried.
    asked: bool,
}

impl Output {
    /// The stream of the current session, if its host wants one.
    async fn stream(&mut self) -> Option<&mut FrameWriter<Stream>> {
        let up = |session: &Option<Opener>| session.as_ref().is_some_and(Opener::is_connected);
        while self.stream.is_none() {
            let same = !self.sessions.has_changed().unwrap_or(false) && up(&self.sessions.borrow());
            if self.asked && same {
                return None;
            }
            self.asked = true;
            let opener = self.sessions.wait_for(up).await.ok()?.clone()?;
            self.stream = opener.open_urgent(PORT).await.ok().map(FrameWriter::new);
        }
        self.stream.as_mut()
    }

    /// Sends the last frame and waits until the host has closed the stream, so that it is known to have arrived.
    async fn end(mut self, result: &impl Serialize) {
        let Some(stream) = self.stream().await else { return };
        if stream.send_json(Kind::End, result).await.is_err() {
            return;
        }
        stream.finish().await;
        if let Some(stream) = self.stream.take() {
            let mut stream = stream.into_inner();
            while matches!(stream.read(&mut [0; 64]).await, Ok(1..)) {}
        }
    }
}

impl attend::Output for Output {
    async fn send_chunk(&mut self, chunk: &mut Chunk, kind: Kind, length: usize) -> Result<(), Abort> {
        while let Some(stream) = self.stream().await {
            if stream.send_chunk(chunk, kind, length).await.is_ok() {
                break;
            }
            self.stream = None;
        }
        Ok(())
    }
}
