//! The doorbell: the guest announces itself to its host, and the host answers with its clock.

use std::io;

use machinen_channel::Opener;
use machinen_protocol::ports::DOORBELL;
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::clock;

/// A clock that differs by no more than this is not set.
const TOLERANCE_MS: u64 = 2;
/// The longest answer that is read, in bytes. An answer holds one number.
const MAX_ANSWER: u64 = 1024;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Answer {
    now_ms: u64,
}

/// Rings, runs `meanwhile` while the host acts on that, and sets the clock to the host's time. A host that does not listen is no error.
pub async fn ring(opener: &Opener, meanwhile: impl FnOnce()) {
    let mut stream = match opener.open(DOORBELL).await {
        Ok(stream) => stream,
        Err(_) => return meanwhile(),
    };
    let line = format!("{{\"version\":1,\"agent\":\"{}\"}}\n", env!("CARGO_PKG_VERSION"));
    let rung = stream.write_all(line.as_bytes()).await;
    // Gives the channel's own task the chance to send.
    tokio::task::yield_now().await;
    meanwhile();
    if rung.is_ok() {
        // After a wrong answer the clock stays as it is.
        let _ = set_clock(&mut stream).await;
        let _ = stream.shutdown().await;
    }
}

async fn set_clock(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> io::Result<()> {
    let mut line = Vec::new();
    let mut limited = stream.take(MAX_ANSWER);
    while line.last() != Some(&b'\n') {
        if limited.read_buf(&mut line).await? == 0 {
            break;
        }
    }
    let Answer { now_ms } = serde_json::from_slice(&line)?;
    if clock::now_ms().abs_diff(now_ms) > TOLERANCE_MS {
        clock::set(now_ms)?;
    }
    Ok(())
}
