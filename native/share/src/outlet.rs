//! The way to the guest: for answers and notifications.

use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};

/// Takes whole messages, from any thread.
pub trait Outlet: Send + Sync {
    /// # Errors
    /// Those of the way; the guest is gone then.
    fn send(&self, message: &[u8]) -> io::Result<()>;
}

/// A stream: messages one behind the other.
impl<W: Write + Send> Outlet for Mutex<W> {
    fn send(&self, message: &[u8]) -> io::Result<()> {
        self.lock().unwrap_or_else(PoisonError::into_inner).write_all(message)
    }
}
