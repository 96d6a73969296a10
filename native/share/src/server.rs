//! Serves one directory to one guest: each request of the FUSE protocol is answered by what the host's own file system does.

use std::ffi::CStr;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::fs::{
    AtFlags, FallocateFlags, FileType, Gid, Mode, OFlags, RenameFlags, Statx, Timespec, Timestamps, Uid, UTIME_NOW, UTIME_OMIT,
    XattrFlags, openat,
};
use rustix::io::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::abi::{self, Attr, AttrOut, EntryOut, OpenOut, OutHeader, flag, init, opcode, setattr};
use crate::directory;
use crate::handle::{Handle, Handles};
use crate::lock::{self, Locks};
use crate::node::{Node, Nodes, status};
use crate::owner::{Maker, Owners};
use crate::privilege;
use crate::request::{MAX_DATA, Request};

/// What this server can do, of what the guest's kernel offers.
const WANTED: u64 = init::ASYNC_READ
    | init::POSIX_LOCKS
    | init::ATOMIC_O_TRUNC
    | init::BIG_WRITES
    | init::DONT_MASK
    | init::FLOCK_LOCKS
    | init::AUTO_INVAL_DATA
    | init::DO_READDIRPLUS
    | init::READDIRPLUS_AUTO
    | init::ASYNC_DIO
    | init::PARALLEL_DIROPS
    | init::POSIX_ACL
    | init::MAX_PAGES
    | init::HANDLE_KILLPRIV_V2
    | init::INIT_EXT;

#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub read_only: bool,
    pub owners: Owners,
    /// How long the guest may believe what it was told of names and attributes.
    pub valid: Duration,
}

pub struct Server {
    options: Options,
    nodes: Mutex<Nodes>,
    handles: Mutex<Handles>,
    locks: Locks,
    /// /proc/self/fd, where a file that is held can be opened anew whatever its name is by now.
    descriptors: OwnedFd,
    started: AtomicBool,
}

type Answer = Result<Option<Vec<u8>>, Errno>;

