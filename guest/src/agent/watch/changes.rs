//! Changes, as the host reads them.

use std::mem;
use std::path::Path;

use serde::Serialize;
use tokio::sync::mpsc;

use crate::agent::stream::{Abort, CHUNK};
use crate::file_names;

/// A line of JSON. Paths are relative to the watched directory.
#[derive(Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Change<'a> {
    Created {
        #[serde(serialize_with = "file_names::serialize")]
        path: &'a Path,
    },
    /// A process that could write to it has closed it, or its attributes have changed.
    Modified {
        #[serde(serialize_with = "file_names::serialize")]
        path: &'a Path,
    },
    Removed {
        #[serde(serialize_with = "file_names::serialize")]
        path: &'a Path,
    },
    Moved {
        #[serde(serialize_with = "file_names::serialize")]
        from: &'a Path,
        #[serde(serialize_with = "file_names::serialize")]
        path: &'a Path,
    },
    /// The kernel could not keep all events.
    Lost,
}

/// Collects lines and sends them to the stream in pieces.
pub struct Lines {
    pieces: mpsc::Sender<Vec<u8>>,
    piece: Vec<u8>,
}

impl Lines {
    pub fn new(pieces: mpsc::Sender<Vec<u8>>) -> Self {
        Self { pieces, piece: Vec::new() }
    }

    pub fn push(&mut self, change: &Change) -> Result<(), Abort> {
        serde_json::to_writer(&mut self.piece, change).map_err(|error| Abort::io("change", &error.into()))?;
        self.piece.push(b'\n');
        if self.piece.len() < CHUNK { Ok(()) } else { self.flush() }
    }

    pub fn flush(&mut self) -> Result<(), Abort> {
        if self.piece.is_empty() {
            return Ok(());
        }
        self.pieces.blocking_send(mem::take(&mut self.piece)).map_err(|_| Abort::Gone)
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    use serde_json::Value;

    use super::*;

    #[test]
    fn changes_are_written_as_the_host_reads_them() {
        let golden: Value = serde_json::from_str(include_str!("../../../../test/golden/agent-frames.json")).unwrap();
        let frames = golden["valid"].as_array().unwrap();
        let wanted = frames.iter().find(|frame| frame["name"] == "data, changes").unwrap()["bytes"].as_str().unwrap();
        let (pieces, mut written) = mpsc::channel(1);
        let mut lines = Lines::new(pieces);
        for change in [
            Change::Created { path: Path::new("a/ä") },
            Change::Modified { path: Path::new("a/ä") },
            Change::Moved { from: Path::new("a"), path: Path::new("b") },
            Change::Removed { path: Path::new(OsStr::from_bytes(b"b/\xff\"")) },
            Change::Lost,
        ] {
            lines.push(&change).unwrap();
        }
        lines.flush().unwrap();
        let bytes = written.try_recv().unwrap();
        assert_eq!(bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>(), wanted);
    }
}
