//! A file of a share, held by a descriptor: so it is the same file whatever becomes of its name.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Statx, StatxFlags, makedev, statx};
use rustix::io::Errno;

use crate::trust::Trust;

/// Which file it is, on this host.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Identity {
    /// The share's place: the same file in two shares is two nodes, because what may be done to it depends on the share.
    pub share: usize,
    pub device: u64,
    pub inode: u64,
}

#[derive(Debug)]
pub struct Node {
    /// Opened with O_PATH: it can be neither read nor written, nor does opening it have an effect.
    file: OwnedFd,
    pub identity: Identity,
    pub kind: FileType,
    /// When the file was made, in nanoseconds; 0 where the file system does not know. With the identity it tells a file from a later one that
    /// was given the same inode.
    pub born: u64,
    pub trust: Trust,
}

impl Node {
    /// The file of a share that `file` (O_PATH) is, and what it is like now.
    pub fn new(file: OwnedFd, share: usize) -> Result<(Self, Statx), Errno> {
        let status = status(&file)?;
        let identity =
            Identity { share, device: makedev(status.stx_dev_major, status.stx_dev_minor), inode: status.stx_ino };
        let kind = FileType::from_raw_mode(status.stx_mode.into());
        Ok((Self { file, identity, kind, born: born(&status), trust: Trust::default() }, status))
    }

    pub fn status(&self) -> Result<Statx, Errno> {
        status(&self.file)
    }

    /// Its name among this process's descriptors, in /proc/self/fd.
    pub fn number(&self) -> String {
        self.file.as_raw_fd().to_string()
    }
}

impl AsFd for Node {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

pub fn status(file: impl AsFd) -> Result<Statx, Errno> {
    statx(file, c"", AtFlags::EMPTY_PATH | AtFlags::NO_AUTOMOUNT, StatxFlags::BASIC_STATS | StatxFlags::BTIME)
}

fn born(status: &Statx) -> u64 {
    if !StatxFlags::from_bits_retain(status.stx_mask).contains(StatxFlags::BTIME) {
        return 0;
    }
    let seconds = status.stx_btime.tv_sec.cast_unsigned();
    seconds.wrapping_mul(1_000_000_000).wrapping_add(status.stx_btime.tv_nsec.into())
}
