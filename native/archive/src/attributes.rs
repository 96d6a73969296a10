//! Extended attributes of files.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use rustix::io::Errno;

/// The longest attribute, and the longest list of their names, in bytes (XATTR_SIZE_MAX and XATTR_LIST_MAX, linux/limits.h).
pub const MAX_ATTRIBUTE: usize = 64 * 1024;

/// The extended headers of an entry.
pub type Records = Vec<(String, Vec<u8>)>;

/// The extended attributes of the file, as GNU tar and libarchive write them, in order. A file system without extended attributes gives
/// none.
pub fn attributes(held: impl AsFd, buffer: &mut [u8]) -> io::Result<Records> {
    // The only path that leads to a link or a device that is held without being open.
    let path = format!("/proc/self/fd/{}", held.as_fd().as_raw_fd());
    let length = match rustix::fs::listxattr(&path, &mut *buffer) {
        Err(Errno::OPNOTSUPP) => 0,
        length => length?,
    };
    let names = buffer[..length].to_vec();
    let mut found = Vec::new();
    // Each name ends with NUL.
    for name in names.split_inclusive(|byte| *byte == 0).filter_map(|name| CStr::from_bytes_with_nul(name).ok()) {
        let Ok(key) = name.to_str() else { continue };
        match rustix::fs::getxattr(&path, name, &mut *buffer) {
            // The attribute was removed meanwhile.
            Err(Errno::NODATA) => {}
            length => found.push((format!("SCHILY.xattr.{key}"), buffer[..length?].to_vec())),
        }
    }
    found.sort_unstable();
    Ok(found)
}
