//! Directories, read by a guest.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::abi;
use crate::directory;
use crate::handle::Handle;
use crate::node::Node;
use crate::reply::{Answer, done, reply};
use crate::request::{MAX_DATA, Request};
use crate::server::Server;

impl Server {
    pub(crate) fn opendir(&self, request: Request<'_>) -> Answer {
        if !self.opens_directories.load(Ordering::Acquire) {
            // From now on the guest's kernel asks no more, and keeps lists of names until a notice or another time of change.
            return Err(Errno::NOSYS);
        }
        let node = self.node(request.header.node)?;
        let file = self.reopen_directory(&node)?;
        reply(self.opened(file, request.header.node, node)?)
    }

    pub(crate) fn reopen_directory(&self, node: &Node) -> Result<OwnedFd, Errno> {
        self.reopen(node, OFlags::RDONLY | OFlags::DIRECTORY)
    }

    /// A directory that the guest has open; for itself alone if that is so.
    fn directory(&self, request: &Request<'_>, handle: u64) -> Result<Arc<Handle>, Errno> {
        if handle != 0 {
            return self.handle(request, handle);
        }
        let node = self.node(request.header.node)?;
        Ok(Handle::new(self.reopen_directory(&node)?, request.header.node, node))
    }

    pub(crate) fn fsyncdir(&self, mut request: Request<'_>) -> Answer {
        let asked: abi::FsyncIn = request.take()?;
        rustix::fs::fsync(&self.directory(&request, asked.handle)?.file)?;
        done()
    }

    pub(crate) fn readdir(&self, mut request: Request<'_>, plus: bool) -> Answer {
        let asked: abi::ReadIn = request.take()?;
        let handle = self.directory(&request, asked.handle)?;
        let node = &handle.node;
        let room = (asked.size as usize).min(MAX_DATA);
        let mut answer = directory::Answer::new(room);
        directory::read(&handle, asked.offset, |mut entry| {
            entry.ino = self.inode_on(node.identity.device, entry.ino);
            if !plus {
                return Ok(answer.add(&entry));
            }
            if !answer.has_room_with_attributes(&entry) {
                return Ok(false);
            }
            let reading = self.coverage.reading(request.header.node, node);
            // `.` and `..` are not looked up, and what is gone meanwhile is told without attributes.
            let found = if entry.is_dots() { None } else { self.find(node, entry.name, reading).ok() };
            Ok(answer.add_with_attributes(&entry, found.unwrap_or_default()))
        })?;
        Ok(Some(answer.bytes))
    }
}
