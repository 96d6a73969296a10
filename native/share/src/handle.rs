//! Files and directories that a guest has open.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use rustix::io::Errno;

use crate::abi::LockIn;
use crate::node::Node;

#[derive(Debug)]
pub struct Handle {
    pub file: OwnedFd,
    /// The number by which the guest opened it. The node is not let go while it is open.
    pub number: u64,
    pub node: Arc<Node>,
    /// Where the next entry of a directory is read from; held while entries are read.
    pub position: Mutex<u64>,
    /// The guest's process that has locked it by flock(2); 0: none.
    lock_holder: AtomicU32,
}

impl Handle {
    pub fn new(file: OwnedFd, number: u64, node: Arc<Node>) -> Arc<Self> {
        Arc::new(Self { file, number, node, position: Mutex::new(0), lock_holder: AtomicU32::new(0) })
    }

    /// The lock was taken, or released.
    pub fn locked(&self, lock: &LockIn) {
        let pid = if lock.kind == libc::F_UNLCK.cast_unsigned() { 0 } else { lock.pid.max(1) };
        self.lock_holder.store(pid, Ordering::Relaxed);
    }

    pub fn lock_holder(&self) -> Option<u32> {
        Some(self.lock_holder.load(Ordering::Relaxed)).filter(|pid| *pid != 0)
    }
}

pub struct Handles {
    /// `None`: it was open in a server before this one, and is no more.
    open: HashMap<u64, Option<Arc<Handle>>>,
    /// The last number that was given.
    last: u64,
    most: usize,
}

impl Handles {
    pub fn new(most: usize) -> Self {
        Self { open: HashMap::new(), last: 0, most }
    }

    pub fn get(&self, number: u64) -> Result<Arc<Handle>, Errno> {
        self.open.get(&number).ok_or(Errno::BADF)?.clone().ok_or(Errno::IO)
    }

    /// # Errors
    /// NFILE: the guest has as many as it may.
    pub fn add(&mut self, file: OwnedFd, number: u64, node: Arc<Node>) -> Result<u64, Errno> {
        if self.open.len() >= self.most {
            return Err(Errno::NFILE);
        }
        self.last += 1;
        self.open.insert(self.last, Some(Handle::new(file, number, node)));
        Ok(self.last)
    }

    pub fn all(&self) -> impl Iterator<Item = &Arc<Handle>> {
        self.open.values().flatten()
    }

    pub fn remove(&mut self, number: u64) -> Option<Arc<Handle>> {
        self.open.remove(&number).flatten()
    }

    /// What is open, and the last number that was given.
    pub fn list(&self) -> (Vec<(u64, Arc<Handle>)>, u64) {
        let open = self.open.iter().filter_map(|(number, handle)| Some((*number, Arc::clone(handle.as_ref()?))));
        (open.collect(), self.last)
    }

    /// What was open by that number in a server before this one; `None`: it is no more.
    ///
    /// # Errors
    /// INVAL: the number is taken, or there are too many.
    pub fn go_on_with(&mut self, number: u64, open: Option<(OwnedFd, u64, Arc<Node>)>) -> Result<(), Errno> {
        if self.open.len() >= self.most || self.open.contains_key(&number) {
            return Err(Errno::INVAL);
        }
        self.open.insert(number, open.map(|(file, node_number, node)| Handle::new(file, node_number, node)));
        self.go_on_at(number);
        Ok(())
    }

    /// Numbers up to this one have been given.
    pub fn go_on_at(&mut self, last: u64) {
        self.last = self.last.max(last);
    }
}
