//! Locks of a guest's processes, as locks of this host: so the host's programs and other guests see them.
//!
//! A POSIX lock belongs to a process (fcntl(2)). Here each such owner has an open file description of its own for each file, with that
//! description's locks (F_OFD_SETLK). A lock of flock(2) belongs to the open file, which is the same on both sides.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use crate::abi::{LockIn, LockOut};
use crate::ranges::Ranges;
use crate::reply::last_errno;

/// The most ranges that are locked at once. The host's kernel has no bound of its own; it takes 200 bytes for each and
/// walks through a file's one by one. This process takes 24 bytes.
const MOST_RANGES: usize = 4096;
/// The last byte that a file can have.
const LAST: u64 = i64::MAX.cast_unsigned();

struct Owner {
    file: Arc<OwnedFd>,
    ranges: Ranges,
    /// The guest's process.
    pid: u32,
}

#[derive(Default)]
struct State {
    /// By file and owner.
    owners: HashMap<(u64, u64), Owner>,
    /// Of all owners together.
    ranges: usize,
}

pub struct Locks {
    state: Mutex<State>,
    most: usize,
}

/// A lock that a guest's process has.
#[derive(Debug, Eq, PartialEq)]
pub struct Held {
    pub node: u64,
    pub pid: u32,
}

impl Locks {
    pub fn new(most: usize) -> Self {
        Self { state: Mutex::default(), most }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The description that holds the owner's locks on the file.
    ///
    /// # Errors
    /// BADF: there is none, or no more.
    pub fn description(&self, node: u64, owner: u64) -> Result<Arc<OwnedFd>, Errno> {
        self.state().owners.get(&(node, owner)).map(|owner| Arc::clone(&owner.file)).ok_or(Errno::BADF)
    }

    /// Makes a description for the owner's locks by `open`, when there is none.
    ///
    /// # Errors
    /// NOLCK: there are as many owners as may be; those of `open`.
    pub fn admit(&self, node: u64, lock: &LockIn, open: impl FnOnce() -> Result<OwnedFd, Errno>) -> Result<(), Errno> {
        let mut state = self.state();
        if state.owners.contains_key(&(node, lock.owner)) {
            return Ok(());
        }
        if state.owners.len() >= self.most {
            return Err(Errno::NOLCK);
        }
        let owner = Owner { file: Arc::new(open()?), ranges: Ranges::default(), pid: lock.pid };
        state.owners.insert((node, lock.owner), owner);
        Ok(())
    }

    /// What would keep the owner from that lock.
    ///
    /// # Errors
    /// Those of fcntl(2).
    pub fn test(&self, node: u64, lock: &LockIn) -> Result<LockOut, Errno> {
        let mut found = posix(lock)?;
        fcntl(self.description(node, lock.owner)?.as_raw_fd(), libc::F_OFD_GETLK, &mut found)?;
        let end = if found.l_len == 0 { LAST } else { (found.l_start + found.l_len - 1).cast_unsigned() };
        // No process of the guest has the pid 0: the holder is a description of the host's, or another owner's here.
        Ok(LockOut { start: found.l_start.cast_unsigned(), end, kind: kind_of(found.l_type), pid: 0 })
    }

    /// Takes or releases a lock without waiting.
    ///
    /// # Errors
    /// Those of fcntl(2); BADF: the owner has closed the file, or was never admitted.
    pub fn set(&self, node: u64, lock: &LockIn) -> Result<(), Errno> {
        let mut wanted = posix(lock)?;
        let exclusive = match kind(lock)? {
            libc::F_RDLCK => Some(false),
            libc::F_WRLCK => Some(true),
            _ => None,
        };
        let (start, end) = (lock.start, lock.end.min(LAST));
        let mut state = self.state();
        let all = state.ranges;
        let owner = state.owners.get_mut(&(node, lock.owner)).ok_or(Errno::BADF)?;
        let before = owner.ranges.len();
        let after = owner.ranges.len_after(start, end, exclusive);
        if after > before && all + (after - before) > MOST_RANGES {
            return Err(Errno::NOLCK);
        }
        // Within the mutex, so that what is kept here is what the kernel has.
        fcntl(owner.file.as_raw_fd(), libc::F_OFD_SETLK, &mut wanted)?;
        owner.pid = lock.pid;
        owner.ranges.set(start, end, exclusive);
        state.ranges = all - before + owner.ranges.len();
        Ok(())
    }

    /// The owner has closed the file, by which all its locks on it end.
    pub fn release(&self, node: u64, owner: u64) {
        let mut state = self.state();
        if let Some(owner) = state.owners.remove(&(node, owner)) {
            state.ranges -= owner.ranges.len();
        }
    }

    /// POSIX locks that are held now.
    pub fn held(&self) -> Vec<Held> {
        let state = self.state();
        let holders = state.owners.iter().filter(|(_, owner)| owner.ranges.len() > 0);
        holders.map(|((node, _), owner)| Held { node: *node, pid: owner.pid }).collect()
    }
}

/// Waits for a POSIX lock of a description, which then has it.
///
/// # Errors
/// Those of fcntl(2): INTR, or BADF when the descriptor is taken away.
pub fn wait(file: RawFd, lock: &LockIn) -> Result<(), Errno> {
    fcntl(file, libc::F_OFD_SETLKW, &mut posix(lock)?)
}

/// flock(2) of an open file, without waiting.
///
/// # Errors
/// Those of flock(2).
pub fn flock(file: &OwnedFd, lock: &LockIn) -> Result<(), Errno> {
    let operation = match kind(lock)? {
        libc::F_RDLCK => FlockOperation::NonBlockingLockShared,
        libc::F_WRLCK => FlockOperation::NonBlockingLockExclusive,
        _ => FlockOperation::NonBlockingUnlock,
    };
    rustix::fs::flock(file, operation)
}

/// flock(2) of an open file, waiting.
///
/// # Errors
/// As of `wait`.
pub fn wait_flock(file: RawFd, lock: &LockIn) -> Result<(), Errno> {
    let operation = if is_exclusive(lock) { libc::LOCK_EX } else { libc::LOCK_SH };
    // SAFETY: plain numbers; a descriptor that is no more is an error.
    if unsafe { libc::flock(file, operation) } == 0 { Ok(()) } else { Err(last_errno()) }
}

fn is_exclusive(lock: &LockIn) -> bool {
    lock.kind == libc::F_WRLCK.cast_unsigned()
}

pub fn is_unlock(lock: &LockIn) -> bool {
    lock.kind == libc::F_UNLCK.cast_unsigned()
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
    let length = if lock.end >= LAST { 0 } else { (lock.end + 1).checked_sub(lock.start).ok_or(Errno::INVAL)? };
    if lock.end < lock.start {
        return Err(Errno::INVAL);
    }
    Ok(libc::flock {
        l_type: libc::c_short::try_from(kind(lock)?).map_err(|_| Errno::INVAL)?,
        l_whence: 0,
        l_start: start,
        l_len: i64::try_from(length).map_err(|_| Errno::OVERFLOW)?,
        l_pid: 0,
    })
}

fn fcntl(file: RawFd, command: libc::c_int, lock: &mut libc::flock) -> Result<(), Errno> {
    // SAFETY: the command reads and writes one `struct flock`; a descriptor that is no more is an error.
    match unsafe { libc::fcntl(file, command, std::ptr::from_mut(lock)) } {
        0 => Ok(()),
        _ => Err(last_errno()),
    }
}
