//! What remains to be done when the maker of a snapshot is gone.

use crate::control::MAX_LINE;
use crate::{cleanup, line};
use serde::Deserialize;
use serde_json::Value;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::time::timeout;

/// How long whoever is there has for all lines.
const PATIENCE: Duration = Duration::from_secs(2);

#[derive(Deserialize)]
pub struct Undo {
    pub remove: Vec<PathBuf>,
    pub socket: Option<PathBuf>,
    pub lines: Vec<String>,
}

impl Undo {
    /// Lines first: a VM may be standing still.
    pub async fn run(self) {
        if let Some(socket) = &self.socket
            && !self.lines.is_empty()
        {
            // A VMM that has ended, or does not answer, needs no more.
            let _ = timeout(PATIENCE, say(socket, &self.lines)).await;
        }
        let remove = move || self.remove.iter().for_each(|path| cleanup::remove(path));
        let _ = tokio::task::spawn_blocking(remove).await;
    }
}

/// Sends each line after the answer to the one before, the first one after the peer's greeting, and leaves after the last answer: a
/// VMM may drop what it has not yet dealt with when its client leaves.
async fn say(socket: &Path, lines: &[String]) -> io::Result<()> {
    let mut peer = UnixStream::connect(socket).await?;
    let mut rest = Vec::new();
    line::next(&mut peer, &mut rest, MAX_LINE).await?;
    for line in lines {
        peer.write_all(format!("{line}\n").as_bytes()).await?;
        while is_event(&line::next(&mut peer, &mut rest, MAX_LINE).await?) {}
    }
    Ok(())
}

/// Whether it is something QMP says without being asked.
fn is_event(line: &[u8]) -> bool {
    serde_json::from_slice::<Value>(line).is_ok_and(|line| line.get("event").is_some())
}
