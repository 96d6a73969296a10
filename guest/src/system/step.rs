//! A boot step's failure: which step, and why.

use std::borrow::Cow;
use std::{fmt, io};

/// A step of the boot that failed.
#[derive(Debug)]
pub struct Failed {
    step: Cow<'static, str>,
    error: io::Error,
}

impl Failed {
    pub fn new(step: impl Into<Cow<'static, str>>, error: io::Error) -> Self {
        Self { step: step.into(), error }
    }
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.step, self.error)
    }
}

/// Adds the step's name to a result.
pub trait Step<T> {
    fn step(self, step: impl Into<Cow<'static, str>>) -> Result<T, Failed>;
}

impl<T, E: Into<io::Error>> Step<T> for Result<T, E> {
    fn step(self, step: impl Into<Cow<'static, str>>) -> Result<T, Failed> {
        self.map_err(|error| Failed::new(step, error.into()))
    }
}
