//! What a file is like.

use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Statx, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid};
use rustix::io::Errno;

use crate::abi::{self, Attr, AttrOut, EntryOut, flag, setattr};
use crate::coverage::Valid;
use crate::handle::Handle;
use crate::node::{Node, status};
use crate::privilege;
use crate::reply::{Answer, low, reply};
use crate::request::Request;
use crate::server::Server;

impl Server {
    pub(crate) fn attributes(&self, node: &Node, status: &Statx) -> Attr {
        let (uid, gid) = self.share(node).owners.to_guest((status.stx_uid, status.stx_gid));
        Attr {
            ino: self.inode(status),
            size: status.stx_size,
            blocks: status.stx_blocks,
            atime: status.stx_atime.tv_sec.cast_unsigned(),
            mtime: status.stx_mtime.tv_sec.cast_unsigned(),
            ctime: status.stx_ctime.tv_sec.cast_unsigned(),
            atime_ns: status.stx_atime.tv_nsec,
            mtime_ns: status.stx_mtime.tv_nsec,
            ctime_ns: status.stx_ctime.tv_nsec,
            mode: status.stx_mode.into(),
            nlink: status.stx_nlink,
            uid,
            gid,
            rdev: low(rustix::fs::makedev(status.stx_rdev_major, status.stx_rdev_minor)),
            block_size: status.stx_blksize,
            flags: 0,
        }
    }

    /// How long something is valid, in seconds and nanoseconds.
    fn for_long(&self, valid: bool) -> (u64, u32) {
        if valid && self.pace.has_begun() { (self.valid.as_secs(), self.valid.subsec_nanos()) } else { (0, 0) }
    }

    /// What the guest is told of a file that it has looked up.
    pub(crate) fn entry_out(&self, number: u64, node: &Node, status: &Statx, valid: Valid) -> EntryOut {
        let (name, attributes) = (self.for_long(valid.name), self.for_long(valid.attributes));
        EntryOut {
            node: number,
            generation: 0,
            entry_valid: name.0,
            attr_valid: attributes.0,
            entry_valid_ns: name.1,
            attr_valid_ns: attributes.1,
            attr: self.attributes(node, status),
        }
    }

    /// There is no such name, which the guest may believe.
    pub(crate) fn no_entry(&self) -> EntryOut {
        let (entry_valid, entry_valid_ns) = self.for_long(true);
        EntryOut { entry_valid, entry_valid_ns, ..EntryOut::default() }
    }

    /// The root's attributes never change.
    pub(crate) fn attr_out(&self, attr: Attr, is_valid: bool) -> Answer {
        let (valid, valid_ns) = self.for_long(is_valid);
        reply(AttrOut { valid, valid_ns, attr, ..AttrOut::default() })
    }

    /// What a file is like now, asked of what the guest has open if that is given.
    fn attributes_now(&self, number: u64, node: &Arc<Node>, handle: Option<&Handle>) -> Answer {
        let is_watched = self.coverage.is_watched(number, node);
        let status = handle.map_or_else(|| node.status(), |handle| status(&handle.file))?;
        let is_valid = self.coverage.are_attributes_valid(is_watched, number, node, &status);
        self.attr_out(self.attributes(node, &status), is_valid)
    }

    pub(crate) fn getattr(&self, mut request: Request<'_>) -> Answer {
        let asked: abi::GetattrIn = request.take()?;
        let node = self.node(request.header.node)?;
        let by_handle = asked.flags & flag::GETATTR_HANDLE != 0;
        let handle = if by_handle { Some(self.handle(&request, asked.handle)?) } else { None };
        self.attributes_now(request.header.node, &node, handle.as_deref())
    }

    pub(crate) fn setattr(&self, mut request: Request<'_>) -> Answer {
        let node = self.node(request.header.node)?;
        let set: abi::SetattrIn = request.take()?;
        let by_handle = set.valid & setattr::HANDLE != 0;
        let handle = if by_handle { Some(self.handle(&request, set.handle)?) } else { None };
        self.set_mode(&node, &set)?;
        self.set_owner(&node, &set)?;
        self.set_size(&node, handle.as_deref(), &set)?;
        set_times(&node, &set)?;
        self.attributes_now(request.header.node, &node, handle.as_deref())
    }

    fn set_mode(&self, node: &Node, set: &abi::SetattrIn) -> Result<(), Errno> {
        if set.valid & setattr::MODE == 0 {
            return Ok(());
        }
        // A link has no permissions of its own.
        if node.kind == FileType::Symlink {
            return Err(Errno::OPNOTSUPP);
        }
        let mode = Mode::from_raw_mode(set.mode & 0o7777);
        rustix::fs::chmodat(&self.descriptors, node.number(), mode, AtFlags::empty())
    }

    fn set_owner(&self, node: &Node, set: &abi::SetattrIn) -> Result<(), Errno> {
        if set.valid & (setattr::UID | setattr::GID) == 0 {
            return Ok(());
        }
        let (uid, gid) = self.share(node).owners.to_host((set.uid, set.gid));
        let uid = (set.valid & setattr::UID != 0).then(|| Uid::from_raw(uid));
        let gid = (set.valid & setattr::GID != 0).then(|| Gid::from_raw(gid));
        rustix::fs::chownat(node, c"", uid, gid, AtFlags::EMPTY_PATH)
    }

    fn set_size(&self, node: &Node, handle: Option<&Handle>, set: &abi::SetattrIn) -> Result<(), Errno> {
        if set.valid & setattr::SIZE == 0 {
            return Ok(());
        }
        let truncate = || match handle {
            Some(handle) => rustix::fs::ftruncate(&handle.file, set.size),
            None => rustix::fs::ftruncate(self.reopen(node, OFlags::WRONLY)?, set.size),
        };
        if set.valid & setattr::KILL_SUIDGID != 0 { privilege::without_fsetid(truncate) } else { truncate() }
    }

    pub(crate) fn statfs(&self, request: Request<'_>) -> Answer {
        let found = rustix::fs::fstatvfs(&*self.node(request.header.node)?)?;
        reply(abi::StatfsOut {
            blocks: found.f_blocks,
            free: found.f_bfree,
            available: found.f_bavail,
            files: found.f_files,
            files_free: found.f_ffree,
            block_size: low(found.f_bsize),
            name_len: low(found.f_namemax),
            fragment_size: low(found.f_frsize),
            ..abi::StatfsOut::default()
        })
    }

    pub(crate) fn readlink(&self, request: Request<'_>) -> Answer {
        let target = rustix::fs::readlinkat(&*self.node(request.header.node)?, c"", Vec::new())?;
        Ok(Some(target.into_bytes()))
    }
}

fn set_times(node: &Node, set: &abi::SetattrIn) -> Result<(), Errno> {
    if set.valid & (setattr::ATIME | setattr::MTIME) == 0 {
        return Ok(());
    }
    let time = |bit: u32, now: u32, seconds: u64, ns: u32| Timespec {
        tv_sec: seconds.cast_signed(),
        tv_nsec: match (set.valid & bit != 0, set.valid & now != 0) {
            (false, _) => UTIME_OMIT,
            (true, true) => UTIME_NOW,
            (true, false) => ns.into(),
        },
    };
    let times = Timestamps {
        last_access: time(setattr::ATIME, setattr::ATIME_NOW, set.atime, set.atime_ns),
        last_modification: time(setattr::MTIME, setattr::MTIME_NOW, set.mtime, set.mtime_ns),
    };
    rustix::fs::utimensat(node, c"", &times, AtFlags::EMPTY_PATH)
}
