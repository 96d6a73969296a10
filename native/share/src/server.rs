//! Serves a guest: each request of the FUSE protocol is answered by what the host's own file systems do. This file has what all requests need and
//! the way from a request to its function; the functions are in the files named for what they are about.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use machinen_protocol::share::{LOCKS, SETTLE};
use rustix::fs::{AtFlags, Mode, OFlags, Statx, makedev};
use rustix::io::Errno;
use zerocopy::FromBytes;

use crate::abi::{self, ROOT, opcode};
use crate::confinement::confine;
use crate::coverage::Coverage;
use crate::devices::Devices;
use crate::handle::{Handle, Handles};
use crate::limits::Limits;
use crate::lock::Locks;
use crate::node::Node;
use crate::nodes::{self, Nodes};
use crate::outlet::Outlet;
use crate::reply::{self, Answer, last_errno};
use crate::request::Request;
use crate::share::Share;
use crate::waiting::Waiting;
use crate::watch::Watch;
use crate::watcher::{self, Pace};

pub struct Server {
    pub(crate) shares: Vec<Share>,
    /// How long the guest may believe what it was told of names and attributes whose changes are watched.
    pub(crate) valid: Duration,
    pub(crate) coverage: Coverage,
    pub(crate) pace: Pace,
    pub(crate) outlet: Arc<dyn Outlet>,
    nodes: Mutex<Nodes>,
    handles: Mutex<Handles>,
    devices: Mutex<Devices>,
    pub(crate) locks: Arc<Locks>,
    pub(crate) waiting: Waiting,
    /// /proc/self/fd, where a file that is held can be opened anew whatever its name is by now.
    pub(crate) descriptors: OwnedFd,
    pub(crate) started: AtomicBool,
    /// The guest cannot read directories without opening them.
    pub(crate) opens_directories: AtomicBool,
}

impl Server {
    /// # Errors
    /// Those of /proc and of the shared directories.
    pub fn new(shares: Vec<Share>, valid: Duration, outlet: Arc<dyn Outlet>) -> Result<Self, Errno> {
        let directory = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let limits = Limits::of_this_process();
        let mut devices = Devices::default();
        let mut roots = Vec::new();
        for (number, share) in shares.iter().enumerate() {
            let (node, _) = Node::new(rustix::io::fcntl_dupfd_cloexec(&share.file, 0)?, number)?;
            devices.inode(node.identity.device, node.identity.inode);
            roots.push(node);
        }
        Ok(Self {
            shares,
            valid,
            // A host without it is served as well, without caches.
            coverage: Coverage::new(if valid.is_zero() { None } else { Watch::new().ok() })?,
            pace: Pace::default(),
            outlet,
            nodes: Mutex::new(Nodes::new(roots, limits.nodes, nodes::MOST)),
            handles: Mutex::new(Handles::new(limits.handles)),
            devices: Mutex::new(devices),
            locks: Arc::new(Locks::new(limits.owners)),
            waiting: Waiting::new()?,
            descriptors: rustix::fs::open("/proc/self/fd", directory, Mode::empty())?,
            started: AtomicBool::new(false),
            opens_directories: AtomicBool::new(true),
        })
    }

