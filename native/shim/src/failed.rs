//! Why a VM was not started.

use machinen_protocol::errno;
use nix::libc;
use serde::Serialize;
use std::fmt::Display;
use std::io;

/// The step that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Step {
    Plan,
    Files,
    Network,
    Registry,
    Shares,
    Vmm,
}

/// A start that failed, as the starter is told.
#[derive(Debug, thiserror::Error, Serialize)]
#[error("{message}")]
pub struct Failed {
    step: Step,
    /// Name of the errno.
    code: String,
    /// What the step was busy with: a path, or the host's socket of a forwarded port.
    subject: String,
    message: String,
}

impl Failed {
    /// `what` was being done when `error` happened.
    pub fn new(step: Step, what: impl Display, error: &io::Error) -> Self {
        let subject = what.to_string();
        Failed { step, code: code(error), message: format!("{subject}: {error}"), subject }
    }
}

/// An error that is not the system's own has no errno; the nearest is what the caller did wrong.
pub fn code(error: &io::Error) -> String {
    errno::text(error.raw_os_error().unwrap_or(libc::EINVAL))
}
