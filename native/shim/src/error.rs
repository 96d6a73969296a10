//! Why the shim could not do something for a VM.

use machinen_protocol::errno;
use rustix::io::Errno;
use std::fmt::Display;
use std::io;

/// The system refused something about `subject`: a path, the host's socket of a forwarded port, or what was being done.
#[derive(Debug, thiserror::Error)]
#[error("{subject}: {error}")]
pub struct Error {
    pub subject: String,
    error: io::Error,
}

impl Error {
    pub fn io(subject: impl Display, error: io::Error) -> Self {
        Error { subject: subject.to_string(), error }
    }

    /// What the shim itself refuses, by the number of the error that comes nearest.
    pub fn errno(subject: impl Display, errno: Errno) -> Self {
        Error::io(subject, errno.into())
    }

    /// Name of the errno. An error that is not the system's own has none; the nearest is what the caller did wrong.
    pub fn code(&self) -> String {
        errno::text(self.error.raw_os_error().unwrap_or(Errno::INVAL.raw_os_error()))
    }
}
