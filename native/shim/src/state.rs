//! The state that all tasks of one VM share.

use crate::agent::Agent;
use crate::entry::Entry;
use crate::event::{MainExit, Reason};
use crate::identity::Identity;
use crate::log::Log;
use crate::memory::Memory;
use crate::share_control::Control;
use crate::stop::Ask;
use crate::transcript::Transcript;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use tokio::sync::{Semaphore, mpsc, watch};

pub struct State {
    pub since: Instant,
    pub console: Transcript,
    /// The output of the VMM and its helpers.
    pub vmm_prints: Arc<Transcript>,
    pub output: Log,
    /// Requests to the supervisor.
    pub asks: mpsc::Sender<Ask>,
    /// True once the VMM has ended.
    pub over: watch::Sender<bool>,
    /// The `exited` event, once nothing is left of the VM.
    pub exited: watch::Sender<Option<Arc<str>>>,
    pub vmm: Identity,
    pub agent: Agent,
    pub memory: Option<Arc<Memory>>,
    /// The server of the guest's shares, if it has any.
    pub shares: Option<Arc<Control>>,
    /// Held by the only capture, until nothing of it is left to undo.
    pub capturing: Semaphore,
    detached: AtomicBool,
    ready: AtomicBool,
    entry: Mutex<Entry>,
    end: Mutex<End>,
}

/// The parts of a VM that has been started.
pub struct Started {
    pub entry: Entry,
    pub vmm: Identity,
    pub agent: Agent,
    pub vmm_prints: Arc<Transcript>,
    pub memory: Option<Arc<Memory>>,
    /// The server of the guest's shares, if it has any.
    pub shares: Option<Arc<Control>>,
    pub detached: bool,
    /// Whether the guest was running before.
    pub ready: bool,
}

/// What is known of the VM's end in advance.
#[derive(Clone, Copy, Default)]
pub struct End {
    /// The first reason to end.
    pub reason: Option<Reason>,
    pub main: Option<MainExit>,
    pub orderly: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    pub fn new(started: Started, console: Transcript, output: Log, asks: mpsc::Sender<Ask>) -> Self {
        let Started { entry, vmm, agent, vmm_prints, memory, shares, detached, ready } = started;
        State {
            since: Instant::now(),
            console,
            vmm_prints,
            output,
            asks,
            over: watch::Sender::new(false),
            exited: watch::Sender::new(None),
            vmm,
            agent,
            memory,
            shares,
            capturing: Semaphore::new(1),
            detached: AtomicBool::new(detached),
            ready: AtomicBool::new(ready),
            entry: Mutex::new(entry),
            end: Mutex::default(),
        }
    }

    pub fn entry(&self) -> MutexGuard<'_, Entry> {
        lock(&self.entry)
    }

    pub fn end(&self) -> End {
        *lock(&self.end)
    }

    /// The VM is to end for this reason. Only the first counts.
    pub fn asked(&self, reason: Reason) {
        lock(&self.end).reason.get_or_insert(reason);
    }

    /// Records that the guest powers off, and its main command's result. Only the first result counts.
    pub fn announced(&self, main: Option<MainExit>) {
        let mut end = lock(&self.end);
        end.orderly = true;
        end.main = end.main.or(main);
        end.reason.get_or_insert(Reason::Guest);
    }

    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed)
    }

    /// Resolves when the VMM has ended.
    pub async fn over(&self) {
        // Waiting cannot fail, because the state itself owns the sender.
        let _ = self.over.subscribe().wait_for(|over| *over).await;
    }

    /// Records that the agent can serve. If the entry cannot be written, it goes on saying that the VM boots.
    pub fn ready(&self) {
        if !self.ready.swap(true, Ordering::Relaxed) {
            let _ = self.entry().running();
        }
    }

    pub fn is_detached(&self) -> bool {
        self.detached.load(Ordering::Relaxed)
    }

    /// Detaches the VM: the owner's end no longer matters.
    pub fn detach(&self) {
        if !self.detached.swap(true, Ordering::Relaxed) {
            let _ = self.entry().detached();
        }
    }
}
