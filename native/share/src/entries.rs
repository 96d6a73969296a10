//! Names in directories: looked up, made, moved and removed.

use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags, openat};
use rustix::io::Errno;

use crate::abi::{self, EntryOut, opcode};
use crate::coverage::{Coverage, Reading};
use crate::node::Node;
use crate::owner::Maker;
use crate::reply::{Answer, done, reply};
use crate::request::Request;
use crate::server::Server;

impl Server {
    /// Tells the guest of a file (O_PATH) of the share, which has that name in the directory that is being read.
    pub(crate) fn told(
        &self,
        file: OwnedFd,
        share: usize,
        reading: Option<Reading>,
        name: &CStr,
    ) -> Result<(EntryOut, Arc<Node>), Errno> {
        let (node, mut status) = Node::new(file, share)?;
        let (told, released) = {
            let mut nodes = self.nodes();
            (nodes.tell(node), nodes.released())
        };
        released.iter().for_each(|(number, node)| self.coverage.let_go(*number, node));
        let (number, node) = told?;
        if Coverage::needs_mark(&node, &status, reading) && self.coverage.mark(number, &node) {
            status = node.status()?;
        }
        let valid = self.coverage.tell(reading, name.to_bytes(), number, &node, &status);
        Ok((self.entry_out(number, &node, &status, valid), node))
    }

    /// The file of that name, which is not followed if it is a link.
    pub(crate) fn find(&self, parent: &Node, name: &CStr, reading: Option<Reading>) -> Result<EntryOut, Errno> {
        let file = openat(parent, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
        Ok(self.told(file, parent.identity.share, reading, name)?.0)
    }

    pub(crate) fn lookup(&self, mut request: Request<'_>) -> Answer {
        let parent = self.node(request.header.node)?;
        let reading = self.coverage.reading(request.header.node, &parent);
        match self.find(&parent, request.name()?, reading) {
            Err(Errno::NOENT) if self.coverage.is_absence_valid(reading) => reply(self.no_entry()),
            found => reply(found?),
        }
    }

    pub(crate) fn forget(&self, mut request: Request<'_>) -> Answer {
        let forgotten: abi::ForgetIn = request.take()?;
        self.forget_one(request.header.node, forgotten.lookups);
        Ok(None)
    }

    pub(crate) fn forget_many(&self, mut request: Request<'_>) -> Answer {
        let many: abi::BatchForgetIn = request.take()?;
        for _ in 0..many.count {
            let Ok(one) = request.take::<abi::ForgetOne>() else { break };
            self.forget_one(one.node, one.lookups);
        }
        Ok(None)
    }

    pub(crate) fn forget_one(&self, number: u64, lookups: u64) {
        let (is_forgotten, node) = self.nodes().forget(number, lookups);
        if is_forgotten {
            self.coverage.forgotten(number, node.as_deref());
        }
    }

    /// Makes something in a directory as the user who asked for it.
    pub(crate) fn making<T>(
        &self,
        parent: &Node,
        request: &Request<'_>,
        umask: u32,
        make: impl FnOnce() -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let owner = self.share(parent).owners.to_host((request.header.uid, request.header.gid));
        let maker = Maker::new(owner, umask)?;
        let made = make();
        drop(maker);
        made
    }

    pub(crate) fn symlink(&self, mut request: Request<'_>) -> Answer {
        let parent = self.node(request.header.node)?;
        let (name, target) = (request.name()?, request.text()?);
        let reading = self.coverage.reading(request.header.node, &parent);
        self.making(&parent, &request, 0, || rustix::fs::symlinkat(target, &*parent, name))?;
        reply(self.find(&parent, name, reading)?)
    }

    pub(crate) fn mknod(&self, mut request: Request<'_>) -> Answer {
        let parent = self.node(request.header.node)?;
        let asked: abi::MknodIn = request.take()?;
        let name = request.name()?;
        let kind = FileType::from_raw_mode(asked.mode);
        // A device would be this host's.
        if !matches!(kind, FileType::RegularFile | FileType::Fifo | FileType::Socket) {
            return Err(Errno::PERM);
        }
        let mode = Mode::from_raw_mode(asked.mode & 0o7777);
        let reading = self.coverage.reading(request.header.node, &parent);
        self.making(&parent, &request, asked.umask, || rustix::fs::mknodat(&*parent, name, kind, mode, 0))?;
        reply(self.find(&parent, name, reading)?)
    }

    pub(crate) fn mkdir(&self, mut request: Request<'_>) -> Answer {
        let parent = self.node(request.header.node)?;
        let asked: abi::MkdirIn = request.take()?;
        let name = request.name()?;
        let mode = Mode::from_raw_mode(asked.mode & 0o7777);
        let reading = self.coverage.reading(request.header.node, &parent);
        self.making(&parent, &request, asked.umask, || rustix::fs::mkdirat(&*parent, name, mode))?;
        reply(self.find(&parent, name, reading)?)
    }

    pub(crate) fn unlink(&self, mut request: Request<'_>, flags: AtFlags) -> Answer {
        let name = request.name()?;
        rustix::fs::unlinkat(&*self.node(request.header.node)?, name, flags)?;
        self.coverage.removed(request.header.node, name.to_bytes());
        done()
    }

    pub(crate) fn rename(&self, mut request: Request<'_>) -> Answer {
        let parent = self.node(request.header.node)?;
        let (new_number, flags) = if request.header.opcode == opcode::RENAME2 {
            let asked: abi::Rename2In = request.take()?;
            (asked.new_parent, RenameFlags::from_bits(asked.flags).ok_or(Errno::INVAL)?)
        } else {
            (request.take::<abi::RenameIn>()?.new_parent, RenameFlags::empty())
        };
        if flags.contains(RenameFlags::WHITEOUT) {
            return Err(Errno::INVAL);
        }
        let new_parent = self.node(new_number)?;
        same_share(&parent, &new_parent)?;
        let (name, new_name) = (request.name()?, request.name()?);
        let reading = self.coverage.reading(new_number, &new_parent);
        rustix::fs::renameat_with(&*parent, name, &*new_parent, new_name, flags)?;
        let (from, to) = ((request.header.node, name.to_bytes()), (new_number, new_name.to_bytes()));
        self.coverage.renamed(from, to, reading, flags.contains(RenameFlags::EXCHANGE));
        done()
    }

    pub(crate) fn link(&self, mut request: Request<'_>) -> Answer {
        let parent = self.node(request.header.node)?;
        let node = self.node(request.take::<abi::LinkIn>()?.node)?;
        same_share(&node, &parent)?;
        let name = request.name()?;
        let reading = self.coverage.reading(request.header.node, &parent);
        rustix::fs::linkat(&self.descriptors, node.number(), &*parent, name, AtFlags::SYMLINK_FOLLOW)?;
        reply(self.find(&parent, name, reading)?)
    }
}

/// Two shares are two file systems to the guest, and what is read-only in one must not become writable through another.
fn same_share(one: &Node, other: &Node) -> Result<(), Errno> {
    if one.identity.share == other.identity.share { Ok(()) } else { Err(Errno::XDEV) }
}
