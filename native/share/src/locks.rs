//! Locks, asked for by a guest.

use std::os::fd::OwnedFd;

use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::abi::{self, flag};
use crate::lock;
use crate::reply::{Answer, done, reply};
use crate::request::Request;
use crate::server::Server;

impl Server {
    /// A description for an owner's locks: writable where that can be, because a lock for writing needs it.
    pub(crate) fn lockable(&self, node: u64) -> Result<OwnedFd, Errno> {
        let node = self.node(node)?;
        if self.share(&node).read_only {
            return self.reopen(&node, OFlags::RDONLY);
        }
        self.reopen(&node, OFlags::RDWR).or_else(|_| self.reopen(&node, OFlags::RDONLY))
    }

    pub(crate) fn test_lock(&self, mut request: Request<'_>) -> Answer {
        let asked: abi::LockIn = request.take()?;
        let node = request.header.node;
        reply(self.locks.test(node, &asked, || self.lockable(node))?)
    }

    pub(crate) fn set_lock(&self, mut request: Request<'_>) -> Answer {
        let asked: abi::LockIn = request.take()?;
        let node = request.header.node;
        if asked.flags & flag::LOCK_FLOCK != 0 {
            lock::flock(&self.handle(&request, asked.handle)?.file, &asked)?;
        } else {
            self.locks.set(node, &asked, || self.lockable(node))?;
        }
        done()
    }
}
