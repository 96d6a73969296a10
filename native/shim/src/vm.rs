//! What the parts of a shim share about its VM.

use crate::event::{Identity, Reason, Status};
use crate::files;
use crate::log::Log;
use serde_json::{Map, Value, json};
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};

/// A request that the VM should end.
#[derive(Clone, Copy, Debug)]
pub enum Ask {
    /// Ask the guest, and kill the VMM after the grace.
    Stop { reason: Reason, grace: Option<Duration> },
    /// Kill the VMM now.
    Kill { reason: Reason },
    /// The guest could not be asked.
    Unreachable,
}

/// Held by everyone who is served something; the shim waits a moment for them before it exits.
pub type Busy = mpsc::Sender<()>;

/// Shared by all tasks of the shim.
#[derive(Debug)]
pub struct Vm {
    pub started: Instant,
    pub console: Arc<Log>,
    pub output: Arc<Log>,
    pub asks: mpsc::UnboundedSender<Ask>,
    /// The `exited` event, once nothing is left of the VM.
    pub exited: watch::Sender<Option<Arc<str>>>,
    entry_path: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    entry: Map<String, Value>,
    ready: bool,
    detached: bool,
    /// The guest said that it powers off.
    orderly: bool,
    /// How the guest said that its main command ended.
    main: Option<Status>,
    /// The VM is gone; its entry must not come back.
    over: bool,
}

impl Vm {
    pub fn new(
        console: Arc<Log>,
        output: Arc<Log>,
        asks: mpsc::UnboundedSender<Ask>,
        entry_path: PathBuf,
        entry: Map<String, Value>,
        detached: bool,
    ) -> Vm {
        let state = State { entry, ready: false, detached, orderly: false, main: None, over: false };
        Vm {
            started: Instant::now(),
            console,
            output,
            asks,
            exited: watch::channel(None).0,
            entry_path,
            state: Mutex::new(state),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes the registry entry for the first time.
    pub fn register(&self, shim: Identity, vmm: Identity) -> io::Result<()> {
        let mut state = self.state();
        state.entry.insert("shim".into(), json!(shim));
        state.entry.insert("vmm".into(), json!(vmm));
        state.entry.insert("state".into(), json!("booting"));
        self.write_entry(&state)
    }

    fn write_entry(&self, state: &State) -> io::Result<()> {
        // A map with string keys: cannot fail.
        files::replace(&self.entry_path, &serde_json::to_vec(&state.entry)?)
    }

    /// The guest can serve: it rang.
    pub fn mark_ready(&self) {
        let mut state = self.state();
        if state.over || std::mem::replace(&mut state.ready, true) {
            return;
        }
        state.entry.insert("state".into(), json!("running"));
        // A disk that is full now leaves the old entry, which is still true of the processes.
        let _ = self.write_entry(&state);
    }

    /// From now on the owner's end means nothing.
    pub fn detach(&self) {
        let mut state = self.state();
        if state.over || std::mem::replace(&mut state.detached, true) {
            return;
        }
        state.entry.insert("detached".into(), json!(true));
        let _ = self.write_entry(&state);
    }

    /// The guest announced its power-off; `main` is how its command ended, if it had one.
    pub fn announce(&self, main: Option<Status>) {
        let mut state = self.state();
        state.orderly = true;
        state.main = state.main.or(main);
    }

    /// The VM is gone: what arrives later changes nothing on disk.
    pub fn close(&self) {
        self.state().over = true;
        self.console.close();
        self.output.close();
    }

    pub fn is_ready(&self) -> bool {
        self.state().ready
    }

    pub fn is_detached(&self) -> bool {
        self.state().detached
    }

    /// Whether the guest announced its power-off, and how its command ended.
    pub fn announced(&self) -> (bool, Option<Status>) {
        let state = self.state();
        (state.orderly, state.main)
    }

    /// Asks for the VM's end.
    pub fn ask(&self, ask: Ask) {
        // It fails when the VM has ended already.
        let _ = self.asks.send(ask);
    }
}
