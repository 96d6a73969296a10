//! Accepts clients, also when the process has no descriptor left.

use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::time::Duration;
use tokio::net::{UnixListener, UnixStream};
use tokio::time::sleep;

/// How many descriptors are kept back. Each lets one more client in.
const RESERVE: usize = 8;
/// How long to wait when a client cannot be accepted. The listener stays readable, so accepting again at once would spin, and no event reports that
/// the process has closed a descriptor.
const PAUSE: Duration = Duration::from_millis(100);

/// Descriptors for the control socket's clients, which must get through even when everything else has used up the rest.
pub struct Reserve(Vec<File>);

impl Reserve {
    pub fn new() -> Self {
        let mut reserve = Reserve(Vec::new());
        reserve.refill();
        reserve
    }

    /// Must be called whenever descriptors may have become free.
    pub fn refill(&mut self) {
        while self.0.len() < RESERVE
            && let Ok(file) = File::open("/dev/null")
        {
            self.0.push(file);
        }
    }

    /// The next client. May be cancelled.
    pub async fn accept(&mut self, listener: &UnixListener) -> UnixStream {
        loop {
            match listener.accept().await {
                Ok((client, _)) => {
                    self.refill();
                    return client;
                }
                Err(error) if !(out_of_descriptors(&error) && self.0.pop().is_some()) => sleep(PAUSE).await,
                // A reserved descriptor has just been closed, and nothing else runs on this thread in between.
                Err(_) => {}
            }
        }
    }
}

/// Accepts the next client, and waits as long as that is not possible, e.g. for want of a descriptor.
pub async fn next_client(listener: &UnixListener) -> UnixStream {
    loop {
        match listener.accept().await {
            Ok((client, _)) => return client,
            Err(_) => sleep(PAUSE).await,
        }
    }
}

fn out_of_descriptors(error: &io::Error) -> bool {
    Errno::from_io_error(error) == Some(Errno::MFILE)
}
