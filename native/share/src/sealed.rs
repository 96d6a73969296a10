//! Read-only shares as mounts that are read-only: then the kernel refuses every change, by whichever system call.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};

use crate::reply::last_errno;

/// The same directory or file, and what is mounted below it, by way of mounts of their own that are read-only. They are nowhere in the host's
/// tree, and end with the descriptors.
///
/// # Errors
/// Those of the kernel, which lets only root do this.
pub fn sealed(file: impl AsFd) -> Result<OwnedFd, Errno> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE
        | OpenTreeFlags::AT_EMPTY_PATH;
    let tree = open_tree(file, c"", flags)?;
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    let flags = libc::AT_EMPTY_PATH | libc::AT_RECURSIVE;
    // SAFETY: path and structure outlive the call, which reads as much of it as it is told.
    let done = unsafe {
        let attributes = &raw const attributes;
        let size = size_of::<libc::mount_attr>();
        libc::syscall(libc::SYS_mount_setattr, tree.as_raw_fd(), c"".as_ptr(), flags, attributes, size)
    };
    if done == 0 { Ok(tree) } else { Err(last_errno()) }
}
