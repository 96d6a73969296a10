//! The registry's record of the VM.

use crate::identity::Identity;
use crate::replace::{self, replace};
use serde_json::{Map, Value, json};
use std::io;
use std::path::PathBuf;

/// The starter's record, completed. Readers see it whole: it is replaced by rename.
pub struct Entry {
    path: PathBuf,
    fields: Map<String, Value>,
    removed: bool,
}

impl Entry {
    pub fn new(path: PathBuf, fields: Map<String, Value>) -> Self {
        Entry { path, fields, removed: false }
    }

    /// From now on shim and VMM answer for it.
    pub fn started(&mut self, shim: Identity, vmm: Identity) -> io::Result<()> {
        self.fields.insert("shim".into(), json!(shim));
        self.fields.insert("vmm".into(), json!(vmm));
        self.fields.entry("state").or_insert_with(|| json!("booting"));
        self.write()
    }

    /// The guest can be talked to.
    pub fn running(&mut self) -> io::Result<()> {
        self.fields.insert("state".into(), json!("running"));
        self.write()
    }

    /// The VM no longer ends with its starter.
    pub fn detached(&mut self) -> io::Result<()> {
        self.fields.insert("detached".into(), json!(true));
        self.write()
    }

    /// Removes it for good: later changes are not written any more.
    pub fn remove(&mut self) {
        self.removed = true;
        for path in [replace::temporary(&self.path), self.path.clone()] {
            let _ = std::fs::remove_file(path);
        }
    }

    fn write(&self) -> io::Result<()> {
        if self.removed { Ok(()) } else { replace(&self.path, &serde_json::to_vec(&self.fields)?) }
    }
}
