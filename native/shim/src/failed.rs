//! The report to the starter of a VM that was not started.

use crate::error::Error;
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

/// A start that failed.
#[derive(Debug, Serialize)]
pub struct Failed {
    step: Step,
    /// Name of the errno.
    code: String,
    /// The subject of the failed call: a path, or the host's socket of a forwarded port.
    subject: String,
    message: String,
}

impl Failed {
    /// Makes the report of an error at `step`.
    pub fn at(step: Step) -> impl Fn(Error) -> Failed {
        move |error| {
            let (code, message) = (error.code(), error.to_string());
            let subject = match error {
                Error::Io { subject, .. } => subject,
                Error::Told { .. } => message.clone(),
            };
            Failed { step, code, subject, message }
        }
    }

    /// The report of a system call about `subject` that was refused at `step`.
    pub fn io(step: Step, subject: impl Display, error: io::Error) -> Self {
        Failed::at(step)(Error::io(subject, error))
    }
}
