//! Undoes a snapshot whose maker is gone.

use crate::agent::Agent;
use crate::cleanup;
use crate::line::{self, MAX_LINE};
use serde::Deserialize;
use serde_json::Value;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::time::timeout;

/// The time limit for all lines to the VMM, and for setting the guest's clock.
const PATIENCE: Duration = Duration::from_secs(2);

#[derive(Deserialize)]
pub struct Undo {
    pub remove: Vec<PathBuf>,
    pub socket: Option<PathBuf>,
    pub lines: Vec<String>,
}

impl Undo {
    /// Sends the lines first, because the VM may be standing still. Once the VM goes on, the guest's clock is set, as the maker would have
    /// done.
    pub async fn run(self, agent: Agent) {
        if let Some(socket) = &self.socket
            && !self.lines.is_empty()
        {
            // A VMM that has ended or does not answer gets nothing more. A guest that does not answer keeps its clock.
            if let Ok(Ok(())) = timeout(PATIENCE, say(socket, &self.lines)).await {
                let _ = timeout(PATIENCE, agent.set_clock()).await;
            }
        }
        let remove = move || self.remove.iter().for_each(|path| cleanup::remove(path));
        let _ = tokio::task::spawn_blocking(remove).await;
    }
}

/// Sends each line after the answer to the previous one, the first after the peer's greeting. Leaves only after the last answer, because a
/// VMM may drop unhandled commands when its client leaves.
async fn say(socket: &Path, lines: &[String]) -> io::Result<()> {
    let mut peer = UnixStream::connect(socket).await?;
    let mut rest = Vec::new();
    line::next(&mut peer, &mut rest, MAX_LINE).await?;
    for line in lines {
        peer.write_all(format!("{line}\n").as_bytes()).await?;
        // Answers to the previous client's commands may be of any length, and are skipped; those to the lines here are short.
        while !is_answer(&line::next_short(&mut peer, &mut rest, MAX_LINE).await?, line) {}
    }
    Ok(())
}

/// Whether `answer` belongs to the line `to`, by the `id` of both. It may also be an event of QMP, or the answer to a client that is gone.
fn is_answer(answer: &[u8], to: &str) -> bool {
    let id = serde_json::from_str::<Value>(to).ok().and_then(|line| line.get("id").cloned());
    serde_json::from_slice::<Value>(answer)
        .map_or(id.is_none(), |answer| answer.get("event").is_none() && answer.get("id") == id.as_ref())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_has_the_id_of_its_question() {
        let asked = r#"{"execute":"cont","id":"undo-1"}"#;
        assert!(is_answer(br#"{"return":{},"id":"undo-1"}"#, asked));
        for stale in
            [r#"{"return":{}}"#, r#"{"return":{},"id":"7"}"#, r#"{"event":"RESUME","id":"undo-1"}"#, "nonsense"]
        {
            assert!(!is_answer(stale.as_bytes(), asked), "{stale}");
        }
        assert!(is_answer(br#"{"return":{}}"#, "no question with an id"));
        assert!(!is_answer(br#"{"event":"RESUME"}"#, "no question with an id"));
    }
}
