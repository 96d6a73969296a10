//! Why a tree could not be packed or unpacked.

use std::fmt;
use std::io;

/// Why a tree could not be packed or unpacked.
#[derive(Debug)]
pub enum Error {
    /// The data are no archive, or ask for something that is not allowed.
    Refused(String),
    /// The kernel refused something about `path`.
    Io { path: String, error: io::Error },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(why) => write!(f, "archive: {why}"),
            Self::Io { path, error } => write!(f, "{path}: {error}"),
        }
    }
}

impl std::error::Error for Error {}

/// The error number at the root of an I/O error, which libraries wrap to add context. `None` if the error did not come from the kernel.
pub fn errno(error: &io::Error) -> Option<i32> {
    let mut next: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = next {
        if let Some(errno) = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
            return Some(errno);
        }
        next = error.source();
    }
    None
}

/// The error for data that are no archive.
pub(crate) fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