    /// Gives up what serving does not take; which confinements are in force. For the calling thread and those that it starts.
    ///
    /// # Errors
    /// See `confine`.
    pub fn confine(&self) -> std::io::Result<Vec<&'static str>> {
        confine(&self.shares)
    }

    /// The answer to a request, a whole message, unless it wants none or gets it later. The thread must have been prepared (`prepare_thread`).
    pub fn answer(&self, bytes: &[u8]) -> Option<Vec<u8>> {
        let unique = abi::InHeader::read_from_prefix(bytes).map_or(0, |(header, _)| header.unique);
        reply::message(unique, Request::new(bytes).and_then(|request| self.serve(request)))
    }

    /// # Errors
    /// Those of the way to the guest.
    pub fn send(&self, message: &[u8]) -> std::io::Result<()> {
        self.outlet.send(message)
    }

    /// Sends notices until `stop_watching` or an error. Must have a thread of its own.
    ///
    /// # Errors
    /// Those of `send`.
    pub fn watch(&self, paced: bool, send: impl Fn(&[u8]) -> std::io::Result<()>) -> std::io::Result<()> {
        watcher::run(&self.coverage, &self.pace, paced, send)
    }

    pub fn stop_watching(&self) {
        watcher::end(&self.coverage, &self.pace);
    }

    fn serve(&self, request: Request<'_>) -> Answer {
        let asked = request.header.opcode;
        if asked == opcode::INIT {
            return self.init(request);
        }
        if asked == opcode::NOTIFY_REPLY {
            self.pace.taken(request.header.node);
            return Ok(None);
        }
        if !self.started.load(Ordering::Acquire) {
            return Err(Errno::PROTO);
        }
        match asked {
            LOCKS => return self.list_locks(),
            SETTLE => {
                self.coverage.settle(request.header.unique)?;
                return Ok(None);
            }
            opcode::FORGET => return self.forget(request),
            opcode::BATCH_FORGET => return self.forget_many(request),
            opcode::INTERRUPT => return self.interrupt(request),
            opcode::DESTROY => return Ok(None),
            _ if request.header.node == ROOT => return self.serve_root(request),
            _ => {}
        }
        match asked {
            opcode::LOOKUP => self.lookup(request),
            opcode::GETATTR => self.getattr(request),
            opcode::READLINK => self.readlink(request),
            opcode::OPEN => self.open(request),
            opcode::READ => self.read(request),
            opcode::FLUSH => self.flush(request),
            opcode::RELEASE | opcode::RELEASEDIR => self.release(request),
            opcode::FSYNC => self.fsync(request),
            opcode::FSYNCDIR => self.fsyncdir(request),
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
            // From the node that is read to another one.
            opcode::COPY_FILE_RANGE => self.copy_range(request),
            _ => self.change(request),
        }
    }

    /// What changes the node that the request is about, or what is in it.
    fn change(&self, request: Request<'_>) -> Answer {
        let change: fn(&Self, Request<'_>) -> Answer = match request.header.opcode {
            opcode::SETATTR => Self::setattr,
            opcode::SYMLINK => Self::symlink,
            opcode::MKNOD => Self::mknod,
            opcode::MKDIR => Self::mkdir,
            opcode::UNLINK => |server, request| server.unlink(request, AtFlags::empty()),
            opcode::RMDIR => |server, request| server.unlink(request, AtFlags::REMOVEDIR),
            opcode::RENAME | opcode::RENAME2 => Self::rename,
            opcode::LINK => Self::link,
            opcode::WRITE => Self::write,
            opcode::CREATE => Self::create,
            opcode::TMPFILE => Self::temporary,
            opcode::SETXATTR => Self::setxattr,
            opcode::REMOVEXATTR => Self::removexattr,
            opcode::FALLOCATE => Self::fallocate,
            // Said before anything about the share: the guest's kernel asks no more, and does it in another way (STATX).
            _ => return Err(Errno::NOSYS),
        };
        if self.share(&*self.node(request.header.node)?).read_only {
            return Err(Errno::ROFS);
        }
        change(self, request)
    }

    pub(crate) fn nodes(&self) -> MutexGuard<'_, Nodes> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn devices(&self) -> MutexGuard<'_, Devices> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn handles(&self) -> MutexGuard<'_, Handles> {
        self.handles.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn node(&self, number: u64) -> Result<Arc<Node>, Errno> {
        self.nodes().get(number)
    }

    /// What the node that the request is about has open by that number.
    pub(crate) fn handle(&self, request: &Request<'_>, number: u64) -> Result<Arc<Handle>, Errno> {
        self.handle_of(request.header.node, number)
    }

    pub(crate) fn handle_of(&self, node: u64, number: u64) -> Result<Arc<Handle>, Errno> {
        let handle = self.handles().get(number)?;
        if handle.number == node { Ok(handle) } else { Err(Errno::BADF) }
    }

    /// The share that a file is of, which says what may be done to it.
    pub(crate) fn share(&self, node: &Node) -> &Share {
        &self.shares[node.identity.share]
    }

    /// The inode number that the guest knows a file by.
    pub(crate) fn inode(&self, status: &Statx) -> u64 {
        self.inode_on(makedev(status.stx_dev_major, status.stx_dev_minor), status.stx_ino)
    }

    pub(crate) fn inode_on(&self, device: u64, inode: u64) -> u64 {
        self.devices().inode(device, inode)
    }
}

/// A thread that answers requests has a umask of its own.
///
/// # Errors
/// The kernel's.
pub fn prepare_thread() -> Result<(), Errno> {
    // SAFETY: gives this thread its own umask and working directory; nothing else is shared by CLONE_FS.
    match unsafe { libc::unshare(libc::CLONE_FS) } {
        0 => Ok(()),
        _ => Err(last_errno()),
    }
}
