//! Locks of a guest's processes, as locks of this host: so the host's programs and other guests see them.
//!
//! A POSIX lock belongs to a process (fcntl(2)). Here each such owner has an open file description of its own for each file, with that
//! description's locks (F_OFD_SETLK). A lock of flock(2) belongs to the open file, which is the same on both sides.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use crate::abi::{LockIn, LockOut};

/// The most owners that may hold locks at once, in one share.
const MOST: usize = 16_384;

#[derive(Default)]
pub struct Locks {
    /// By file and owner.
    files: Mutex<HashMap<(u64, u64), Arc<OwnedFd>>>,
}

impl Locks {
    fn files(&self) -> MutexGuard<'_, HashMap<(u64, u64), Arc<OwnedFd>>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The description that holds the owner's locks, opened by `open` when there is none.
    fn of(&self, node: u64, owner: u64, open: impl FnOnce() -> Result<OwnedFd, Errno>) -> Result<Arc<OwnedFd>, Errno> {
        let mut files = self.files();
        if let Some(file) = files.get(&(node, owner)) {
            return Ok(Arc::clone(file));
        }
        if files.len() >= MOST {
            return Err(Errno::NOLCK);
        }
        let file = Arc::new(open()?);
        files.insert((node, owner), Arc::clone(&file));
        Ok(file)
    }

    /// What would keep the owner from that lock.
    pub fn test(
        &self,
        node: u64,
        lock: &LockIn,
        open: impl FnOnce() -> Result<OwnedFd, Errno>,
    ) -> Result<LockOut, Errno> {
        let file = self.of(node, lock.owner, open)?;
        let mut found = posix(lock)?;
        fcntl(&file, libc::F_OFD_GETLK, &mut found)?;
        let end = if found.l_len == 0 { u64::MAX >> 1 } else { (found.l_start + found.l_len - 1).cast_unsigned() };
        // Nobody in the guest has that number: the holder is a description of the host's, or another owner's here.
        Ok(LockOut { start: found.l_start.cast_unsigned(), end, kind: kind_of(found.l_type), pid: 0 })
    }

    /// Takes or releases a lock without waiting.
    pub fn set(&self, node: u64, lock: &LockIn, open: impl FnOnce() -> Result<OwnedFd, Errno>) -> Result<(), Errno> {
        if lock.kind == libc::F_UNLCK.cast_unsigned() && !self.files().contains_key(&(node, lock.owner)) {
            return Ok(());
        }
        let file = self.of(node, lock.owner, open)?;
        fcntl(&file, libc::F_OFD_SETLK, &mut posix(lock)?)
    }

    /// The owner has closed the file, by which all its locks on it end.
    pub fn release(&self, node: u64, owner: u64) {
        self.files().remove(&(node, owner));
    }
}

/// flock(2) of an open file, without waiting.
pub fn flock(file: &OwnedFd, lock: &LockIn) -> Result<(), Errno> {
    let operation = match kind(lock)? {
        libc::F_RDLCK => FlockOperation::NonBlockingLockShared,
        libc::F_WRLCK => FlockOperation::NonBlockingLockExclusive,
        _ => FlockOperation::NonBlockingUnlock,
    };
    rustix::fs::flock(file, operation)
}

fn kind(lock: &LockIn) -> Result<libc::c_int, Errno> {
    let kinds = [libc::F_RDLCK, libc::F_WRLCK, libc::F_UNLCK];
    kinds.into_iter().find(|kind| kind.cast_unsigned() == lock.kind).ok_or(Errno::INVAL)
}

fn kind_of(kind: libc::c_short) -> u32 {
    libc::c_int::from(kind).cast_unsigned()
}

fn posix(lock: &LockIn) -> Result<libc::flock, Errno> {
    let start = i64::try_from(lock.start).map_err(|_| Errno::OVERFLOW)?;
    let to_the_end = lock.end >= i64::MAX.cast_unsigned();
    let length = if to_the_end { 0 } else { (lock.end + 1).checked_sub(lock.start).ok_or(Errno::INVAL)? };
    Ok(libc::flock {
        l_type: libc::c_short::try_from(kind(lock)?).map_err(|_| Errno::INVAL)?,
        l_whence: 0,
        l_start: start,
        l_len: i64::try_from(length).map_err(|_| Errno::OVERFLOW)?,
        l_pid: 0,
    })
}

fn fcntl(file: &OwnedFd, command: libc::c_int, lock: &mut libc::flock) -> Result<(), Errno> {
    // SAFETY: the descriptor is open, and the command reads and writes one `struct flock`.
    match unsafe { libc::fcntl(file.as_raw_fd(), command, std::ptr::from_mut(lock)) } {
        0 => Ok(()),
        _ => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)),
    }
}
