//! The host's directories that a VMM serves to its guest. They are joined below one directory in a mount namespace of the VMM's own. The
//! kernel enforces what is read-only and that no device node in them works, and nothing is left when the VMM is gone.

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

/// The directories that a process sees below `root`.
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
    /// Makes the directories to mount on.
    ///
    /// # Errors
    /// The first target or source that is missing or no directory.
    pub fn prepare(shares: &Shares) -> Result<Self, Error> {
        let mut parts = Vec::new();
        let mut directory = DirBuilder::new();
        directory.mode(0o700).recursive(true);
        for part in &shares.parts {
            let to = shares.root.join(&part.name);
            // Opened here to report a source that is missing or no directory, because the child cannot report it.
            open(&part.path).map_err(|error| Error::io(part.path.display(), error.into()))?;
            directory.create(&to).map_err(|error| Error::io(to.display(), error))?;
            parts.push(Part { from: text(&part.path)?, to: text(&to)?, read_only: part.read_only });
        }
        Ok(Self { root: text(&shares.root)?, parts })
    }

    /// Must be called between fork and exec; makes system calls and nothing else.
    pub fn enter(&self) -> io::Result<()> {
        // A guest's root must not make device nodes in the host's directories. A capability that is not in the bounding set is lost at
        // exec.
        remove_capability_from_bounding_set(CapabilitySet::MKNOD)?;
        // SAFETY: unsharing descriptors would be unsafe, which this does not.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS) }?;
        // Mounts made here do not reach the host. What the host unmounts elsewhere is unmounted here too, because its disks would stay busy
        // otherwise.
        mount_change(c"/", MountPropagationFlags::REC | MountPropagationFlags::DOWNSTREAM)?;
        // A mount of its own, so that it can be read-only: the guest may not write beside the parts.
        mount_bind(&self.root, &self.root)?;
        for part in &self.parts {
            mount_bind_recursive(&part.from, &part.to)?;
            // Otherwise a later mount of the host would appear here with its own flags, writable and with devices. Done before the flags
            // are set, so that no mount comes in between.
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

/// Restricts a mount by `mount_setattr(2)`, which unlike a remount also reaches the mounts below.
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
