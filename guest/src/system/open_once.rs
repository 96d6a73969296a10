//! Files that stay open.

use std::fs::File;
use std::io;
use std::sync::OnceLock;

/// Files used for every command and in every copy stay open: in a machine that has just been restored each way into the kernel is slow
/// for the first time, and looking a file up is a long one.
pub fn open_once(once: &'static OnceLock<File>, open: impl FnOnce() -> io::Result<File>) -> io::Result<&'static File> {
    if let Some(file) = once.get() {
        return Ok(file);
    }
    let file = open()?;
    Ok(once.get_or_init(|| file))
}
