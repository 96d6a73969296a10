//! What the guest prints on its serial console, and what the VMM and its helpers print.

use crate::log::Log;
use crate::tail::Tail;
use std::sync::{Mutex, PoisonError};
use tokio::io::{AsyncRead, AsyncReadExt};

/// A log of the output, and its last bytes.
pub struct Transcript {
    pub log: Log,
    tail: Mutex<Tail>,
}

impl Transcript {
    pub fn new(log: Log) -> Self {
        Transcript { log, tail: Mutex::default() }
    }

    /// Reads to the end, even if nothing can be recorded, because a guest stops when its console is not read.
    pub async fn drain(&self, mut from: impl AsyncRead + Unpin) {
        let mut buffer = vec![0; 16 * 1024];
        while let Ok(n @ 1..) = from.read(&mut buffer).await {
            self.tail.lock().unwrap_or_else(PoisonError::into_inner).push(&buffer[..n]);
            self.log.write(&buffer[..n]);
        }
    }

    pub fn tail(&self) -> String {
        self.tail.lock().unwrap_or_else(PoisonError::into_inner).text()
    }
}
