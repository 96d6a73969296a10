//! What the host's file server says about caches: a file or a name in a shared directory has changed on the host, so the kernel must forget it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

/// Waits for delivery on a thread of its own. The kernel takes the lock of the directory for it, which a task that waits for an answer may hold;
/// so the thread that delivers answers must not deliver these.
#[derive(Default)]
pub struct Invalidations {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Default)]
struct Waiting {
    messages: VecDeque<Vec<u8>>,
    over: bool,
}

impl Invalidations {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a message for the kernel.
    pub fn push(&self, message: &[u8]) {
        self.lock().messages.push_back(message.to_vec());
        self.changed.notify_all();
    }

    /// Delivers messages until the end.
    pub fn deliver(&self, kernel: &OwnedFd) -> io::Result<()> {
        loop {
            let empty = |waiting: &mut Waiting| waiting.messages.is_empty() && !waiting.over;
            let mut waiting = self.changed.wait_while(self.lock(), empty).unwrap_or_else(PoisonError::into_inner);
            let Some(message) = waiting.messages.pop_front().filter(|_| !waiting.over) else { return Ok(()) };
            drop(waiting);
            match rustix::io::write(kernel, &message) {
                // The kernel does not know the file or the name.
                Ok(_) | Err(Errno::NOENT | Errno::NOTDIR | Errno::STALE) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    pub fn end(&self) {
        self.lock().over = true;
        self.changed.notify_all();
    }
}
