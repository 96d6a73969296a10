//! Why the shim could not do something for a VM.

use machinen_protocol::errno;
use rustix::io::Errno;
use std::fmt::Display;
use std::io;

/// What could not be done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system refused something about `subject`: a path, the host's socket of a forwarded port, or what was being done.
    #[error("{subject}: {error}")]
    Io { subject: String, error: io::Error },
    /// A helper's words, with the name of an errno.
    #[error("{message}")]
    Told { code: String, message: String },
}

impl Error {
    pub fn io(subject: impl Display, error: io::Error) -> Self {
        Error::Io { subject: subject.to_string(), error }
    }

    /// What the shim itself refuses, by the number of the error that comes nearest.
    pub fn errno(subject: impl Display, errno: Errno) -> Self {
        Error::io(subject, errno.into())
    }

    /// Name of the errno. An error that is not the system's own has none; the nearest is what the caller did wrong.
    pub fn code(&self) -> String {
        match self {
            Error::Told { code, .. } => code.clone(),
            Error::Io { error, .. } => errno::text(error.raw_os_error().unwrap_or(Errno::INVAL.raw_os_error())),
        }
    }
}
