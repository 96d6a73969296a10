//! What ends a VM from outside: signals, the end of the owner, control clients.

use crate::event::Reason;
use crate::owner;
use std::io;
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

/// A request to end the VM.
#[derive(Clone, Copy, Debug)]
pub enum Ask {
    /// Power it off in order, within the plan's grace or another.
    Stop(Option<Duration>),
    Kill,
}

/// Watches signals and the owner's pipe.
pub struct Stops {
    terminate: Signal,
    interrupt: Signal,
    /// Caught and dropped. It is not set to ignore, because the VMM would inherit that.
    _hang_up: Signal,
    owner: Option<oneshot::Receiver<()>>,
}

impl Stops {
    pub fn new() -> io::Result<Self> {
        Ok(Stops {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            _hang_up: signal(SignalKind::hangup())?,
            owner: Some(owner::lost()),
        })
    }

    /// The next reason to stop: `Stop` for a signal, `OwnerLost` at most once.
    pub async fn next(&mut self) -> Reason {
        let owner = async {
            match &mut self.owner {
                Some(owner) => drop(owner.await),
                None => std::future::pending().await,
            }
        };
        let reason = tokio::select! {
            _ = self.terminate.recv() => Reason::Stop,
            _ = self.interrupt.recv() => Reason::Stop,
            () = owner => Reason::OwnerLost,
        };
        if reason == Reason::OwnerLost {
            self.owner = None;
        }
        reason
    }

    /// Resolves when a VM that is being started is no longer wanted.
    pub async fn unwanted(&mut self, is_detached: bool) {
        while self.next().await == Reason::OwnerLost && is_detached {}
    }
}
