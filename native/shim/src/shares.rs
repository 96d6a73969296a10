//! The host's directories a VMM serves to its guest: joined below one directory, in a mount namespace of the VMM's own. The kernel sees to
//! what is read-only, no device node in them works, and nothing of it is left when the VMM is gone.

use crate::error::Error;
use crate::plan::Shares;
use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountPropagationFlags, mount_bind, mount_bind_recursive, mount_change};
use rustix::thread::{CapabilitySet, UnshareFlags, remove_capability_from_bounding_set, unshare_unsafe};
use std::ffi::{CStr, CString};
use std::fs::DirBuilder;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

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
            open(&part.path).map_err(|error| Error::io(part.path.display(), error.into()))?;
            directory.create(&to).map_err(|error| Error::io(to.display(), error))?;
            parts.push(Part { from: text(&part.path)?, to: text(&to)?, read_only: part.read_only });
        }
        Ok(Self { root: text(&shares.root)?, parts })
    }

    /// To be called between fork and exec: makes system calls and nothing else.
    pub fn enter(&self) -> io::Result<()> {
        // A guest's root is not to leave device nodes in the host's directories. What is not in the bounding set is lost at exec.
        remove_capability_from_bounding_set(CapabilitySet::MKNOD)?;
        // SAFETY: unsharing descriptors would be unsafe, which this does not.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS) }?;
        // Nothing of ours reaches the host. What the host unmounts beside the parts goes here as well, or its disks would stay busy.
        mount_change(c"/", MountPropagationFlags::REC | MountPropagationFlags::DOWNSTREAM)?;
        // Of its own, so that it can be read-only: the guest has no business beside the parts.
        mount_bind(&self.root, &self.root)?;
        for part in &self.parts {
            mount_bind_recursive(&part.from, &part.to)?;
            // What the host mounts later would appear here with flags of its own: writable, with devices. Before the flags are set, so
            // that nothing comes in between.
            mount_change(&part.to, MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)?;
            restrict(&part.to, part.read_only, true)?;
        }
        restrict(&self.root, true, false)
    }
}

fn open(directory: &Path) -> rustix::io::Result<OwnedFd> {
    rustix::fs::open(directory, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

fn text(path: &Path) -> Result<CString, Error> {
    CString::new(path.as_os_str().as_bytes()).map_err(|error| Error::io(path.display(), error.into()))
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
