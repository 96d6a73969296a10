//! The guest's serial console.

use crate::log::Log;
use crate::tail::Tail;
use std::sync::{Mutex, PoisonError};
use tokio::io::{AsyncRead, AsyncReadExt};

/// What the guest printed.
pub struct Console {
    pub log: Log,
    tail: Mutex<Tail>,
}

impl Console {
    pub fn new(log: Log) -> Self {
        Console { log, tail: Mutex::default() }
    }

    /// Reads to the end, whatever becomes of what is read: a console that is not read stops the guest.
    pub async fn drain(&self, mut port: impl AsyncRead + Unpin) {
        let mut buffer = vec![0; 16 * 1024];
        while let Ok(n @ 1..) = port.read(&mut buffer).await {
            self.tail.lock().unwrap_or_else(PoisonError::into_inner).push(&buffer[..n]);
            self.log.write(&buffer[..n]);
        }
    }

    pub fn tail(&self) -> String {
        self.tail.lock().unwrap_or_else(PoisonError::into_inner).text()
    }
}
