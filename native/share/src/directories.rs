//! Directories, read by a guest.

use rustix::fs::OFlags;

use crate::abi;
use crate::directory;
use crate::reply::{Answer, reply};
use crate::request::{MAX_DATA, Request};
use crate::server::Server;

impl Server {
    pub(crate) fn opendir(&self, request: Request<'_>) -> Answer {
        let node = self.node(request.header.node)?;
        let file = self.reopen(&node, OFlags::RDONLY | OFlags::DIRECTORY)?;
        reply(self.opened(file, request.header.node, node)?)
    }

    pub(crate) fn readdir(&self, mut request: Request<'_>, plus: bool) -> Answer {
        let asked: abi::ReadIn = request.take()?;
        let handle = self.handle(&request, asked.handle)?;
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
            // `.` and `..` are not looked up, and what is gone meanwhile is told without attributes.
            let found = if entry.is_dots() { None } else { self.find(node, entry.name).ok() };
            Ok(answer.add_with_attributes(&entry, found.unwrap_or_default()))
        })?;
        Ok(Some(answer.bytes))
    }
}
