//! Files and directories that a guest has open.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use rustix::io::Errno;

/// The most a guest may have open at once, in one share.
pub const MOST: usize = 65_536;

#[derive(Debug)]
pub struct Handle {
    pub file: OwnedFd,
    pub node: u64,
    /// Where the next entry of a directory is read from; held while entries are read.
    pub position: Mutex<u64>,
}

#[derive(Default)]
pub struct Handles {
    open: HashMap<u64, Arc<Handle>>,
    next: u64,
}

impl Handles {
    pub fn get(&self, number: u64) -> Result<Arc<Handle>, Errno> {
        self.open.get(&number).cloned().ok_or(Errno::BADF)
    }

    pub fn add(&mut self, file: OwnedFd, node: u64) -> Result<u64, Errno> {
        if self.open.len() >= MOST {
            return Err(Errno::NFILE);
        }
        self.next += 1;
        self.open.insert(self.next, Arc::new(Handle { file, node, position: Mutex::new(0) }));
        Ok(self.next)
    }

    pub fn remove(&mut self, number: u64) -> Option<Arc<Handle>> {
        self.open.remove(&number)
    }
}
