//! The host's directories a VMM serves to its guest: joined below one directory, in a mount namespace of the VMM's own. The kernel sees to
//! what is read-only, no device node in them works, and nothing of it is left when the VMM is gone.

use crate::error::Error;
use crate::plan::Shares;
use nix::libc;
use std::ffi::{CStr, CString};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::ptr;

/// What a process is to see at one place.
pub struct View {
    root: CString,
    parts: Vec<Part>,
}

struct Part {
    from: CString,
    to: CString,
    read_only: bool,
}

impl View {
    /// Makes the places.
    ///
    /// # Errors
    /// The first place or source that is not there, or is no directory.
    pub fn prepare(shares: &Shares) -> Result<Self, Error> {
        let mut parts = Vec::new();
        let mut directory = DirBuilder::new();
        directory.mode(0o700).recursive(true);
        for part in &shares.parts {
            let to = shares.root.join(&part.name);
            // Tells of what is not there, or is no directory, while there are still words for it.
            open(&part.path).map_err(|error| Error::io(part.path.display(), error))?;
            directory.create(&to).map_err(|error| Error::io(to.display(), error))?;
            parts.push(Part { from: text(&part.path)?, to: text(&to)?, read_only: part.read_only });
        }
        Ok(Self { root: text(&shares.root)?, parts })
    }

    /// To be called between fork and exec: makes system calls and nothing else.
    pub fn enter(&self) -> io::Result<()> {
        // A guest's root is not to leave device nodes in the host's directories. What is not in the bounding set is lost at exec.
        const CAP_MKNOD: libc::c_ulong = 27;
        // SAFETY: takes numbers only.
        check(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, CAP_MKNOD, 0, 0, 0) })?;
        // SAFETY: takes a number; this process has one thread.
        check(unsafe { libc::unshare(libc::CLONE_NEWNS) })?;
        // Nothing of ours reaches the host. What the host unmounts beside the parts goes here as well, or its disks would stay busy.
        mount(None, c"/", libc::MS_REC | libc::MS_SLAVE)?;
        // Of its own, so that it can be read-only: the guest has no business beside the parts.
        mount(Some(&self.root), &self.root, libc::MS_BIND)?;
        for part in &self.parts {
            mount(Some(&part.from), &part.to, libc::MS_BIND | libc::MS_REC)?;
            // What the host mounts later would appear here with flags of its own: writable, with devices. Before the flags are set, so
            // that nothing comes in between.
            mount(None, &part.to, libc::MS_REC | libc::MS_PRIVATE)?;
            restrict(&part.to, part.read_only, true)?;
        }
        restrict(&self.root, true, false)
    }
}

fn open(directory: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(directory)
}

fn text(path: &Path) -> Result<CString, Error> {
    CString::new(path.as_os_str().as_bytes()).map_err(|error| Error::io(path.display(), error.into()))
}

fn mount(from: Option<&CStr>, to: &CStr, flags: libc::c_ulong) -> io::Result<()> {
    // SAFETY: the strings are live and end with a NUL; a bind mount and a change of propagation read nothing else.
    check(unsafe { libc::mount(from.map_or(ptr::null(), CStr::as_ptr), to.as_ptr(), ptr::null(), flags, ptr::null()) })
}

/// `mount_setattr(2)`, which unlike a remount reaches the mounts below.
fn restrict(at: &CStr, read_only: bool, recursive: bool) -> io::Result<()> {
    let only = if read_only { libc::MOUNT_ATTR_RDONLY } else { 0 };
    let attributes = libc::mount_attr {
        attr_set: only | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    let flags = if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: path and structure outlive the call, which reads as much of it as it is told.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            at.as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn check(done: libc::c_int) -> io::Result<()> {
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
