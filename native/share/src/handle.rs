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

impl Handle {
    fn new(file: OwnedFd, node: u64) -> Arc<Self> {
        Arc::new(Self { file, node, position: Mutex::new(0) })
    }
}

#[derive(Default)]
pub struct Handles {
    /// `None`: it was open in a server before this one, and is no more.
    open: HashMap<u64, Option<Arc<Handle>>>,
    next: u64,
}

impl Handles {
    pub fn get(&self, number: u64) -> Result<Arc<Handle>, Errno> {
        self.open.get(&number).ok_or(Errno::BADF)?.clone().ok_or(Errno::IO)
    }

    pub fn add(&mut self, file: OwnedFd, node: u64) -> Result<u64, Errno> {
        if self.open.len() >= MOST {
            return Err(Errno::NFILE);
        }
        self.next += 1;
        self.open.insert(self.next, Some(Handle::new(file, node)));
        Ok(self.next)
    }

    pub fn remove(&mut self, number: u64) -> Option<Arc<Handle>> {
        self.open.remove(&number).flatten()
    }

    /// What is open, and the last number that was given.
    pub fn list(&self) -> (Vec<(u64, Arc<Handle>)>, u64) {
        let open = self.open.iter().filter_map(|(number, handle)| Some((*number, Arc::clone(handle.as_ref()?))));
        (open.collect(), self.next)
    }

    /// What was open by that number in a server before this one; `None`: it is no more.
    pub fn go_on_with(&mut self, number: u64, node: u64, file: Option<OwnedFd>) -> Result<(), Errno> {
        if self.open.len() >= MOST || self.open.contains_key(&number) {
            return Err(Errno::INVAL);
        }
        self.open.insert(number, file.map(|file| Handle::new(file, node)));
        self.go_on_at(number);
        Ok(())
    }

    /// Numbers up to this one have been given.
    pub fn go_on_at(&mut self, last: u64) {
        self.next = self.next.max(last);
    }
}
