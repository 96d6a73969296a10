//! The registry's record of the VM.

use crate::identity::Identity;
use crate::replace::{self, replace};
use serde_json::{Map, Value, json};
use std::io;
use std::path::PathBuf;

/// The starter's record, which the shim completes. It is replaced by rename, so that readers see it whole.
pub struct Entry {
    path: PathBuf,
    fields: Map<String, Value>,
    /// The pin file of a name that the VM got while it ran.
    pin: Option<PathBuf>,
    removed: bool,
}

impl Entry {
    pub fn new(path: PathBuf, fields: Map<String, Value>) -> Self {
        Entry { path, fields, pin: None, removed: false }
    }

    /// Adds shim and VMM to the entry. A guest that was running before is `running` at once, because it does not ring again.
    pub fn started(&mut self, shim: Identity, vmm: Identity, running: bool) -> io::Result<()> {
        self.fields.insert("shim".into(), json!(shim));
        self.fields.insert("vmm".into(), json!(vmm));
        if running {
            self.fields.insert("state".into(), json!("running"));
        } else {
            self.fields.entry("state").or_insert_with(|| json!("booting"));
        }
        self.write()
    }

    /// Records that the agent can serve.
    pub fn running(&mut self) -> io::Result<()> {
        self.fields.insert("state".into(), json!("running"));
        self.write()
    }

    /// Records that the VM no longer ends with its starter.
    pub fn detached(&mut self) -> io::Result<()> {
        self.fields.insert("detached".into(), json!(true));
        self.write()
    }

    /// Records that the guest has lost the directories that it shares, and why.
    pub fn shares_lost(&mut self, why: &str) -> io::Result<()> {
        self.fields.insert("liveMountsLost".into(), json!(why));
        self.write()
    }

    /// Gives the VM this name from now on, or takes its name away. The client makes the pin; it is removed with the entry.
    pub fn named(&mut self, name: Option<&str>, pin: Option<PathBuf>) -> io::Result<()> {
        match name {
            Some(name) => self.fields.insert("name".into(), json!(name)),
            None => self.fields.remove("name"),
        };
        self.pin = pin;
        self.write()
    }

    /// Removes the entry for good: later changes are not written any more.
    pub fn remove(&mut self) {
        self.removed = true;
        // The pin is removed only if it is still this VM's.
        if let Some(pin) = self.pin.take()
            && std::fs::read_to_string(&pin).is_ok_and(|id| self.fields.get("id").is_some_and(|own| own == id.trim()))
        {
            let _ = std::fs::remove_file(pin);
        }
        for path in [replace::temporary(&self.path), self.path.clone()] {
            let _ = std::fs::remove_file(path);
        }
    }

    fn write(&self) -> io::Result<()> {
        if self.removed { Ok(()) } else { replace(&self.path, &serde_json::to_vec(&self.fields)?) }
    }
}
