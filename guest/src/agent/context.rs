//! The agent's state.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::criu::lazy::LazyPages;
use super::criu::record::MainCommand;
use super::gate::Gate;
use super::identity_files::IdentityFiles;
use super::lifecycle::Lifecycle;
use super::secrets::Secrets;
use super::shares::relay::Relay;
use super::terminal::table::Terminals;
use crate::config::GuestConfig;
use crate::reply::Rejuvenated;

/// The state that every operation can reach.
pub struct Context {
    /// Changed in a copy, which gets an environment of its own.
    config: Mutex<GuestConfig>,
    pub lifecycle: Lifecycle,
    pub gate: Gate,
    /// Carries the requests for shared directories, if the machine has any, once they are mounted.
    pub shares: OnceLock<Arc<Relay>>,
    /// `/`, unless this is a test.
    pub root: PathBuf,
    /// Opened by the last freeze, for a copy that is made during it.
    identity_files: Mutex<Option<IdentityFiles>>,
    /// The main command, `None` until it runs.
    main: Mutex<Option<MainCommand>>,
    /// Held while the main command is being started: it cannot be started twice.
    pub main_start: tokio::sync::Mutex<()>,
    pub lazy: LazyPages,
    /// In a copy: what was renewed.
    rejuvenated: Mutex<Option<Rejuvenated>>,
    /// The main command goes on when its stream ends.
    pub main_detached: AtomicBool,
    pub terminals: Terminals,
    secrets: Mutex<Secrets>,
}

impl Context {
    /// The state of a guest in which no operation has run yet.
    pub fn new(config: GuestConfig, lifecycle: Lifecycle, gate: Gate, root: PathBuf) -> Self {
        Self {
            config: Mutex::new(config),
            lifecycle,
            gate,
            shares: OnceLock::new(),
            root,
            identity_files: Mutex::default(),
            main: Mutex::default(),
            main_start: tokio::sync::Mutex::default(),
            lazy: LazyPages::default(),
            rejuvenated: Mutex::default(),
            main_detached: AtomicBool::new(false),
            terminals: Terminals::default(),
            secrets: Mutex::default(),
        }
    }

    /// Lets the requests for shared directories go on after a freeze.
    pub fn resume_shares(&self) {
        if let Some(relay) = self.shares.get() {
            relay.resume();
        }
    }

    pub fn config(&self) -> MutexGuard<'_, GuestConfig> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn secrets(&self) -> MutexGuard<'_, Secrets> {
        self.secrets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn main(&self) -> MutexGuard<'_, Option<MainCommand>> {
        self.main.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn rejuvenated(&self) -> MutexGuard<'_, Option<Rejuvenated>> {
        self.rejuvenated.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn identity_files(&self) -> MutexGuard<'_, Option<IdentityFiles>> {
        self.identity_files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
