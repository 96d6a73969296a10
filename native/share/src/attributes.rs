//! What a file is like.

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Statx, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid};
use rustix::io::Errno;

use crate::abi::{self, Attr, AttrOut, EntryOut, flag, setattr};
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

    /// What the guest is told of a file that it has looked up. How long that is valid is said here and in `attr_out`.
    pub(crate) fn entry_out(&self, number: u64, node: &Node, status: &Statx) -> Result<EntryOut, Errno> {
        Ok(EntryOut {
            node: number,
            entry_valid: self.valid.as_secs(),
            attr_valid: self.valid.as_secs(),
            entry_valid_ns: self.valid.subsec_nanos(),
            attr_valid_ns: self.valid.subsec_nanos(),
            attr: self.attributes(node, status),
            ..EntryOut::default()
        })
    }

    fn attr_out(&self, node: &Node, status: &Statx) -> Answer {
        let (valid, valid_ns) = (self.valid.as_secs(), self.valid.subsec_nanos());
        reply(AttrOut { valid, valid_ns, attr: self.attributes(node, status), ..AttrOut::default() })
    }

    pub(crate) fn getattr(&self, mut request: Request<'_>) -> Answer {
        let asked: abi::GetattrIn = request.take()?;
        let node = self.node(request.header.node)?;
        let status = if asked.flags & flag::GETATTR_HANDLE != 0 {
            status(&self.handle(&request, asked.handle)?.file)?
        } else {
            node.status()?
        };
        self.attr_out(&node, &status)
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
        let status = handle.map_or_else(|| node.status(), |handle| status(&handle.file))?;
        self.attr_out(&node, &status)
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
