//! Why the shim could not do something.

use machinen_protocol::errno;
use rustix::io::Errno;
use std::fmt::Display;
use std::io;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system refused something about `subject`: a path, the host's socket of a forwarded port, or what was being done.
    #[error("{subject}: {error}")]
    Io { subject: String, error: io::Error },
    /// A tree could not be packed or unpacked.
    #[error(transparent)]
    Archive(#[from] machinen_archive::Error),
    /// The guest sent more than so many bytes, which is what the caller takes.
    #[error("the guest sent more than {0} bytes")]
    TooLarge(u64),
    /// The words of a helper, with the name of an errno.
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
        let number = match self {
            Error::Told { code, .. } => return code.clone(),
            Error::Io { error, .. } => error.raw_os_error(),
            Error::Archive(_) | Error::TooLarge(_) => None,
        };
        errno::text(number.unwrap_or(Errno::INVAL.raw_os_error()))
    }
}