impl Server {
    /// Serves what is at `path`: a directory, or one file.
    pub fn new(path: &Path, options: Options) -> Result<Self, Errno> {
        let root = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        let directory = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self {
            options,
            nodes: Mutex::new(Nodes::new(Node::new(root)?.0)),
            handles: Mutex::default(),
            locks: Locks::default(),
            descriptors: rustix::fs::open("/proc/self/fd", directory, Mode::empty())?,
            started: AtomicBool::new(false),
        })
    }

    /// The answer to a request, a whole message, unless it wants none. The thread must have been prepared (`prepare_thread`).
    pub fn answer(&self, bytes: &[u8]) -> Option<Vec<u8>> {
        let unique = abi::InHeader::read_from_prefix(bytes).map_or(0, |(header, _)| header.unique);
        let answered = Request::new(bytes).and_then(|request| self.serve(request));
        match answered {
            Ok(body) => body.map(|body| message(unique, 0, body)),
            Err(errno) => Some(message(unique, -errno.raw_os_error(), Vec::new())),
        }
    }

    fn serve(&self, request: Request<'_>) -> Answer {
        let asked = request.header.opcode;
        if asked == opcode::INIT {
            return self.init(request);
        }
        if !self.started.load(Ordering::Acquire) {
            return Err(Errno::PROTO);
        }
        match asked {
            opcode::LOOKUP => self.lookup(request),
            opcode::FORGET => self.forget(request),
            opcode::BATCH_FORGET => self.forget_many(request),
            opcode::GETATTR => self.getattr(request),
            opcode::READLINK => self.readlink(request),
            opcode::OPEN => self.open(request),
            opcode::READ => self.read(request),
            opcode::FLUSH => self.flush(request),
            opcode::RELEASE | opcode::RELEASEDIR => self.release(request),
            opcode::FSYNC | opcode::FSYNCDIR => self.fsync(request),
            opcode::OPENDIR => self.opendir(request),
            opcode::READDIR => self.readdir(request, false),
            opcode::READDIRPLUS => self.readdir(request, true),
            opcode::STATFS => self.statfs(request),
            opcode::GETXATTR => self.getxattr(request),
            opcode::LISTXATTR => self.listxattr(request),
            opcode::LSEEK => self.seek(request),
            opcode::GETLK => self.test_lock(request),
            opcode::SETLK | opcode::SETLKW => self.set_lock(request),
            opcode::SYNCFS => self.syncfs(request),
            opcode::DESTROY | opcode::INTERRUPT => Ok(None),
            _ if self.options.read_only => Err(Errno::ROFS),
            opcode::SETATTR => self.setattr(request),
            opcode::SYMLINK => self.symlink(request),
            opcode::MKNOD => self.mknod(request),
            opcode::MKDIR => self.mkdir(request),
            opcode::UNLINK => self.unlink(request, AtFlags::empty()),
            opcode::RMDIR => self.unlink(request, AtFlags::REMOVEDIR),
            opcode::RENAME | opcode::RENAME2 => self.rename(request),
            opcode::LINK => self.link(request),
            opcode::WRITE => self.write(request),
            opcode::CREATE => self.create(request),
            opcode::TMPFILE => self.temporary(request),
            opcode::SETXATTR => self.setxattr(request),
            opcode::REMOVEXATTR => self.removexattr(request),
            opcode::FALLOCATE => self.fallocate(request),
            opcode::COPY_FILE_RANGE => self.copy_range(request),
            _ => Err(Errno::NOSYS),
        }
    }

    fn nodes(&self) -> MutexGuard<'_, Nodes> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn handles(&self) -> MutexGuard<'_, Handles> {
        self.handles.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn node(&self, number: u64) -> Result<Arc<Node>, Errno> {
        self.nodes().get(number)
    }

    fn handle(&self, number: u64) -> Result<Arc<Handle>, Errno> {
        self.handles().get(number)
    }

    fn init(&self, mut request: Request<'_>) -> Answer {
        let asked: abi::InitIn = request.take()?;
        if asked.major != abi::MAJOR || asked.minor < abi::OLDEST_MINOR {
            return Err(Errno::PROTO);
        }
        let extension: abi::InitInExtension = request.take().unwrap_or_default();
        let offered = u64::from(asked.flags) | u64::from(extension.flags2) << 32;
        let agreed = offered & WANTED;
        self.started.store(true, Ordering::Release);
        reply(abi::InitOut {
            major: abi::MAJOR,
            minor: asked.minor.min(abi::MINOR),
            max_readahead: asked.max_readahead,
            flags: low(agreed),
            flags2: low(agreed >> 32),
            max_background: 64,
            congestion_threshold: 48,
            max_write: low(MAX_DATA as u64),
            time_granularity: 1,
            max_pages: u16::try_from(MAX_DATA / 4096).unwrap_or(u16::MAX),
            ..abi::InitOut::default()
        })
    }

    fn attributes(&self, status: &Statx) -> Attr {
        let (uid, gid) = self.options.owners.to_guest((status.stx_uid, status.stx_gid));
        Attr {
            ino: status.stx_ino,
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

    /// Tells the guest of a file.
    fn told(&self, file: OwnedFd) -> Result<EntryOut, Errno> {
        let (node, status) = Node::new(file)?;
        let number = self.nodes().tell(node)?;
        Ok(EntryOut {
            node: number,
            entry_valid: self.options.valid.as_secs(),
            attr_valid: self.options.valid.as_secs(),
            attr: self.attributes(&status),
            ..EntryOut::default()
        })
    }

    /// The file of that name, which is not followed if it is a link.
    pub(crate) fn find(&self, parent: &Node, name: &CStr) -> Result<EntryOut, Errno> {
        let file = openat(parent, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
        self.told(file)
    }

    /// Opens a file that is held, whatever its name is.
    fn reopen(&self, node: &Node, flags: OFlags) -> Result<OwnedFd, Errno> {
        // Opening anything else could wait for ever, or do what a device does.
        if !matches!(node.kind, FileType::RegularFile | FileType::Directory) {
            return Err(Errno::NXIO);
        }
        openat(&self.descriptors, node.number(), flags | OFlags::CLOEXEC, Mode::empty())
    }

    fn lookup(&self, mut request: Request<'_>) -> Answer {
        let parent = self.node(request.header.node)?;
        reply(self.find(&parent, request.name()?)?)
    }

    fn forget(&self, mut request: Request<'_>) -> Answer {
        let forgotten: abi::ForgetIn = request.take()?;
        self.nodes().forget(request.header.node, forgotten.lookups);
        Ok(None)
    }

    fn forget_many(&self, mut request: Request<'_>) -> Answer {
        let many: abi::BatchForgetIn = request.take()?;
        for _ in 0..many.count {
            let Ok(one) = request.take::<abi::ForgetOne>() else { break };
            self.nodes().forget(one.node, one.lookups);
        }
        Ok(None)
    }

    fn getattr(&self, mut request: Request<'_>) -> Answer {
        let asked: abi::GetattrIn = request.take()?;
        if asked.flags & flag::GETATTR_HANDLE != 0 {
            return self.attr_out(&status(&self.handle(asked.handle)?.file)?);
        }
        self.attr_out(&self.node(request.header.node)?.status()?)
    }

    fn attr_out(&self, status: &Statx) -> Answer {
        reply(AttrOut { valid: self.options.valid.as_secs(), attr: self.attributes(status), ..AttrOut::default() })
    }

    fn setattr(&self, mut request: Request<'_>) -> Answer {
        let node = self.node(request.header.node)?;
        let set: abi::SetattrIn = request.take()?;
        let wants = |bit: u32| set.valid & bit != 0;
        let handle = if wants(setattr::HANDLE) { Some(self.handle(set.handle)?) } else { None };
        if wants(setattr::MODE) {
            if node.kind == FileType::Symlink {
                return Err(Errno::OPNOTSUPP);
            }
            let mode = Mode::from_raw_mode(set.mode & 0o7777);
            rustix::fs::chmodat(&self.descriptors, node.number(), mode, AtFlags::empty())?;
        }
        if wants(setattr::UID | setattr::GID) {
            let (uid, gid) = self.options.owners.to_host((set.uid, set.gid));
            let uid = wants(setattr::UID).then(|| Uid::from_raw(uid));
            let gid = wants(setattr::GID).then(|| Gid::from_raw(gid));
            rustix::fs::chownat(&*node, c"", uid, gid, AtFlags::EMPTY_PATH)?;
        }
        if wants(setattr::SIZE) {
            let truncate = || match &handle {
                Some(handle) => rustix::fs::ftruncate(&handle.file, set.size),
                None => rustix::fs::ftruncate(self.reopen(&node, OFlags::WRONLY)?, set.size),
            };
            if wants(setattr::KILL_SUIDGID) { privilege::without_fsetid(truncate)? } else { truncate()? }
        }
        if wants(setattr::ATIME | setattr::MTIME) {
            let time = |bit: u32, now: u32, seconds: u64, ns: u32| Timespec {
                tv_sec: seconds.cast_signed(),
                tv_nsec: match (wants(bit), wants(now)) {
                    (false, _) => UTIME_OMIT,
                    (true, true) => UTIME_NOW,
                    (true, false) => ns.into(),
                },
            };
            let times = Timestamps {
                last_access: time(setattr::ATIME, setattr::ATIME_NOW, set.atime, set.atime_ns),
                last_modification: time(setattr::MTIME, setattr::MTIME_NOW, set.mtime, set.mtime_ns),
            };
            rustix::fs::utimensat(&*node, c"", &times, AtFlags::EMPTY_PATH)?;
        }
        match handle {
            Some(handle) => self.attr_out(&status(&handle.file)?),
            None => self.attr_out(&node.status()?),
        }
    }

    fn readlink(&self, request: Request<'_>) -> Answer {
        let target = rustix::fs::readlinkat(&*self.node(request.header.node)?, c"", Vec::new())?;
        Ok(Some(target.into_bytes()))
    }

    /// Makes something as the user who asked for it.
    fn making<T>(
        &self,
        request: &Request<'_>,
        umask: u32,
        make: impl FnOnce() -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let maker = Maker::new(self.options.owners.to_host((request.header.uid, request.header.gid)), umask)?;
        let made = make();
        drop(maker);
        made
    }

    fn symlink(&self, mut request: Request<'_>) -> Answer {
        let parent = self.node(request.header.node)?;
        let (name, target) = (request.name()?, request.text()?);
        self.making(&request, 0, || rustix::fs::symlinkat(target, &*parent, name))?;
        reply(self.find(&parent, name)?)
    }

    fn mknod(&self, mut request: Request<'_>) -> Answer {
        let parent = self.node(request.header.node)?;
        let asked: abi::MknodIn = request.take()?;
        let name = request.name()?;
        let kind = FileType::from_raw_mode(asked.mode);
        // A device would be this host's.
        if !matches!(kind, FileType::RegularFile | FileType::Fifo | FileType::Socket) {
            return Err(Errno::PERM);
        }
        let mode = Mode::from_raw_mode(asked.mode & 0o7777);
        self.making(&request, asked.umask, || rustix::fs::mknodat(&*parent, name, kind, mode, 0))?;
        reply(self.find(&parent, name)?)
    }

    fn mkdir(&self, mut request: Request<'_>) -> Answer {
        let parent = self.node(request.header.node)?;
        let asked: abi::MkdirIn = request.take()?;
        let name = request.name()?;
        let mode = Mode::from_raw_mode(asked.mode & 0o7777);
        self.making(&request, asked.umask, || rustix::fs::mkdirat(&*parent, name, mode))?;
        reply(self.find(&parent, name)?)
    }

    fn unlink(&self, mut request: Request<'_>, flags: AtFlags) -> Answer {
        rustix::fs::unlinkat(&*self.node(request.header.node)?, request.name()?, flags)?;
        done()
    }

    fn rename(&self, mut request: Request<'_>) -> Answer {
        let parent = self.node(request.header.node)?;
        let (new_parent, flags) = if request.header.opcode == opcode::RENAME2 {
            let asked: abi::Rename2In = request.take()?;
            (asked.new_parent, RenameFlags::from_bits(asked.flags).ok_or(Errno::INVAL)?)
        } else {
            (request.take::<abi::RenameIn>()?.new_parent, RenameFlags::empty())
        };
        if flags.contains(RenameFlags::WHITEOUT) {
            return Err(Errno::INVAL);
        }
        let new_parent = self.node(new_parent)?;
        rustix::fs::renameat_with(&*parent, request.name()?, &*new_parent, request.name()?, flags)?;
        done()
    }

    fn link(&self, mut request: Request<'_>) -> Answer {
        let parent = self.node(request.header.node)?;
        let node = self.node(request.take::<abi::LinkIn>()?.node)?;
        let name = request.name()?;
        rustix::fs::linkat(&self.descriptors, node.number(), &*parent, name, AtFlags::SYMLINK_FOLLOW)?;
        reply(self.find(&parent, name)?)
    }

    fn opened(&self, file: OwnedFd, node: u64, open_flags: u32) -> Result<OpenOut, Errno> {
        Ok(OpenOut { handle: self.handles().add(file, node)?, open_flags, backing: 0 })
    }

    fn open(&self, mut request: Request<'_>) -> Answer {
        let asked: abi::OpenIn = request.take()?;
        let flags = open_flags(asked.flags);
        if self.options.read_only && flags.intersects(OFlags::WRONLY | OFlags::RDWR | OFlags::TRUNC) {
            return Err(Errno::ROFS);
        }
        let node = self.node(request.header.node)?;
        if node.kind == FileType::Directory {
            return Err(Errno::ISDIR);
        }
        let open = || self.reopen(&node, flags);
        let file = if asked.open_flags & flag::OPEN_KILL_SUIDGID != 0 { privilege::without_fsetid(open)? } else { open()? };
        reply(self.opened(file, request.header.node, 0)?)
    }

    fn create(&self, mut request: Request<'_>) -> Answer {
        let parent = self.node(request.header.node)?;
        let asked: abi::CreateIn = request.take()?;
        let name = request.name()?;
        // Not blocking: what has that name already may be a fifo.
        let flags = open_flags(asked.flags) | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let flags = flags | OFlags::from_bits_retain(asked.flags) & OFlags::EXCL;
        let mode = Mode::from_raw_mode(asked.mode & 0o7777);
        let file = self.making(&request, asked.umask, || openat(&*parent, name, flags, mode))?;
        self.created(file)
    }

    fn temporary(&self, mut request: Request<'_>) -> Answer {
        let parent = self.node(request.header.node)?;
        let asked: abi::CreateIn = request.take()?;
        let flags = OFlags::TMPFILE | open_flags(asked.flags) | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(asked.mode & 0o7777);
        let file =
            self.making(&request, asked.umask, || openat(&self.descriptors, parent.number(), flags, mode))?;
        self.created(file)
    }

    fn created(&self, file: OwnedFd) -> Answer {
        if FileType::from_raw_mode(status(&file)?.stx_mode.into()) != FileType::RegularFile {
            return Err(Errno::NXIO);
        }
        rustix::fs::fcntl_setfl(&file, rustix::fs::fcntl_getfl(&file)? - OFlags::NONBLOCK)?;
        // The file itself, not what has its name by now.
        let path = OFlags::PATH | OFlags::CLOEXEC;
        let entry = self.told(openat(&self.descriptors, file.as_raw_fd().to_string(), path, Mode::empty())?)?;
        let open = self.opened(file, entry.node, 0).inspect_err(|_| self.nodes().forget(entry.node, 1))?;
        reply(abi::CreateOut { entry, open })
    }

    fn read(&self, mut request: Request<'_>) -> Answer {
        let asked: abi::ReadIn = request.take()?;
        let handle = self.handle(asked.handle)?;
        let mut data = vec![0; (asked.size as usize).min(MAX_DATA)];
        let mut length = 0;
        while length < data.len() {
            match rustix::io::pread(&handle.file, &mut data[length..], asked.offset + length as u64) {
                Ok(0) => break,
                Ok(n) => length += n,
                Err(Errno::INTR) => {}
                Err(errno) if length == 0 => return Err(errno),
                Err(_) => break,
            }
        }
        data.truncate(length);
        Ok(Some(data))
    }

    fn write(&self, mut request: Request<'_>) -> Answer {
        let asked: abi::WriteIn = request.take()?;
        let data = request.data(asked.size)?;
        let handle = self.handle(asked.handle)?;
        let write = || {
            let mut length = 0;
            while length < data.len() {
                match rustix::io::pwrite(&handle.file, &data[length..], asked.offset + length as u64) {
                    Ok(n) => length += n,
                    Err(Errno::INTR) => {}
                    Err(errno) if length == 0 => return Err(errno),
                    Err(_) => break,
                }
            }
            Ok(length)
        };
        let length =
            if asked.write_flags & flag::WRITE_KILL_SUIDGID != 0 { privilege::without_fsetid(write)? } else { write()? };
        reply(abi::WriteOut { size: low(length as u64), padding: 0 })
    }

    fn flush(&self, mut request: Request<'_>) -> Answer {
        let asked: abi::FlushIn = request.take()?;
        let handle = self.handle(asked.handle)?;
        self.locks.release(handle.node, asked.lock_owner);
        // Some file systems say only at a close that something was not written (NFS, quotas).
        let copy = rustix::io::fcntl_dupfd_cloexec(&handle.file, 0)?;
        // SAFETY: the copy's number was given up just now, and nobody else knows it.
        if unsafe { libc::close(copy.into_raw_fd()) } != 0 {
            return Err(last_errno());
        }
        done()
    }

    fn release(&self, mut request: Request<'_>) -> Answer {
        let asked: abi::ReleaseIn = request.take()?;
        // A lock of flock(2) ends with the last reference to it.
        self.handles().remove(asked.handle);
        done()
    }

    fn fsync(&self, mut request: Request<'_>) -> Answer {
        let asked: abi::FsyncIn = request.take()?;
        let handle = self.handle(asked.handle)?;
        if asked.flags & flag::FSYNC_DATA != 0 {
            rustix::fs::fdatasync(&handle.file)?;
        } else {
            rustix::fs::fsync(&handle.file)?;
        }
        done()
    }

    fn opendir(&self, request: Request<'_>) -> Answer {
        let node = self.node(request.header.node)?;
        let file = self.reopen(&node, OFlags::RDONLY | OFlags::DIRECTORY)?;
        reply(self.opened(file, request.header.node, 0)?)
    }

    fn readdir(&self, mut request: Request<'_>, plus: bool) -> Answer {
        let asked: abi::ReadIn = request.take()?;
        let handle = self.handle(asked.handle)?;
        let node = self.node(request.header.node)?;
        let room = (asked.size as usize).min(MAX_DATA);
        let mut answer = directory::Answer::new(room);
        directory::read(&handle, asked.offset, |entry| {
            if !plus {
                return Ok(answer.add(&entry));
            }
            if !answer.has_room_with_attributes(&entry) {
                return Ok(false);
            }
            // `.` and `..` are not looked up, and what is gone meanwhile is told without attributes.
            let found = if entry.is_dots() { None } else { self.find(&node, entry.name).ok() };
            Ok(answer.add_with_attributes(&entry, found.unwrap_or_default()))
        })?;
        Ok(Some(answer.bytes))
    }

    fn statfs(&self, request: Request<'_>) -> Answer {
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

    fn path(node: &Node) -> String {
        format!("/proc/self/fd/{}", node.number())
    }

    fn getxattr(&self, mut request: Request<'_>) -> Answer {
        let asked: abi::GetxattrIn = request.take()?;
        let name = attribute(request.text()?)?;
        let mut value = vec![0; (asked.size as usize).min(65_536)];
        let length = rustix::fs::getxattr(Self::path(&*self.node(request.header.node)?), name, &mut value[..])?;
        sized(asked.size, value, length)
    }

    fn listxattr(&self, mut request: Request<'_>) -> Answer {
        let asked: abi::GetxattrIn = request.take()?;
        let mut names = vec![0; 65_536];
        let length = rustix::fs::listxattr(Self::path(&*self.node(request.header.node)?), &mut names[..])?;
        names.truncate(length);
        let allowed: Vec<u8> = names
            .split_inclusive(|byte| *byte == 0)
            .filter(|name| CStr::from_bytes_with_nul(name).is_ok_and(|name| attribute(name).is_ok()))
            .flatten()
            .copied()
            .collect();
        if asked.size != 0 && allowed.len() > asked.size as usize {
            return Err(Errno::RANGE);
        }
        let length = allowed.len();
        sized(asked.size, allowed, length)
    }

    fn setxattr(&self, mut request: Request<'_>) -> Answer {
        let asked: abi::SetxattrIn = request.take()?;
        let name = attribute(request.text()?)?;
        let value = request.data(asked.size)?;
        let flags = XattrFlags::from_bits(asked.flags).ok_or(Errno::INVAL)?;
        rustix::fs::setxattr(Self::path(&*self.node(request.header.node)?), name, value, flags)?;
        done()
    }

    fn removexattr(&self, mut request: Request<'_>) -> Answer {
        let name = attribute(request.text()?)?;
        rustix::fs::removexattr(Self::path(&*self.node(request.header.node)?), name)?;
        done()
    }

    fn fallocate(&self, mut request: Request<'_>) -> Answer {
        let asked: abi::FallocateIn = request.take()?;
        let flags = FallocateFlags::from_bits(asked.mode).ok_or(Errno::OPNOTSUPP)?;
        rustix::fs::fallocate(&self.handle(asked.handle)?.file, flags, asked.offset, asked.length)?;
        done()
    }

    fn seek(&self, mut request: Request<'_>) -> Answer {
        let asked: abi::SeekIn = request.take()?;
        let to = match asked.whence.cast_signed() {
            libc::SEEK_DATA => rustix::fs::SeekFrom::Data(asked.offset),
            libc::SEEK_HOLE => rustix::fs::SeekFrom::Hole(asked.offset),
            _ => return Err(Errno::INVAL),
        };
        // Files are read and written at offsets that are given: where the description stands is nobody's concern.
        reply(abi::SeekOut { offset: rustix::fs::seek(&self.handle(asked.handle)?.file, to)? })
    }

    fn copy_range(&self, mut request: Request<'_>) -> Answer {
        let asked: abi::CopyRangeIn = request.take()?;
        let (from, to) = (self.handle(asked.handle_in)?, self.handle(asked.handle_out)?);
        let length = usize::try_from(asked.length.min(1 << 30)).map_err(|_| Errno::INVAL)?;
        let (mut from_offset, mut to_offset) = (asked.offset_in, asked.offset_out);
        let copied =
            rustix::fs::copy_file_range(&from.file, Some(&mut from_offset), &to.file, Some(&mut to_offset), length)?;
        reply(abi::WriteOut { size: low(copied as u64), padding: 0 })
    }

    fn syncfs(&self, request: Request<'_>) -> Answer {
        let root = self.node(request.header.node)?;
        rustix::fs::syncfs(self.reopen(&root, OFlags::RDONLY)?)?;
        done()
    }

    /// A description for an owner's locks: writable where that can be, because a lock for writing needs it.
    fn lockable(&self, node: u64) -> Result<OwnedFd, Errno> {
        let node = self.node(node)?;
        if self.options.read_only {
            return self.reopen(&node, OFlags::RDONLY);
        }
        self.reopen(&node, OFlags::RDWR).or_else(|_| self.reopen(&node, OFlags::RDONLY))
    }

    fn test_lock(&self, mut request: Request<'_>) -> Answer {
        let asked: abi::LockIn = request.take()?;
        let node = request.header.node;
        reply(self.locks.test(node, &asked, || self.lockable(node))?)
    }

    fn set_lock(&self, mut request: Request<'_>) -> Answer {
        let asked: abi::LockIn = request.take()?;
        let node = request.header.node;
        if asked.flags & flag::LOCK_FLOCK != 0 {
            lock::flock(&self.handle(asked.handle)?.file, &asked)?;
        } else {
            self.locks.set(node, &asked, || self.lockable(node))?;
        }
        done()
    }
}

/// A thread that answers requests has a umask of its own.
pub fn prepare_thread() -> Result<(), Errno> {
    // SAFETY: gives this thread its own umask and working directory; nothing else is shared by CLONE_FS.
    match unsafe { libc::unshare(libc::CLONE_FS) } {
        0 => Ok(()),
        _ => Err(last_errno()),
    }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

fn low(wide: u64) -> u32 {
    u32::try_from(wide & u64::from(u32::MAX)).unwrap_or_default()
}

/// What of the flags of a guest's open(2) is for the host's. Direct I/O would want aligned buffers here.
fn open_flags(flags: u32) -> OFlags {
    let allowed = OFlags::WRONLY | OFlags::RDWR | OFlags::APPEND | OFlags::TRUNC | OFlags::DSYNC | OFlags::SYNC;
    OFlags::from_bits_retain(flags) & allowed
}

/// Attributes that mean the same on both sides, and give no rights on this host.
fn attribute(name: &CStr) -> Result<&CStr, Errno> {
    let bytes = name.to_bytes();
    let allowed = bytes.starts_with(b"user.") || bytes.starts_with(b"system.posix_acl_");
    if allowed { Ok(name) } else { Err(Errno::OPNOTSUPP) }
}

/// An attribute's value, or its size if that was asked for.
fn sized(asked: u32, mut value: Vec<u8>, length: usize) -> Answer {
    if asked == 0 {
        return reply(abi::GetxattrOut { size: low(length as u64), padding: 0 });
    }
    value.truncate(length);
    Ok(Some(value))
}

fn done() -> Answer {
    Ok(Some(Vec::new()))
}

fn reply<T: IntoBytes + Immutable + KnownLayout>(body: T) -> Answer {
    Ok(Some(body.as_bytes().to_vec()))
}

fn message(unique: u64, error: i32, body: Vec<u8>) -> Vec<u8> {
    let len = size_of::<OutHeader>() + body.len();
    let mut whole = Vec::with_capacity(len);
    whole.extend_from_slice(OutHeader { len: low(len as u64), error, unique }.as_bytes());
    whole.extend_from_slice(&body);
    whole
}
