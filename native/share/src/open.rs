//! Opening files, and their ends.

use std::ffi::CStr;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{FileType, Mode, OFlags, openat};
use rustix::io::Errno;

use crate::abi::{self, OpenOut, flag};
use crate::coverage::Reading;
use crate::node::{Node, status};
use crate::privilege;
use crate::reply::{Answer, done, last_errno, reply};
use crate::request::Request;
use crate::server::Server;

impl Server {
    /// Opens a file that is held, whatever its name is.
    pub(crate) fn reopen(&self, node: &Node, flags: OFlags) -> Result<OwnedFd, Errno> {
        // Opening anything else could wait for ever, or do what a device does.
        if !matches!(node.kind, FileType::RegularFile | FileType::Directory) {
            return Err(Errno::NXIO);
        }
        openat(&self.descriptors, node.number(), flags | OFlags::CLOEXEC, Mode::empty())
    }

    pub(crate) fn opened(&self, file: OwnedFd, number: u64, node: Arc<Node>) -> Result<OpenOut, Errno> {
        Ok(OpenOut { handle: self.handles().add(file, number, node)?, open_flags: 0, backing: 0 })
    }

    pub(crate) fn open(&self, mut request: Request<'_>) -> Answer {
        let asked: abi::OpenIn = request.take()?;
        let flags = open_flags(asked.flags);
        let node = self.node(request.header.node)?;
        if self.share(&node).read_only && flags.intersects(OFlags::WRONLY | OFlags::RDWR | OFlags::TRUNC) {
            return Err(Errno::ROFS);
        }
        if node.kind == FileType::Directory {
            return Err(Errno::ISDIR);
        }
        let open = || self.reopen(&node, flags);
        let file =
            if asked.open_flags & flag::OPEN_KILL_SUIDGID != 0 { privilege::without_fsetid(open)? } else { open()? };
        if flags.contains(OFlags::TRUNC) {
            node.trust.set_told(0);
        }
        let keep = self.coverage.opened(request.header.node, &node, &status(&file)?);
        let open_flags = if keep { flag::OPENED_KEEP_CACHE } else { 0 };
        reply(OpenOut { open_flags, ..self.opened(file, request.header.node, node)? })
    }

    pub(crate) fn create(&self, mut request: Request<'_>) -> Answer {
        let parent = self.node(request.header.node)?;
        let asked: abi::CreateIn = request.take()?;
        let name = request.name()?;
        // Not blocking: what has that name already may be a fifo.
        let flags = open_flags(asked.flags) | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let flags = flags | OFlags::from_bits_retain(asked.flags) & OFlags::EXCL;
        let mode = Mode::from_raw_mode(asked.mode & 0o7777);
        let reading = self.coverage.reading(request.header.node, &parent);
        let file = self.making(&parent, &request, asked.umask, || openat(&*parent, name, flags, mode))?;
        self.created(file, &parent, reading, name)
    }

    pub(crate) fn temporary(&self, mut request: Request<'_>) -> Answer {
        let parent = self.node(request.header.node)?;
        let asked: abi::CreateIn = request.take()?;
        let flags = OFlags::TMPFILE | open_flags(asked.flags) | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(asked.mode & 0o7777);
        let file =
            self.making(&parent, &request, asked.umask, || openat(&self.descriptors, parent.number(), flags, mode))?;
        self.created(file, &parent, None, c"")
    }

    fn created(&self, file: OwnedFd, parent: &Node, reading: Option<Reading>, name: &CStr) -> Answer {
        if FileType::from_raw_mode(status(&file)?.stx_mode.into()) != FileType::RegularFile {
            return Err(Errno::NXIO);
        }
        rustix::fs::fcntl_setfl(&file, rustix::fs::fcntl_getfl(&file)? - OFlags::NONBLOCK)?;
        // The file itself, not what has its name by now.
        let path = OFlags::PATH | OFlags::CLOEXEC;
        let path = openat(&self.descriptors, file.as_raw_fd().to_string(), path, Mode::empty())?;
        let (entry, node) = self.told(path, parent.identity.share, reading, name)?;
        let open = self.opened(file, entry.node, node).inspect_err(|_| self.forget_one(entry.node, 1))?;
        reply(abi::CreateOut { entry, open })
    }

    pub(crate) fn flush(&self, mut request: Request<'_>) -> Answer {
        let asked: abi::FlushIn = request.take()?;
        let handle = self.handle(&request, asked.handle)?;
        self.locks.release(handle.number, asked.lock_owner);
        // Some file systems say only at a close that something was not written (NFS, quotas).
        let copy = rustix::io::fcntl_dupfd_cloexec(&handle.file, 0)?;
        // SAFETY: the copy's number was given up just now, and no other code knows it.
        if unsafe { libc::close(copy.into_raw_fd()) } != 0 {
            return Err(last_errno());
        }
        done()
    }

    pub(crate) fn release(&self, mut request: Request<'_>) -> Answer {
        let asked: abi::ReleaseIn = request.take()?;
        // A lock of flock(2) ends with the last reference to it.
        self.handles().remove(asked.handle);
        done()
    }
}

/// What of the flags of a guest's open(2) is for the host's. Direct I/O would want aligned buffers here.
fn open_flags(flags: u32) -> OFlags {
    let allowed = OFlags::WRONLY | OFlags::RDWR | OFlags::APPEND | OFlags::TRUNC | OFlags::DSYNC | OFlags::SYNC;
    OFlags::from_bits_retain(flags) & allowed
}
