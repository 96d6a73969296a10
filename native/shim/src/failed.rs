//! What the starter is told of a VM that was not started.

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
    /// What the step was busy with: a path, or the host's socket of a forwarded port.
    subject: String,
    message: String,
}

impl Failed {
    /// `step` failed by the error it is given.
    pub fn at(step: Step) -> impl Fn(Error) -> Failed {
        move |error| {
            let (code, message) = (error.code(), error.to_string());
            let subject = match error {
                Error::Io { subject, .. } => subject,
                Error::Archive(_) | Error::TooLarge(_) => message.clone(),
            };
            Failed { step, code, subject, message }
        }
    }

    /// The system refused something about `subject`.
    pub fn io(step: Step, subject: impl Display, error: io::Error) -> Self {
        Failed::at(step)(Error::io(subject, error))
    }
}
