//! Files that stay open.

use std::fs::File;
use std::io;
use std::sync::OnceLock;

/// Opens a file once and keeps it open. Used for files that every command and every copy needs: in a machine that has just been restored,
/// every path through the kernel is slow the first time, and looking a file up is a long one.
pub fn open_once(once: &'static OnceLock<File>, open: impl FnOnce() -> io::Result<File>) -> io::Result<&'static File> {
    if let Some(file) = once.get() {
        return Ok(file);
    }
    let file = open()?;
    Ok(once.get_or_init(|| file))
}
