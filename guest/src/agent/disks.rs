//! The disks that take writes. They are made complete and clean before they are copied and before the machine ends.

use std::io;
use std::os::fd::OwnedFd;

use rustix::ioctl::{self, NoArg, Opcode, Updater, opcode};

/// `FIFREEZE`: writes everything out and leaves the filesystem as clean as an unmounted one.
const FREEZE: Opcode = opcode::read_write::<i32>(b'X', 119);
/// `FITHAW`.
const THAW: Opcode = opcode::read_write::<i32>(b'X', 120);
/// `FITRIM`.
const TRIM: Opcode = opcode::read_write::<TrimRange>(b'X', 121);

/// A directory of each filesystem that takes writes.
pub struct Disks {
    /// A directory of the file system that takes the root's writes.
    writable: OwnedFd,
    /// A directory of the file system that takes the writes to a copied host directory.
    mounted: Option<OwnedFd>,
}

impl Disks {
    pub fn new(writable: OwnedFd, mounted: Option<OwnedFd>) -> Self {
        Self { writable, mounted }
    }

    /// The filesystem that takes the root's writes.
    pub fn writable(&self) -> &OwnedFd {
        &self.writable
    }

    /// Every filesystem that takes writes.
    fn all(&self) -> impl Iterator<Item = &OwnedFd> {
        std::iter::once(&self.writable).chain(&self.mounted)
    }

    /// Writes everything to the disks and holds up further writes, so that a copy of the disks is complete and clean.
    pub async fn freeze(&self) -> io::Result<()> {
        for disk in self.all() {
            let disk = disk.try_clone()?;
            // On a thread, because the agent must not wait for a slow disk.
            tokio::task::spawn_blocking(move || freeze(&disk)).await.map_err(io::Error::other)??;
        }
        Ok(())
    }

    /// Lets writes go on. A disk that is not frozen stays as it is.
    pub fn thaw(&self) {
        for disk in self.all() {
            let _ = thaw(disk);
        }
    }

    /// Tells the host which of the disk's blocks hold nothing, so that its file has holes there.
    pub async fn trim(&self) -> io::Result<()> {
        let disk = self.writable.try_clone()?;
        tokio::task::spawn_blocking(move || trim(&disk)).await.map_err(io::Error::other)?
    }

    /// Leaves the root's disk as clean as an unmounted one, at the end of the machine. A failure is not reported, because the host has
    /// been told the end already; it shows in the disk.
    pub fn freeze_root(&self) {
        let _ = freeze(&self.writable);
    }
}

/// `struct fstrim_range` (linux/fs.h). A `length` of `u64::MAX` is the whole disk.
#[repr(C)]
struct TrimRange {
    start: u64,
    length: u64,
    shortest: u64,
}

fn trim(disk: &OwnedFd) -> io::Result<()> {
    // Blocks of removed files are free only once the journal is written.
    rustix::fs::syncfs(disk)?;
    let mut range = TrimRange { start: 0, length: u64::MAX, shortest: 0 };
    // SAFETY: the structure has the layout of `struct fstrim_range`, which the kernel reads and writes, and outlives the call.
    Ok(unsafe { ioctl::ioctl(disk, Updater::<TRIM, TrimRange>::new(&mut range)) }?)
}

fn freeze(disk: &OwnedFd) -> io::Result<()> {
    // SAFETY: the kernel does not look at the argument.
    Ok(unsafe { ioctl::ioctl(disk, NoArg::<FREEZE>::new()) }?)
}

fn thaw(disk: &OwnedFd) -> io::Result<()> {
    // SAFETY: the kernel does not look at the argument.
    Ok(unsafe { ioctl::ioctl(disk, NoArg::<THAW>::new()) }?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_requests_are_those_of_linux() {
        assert_eq!((FREEZE, THAW, TRIM), (0xc004_5877, 0xc004_5878, 0xc018_5879));
    }
}
