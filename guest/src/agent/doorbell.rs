//! The doorbell: the guest announces itself to its host, and the host answers with its clock.

use std::io;

use machinen_channel::Opener;
use machinen_protocol::doorbell::{Answer, MAX_ANSWER, Ring, VERSION};
use machinen_protocol::ports::DOORBELL;
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::clock;

/// A clock that differs by no more than this is not set.
const TOLERANCE_MS: u64 = 2;

/// Rings, runs `meanwhile` while the host acts on that, and sets the clock to the host's time. A host that does not listen is no error.
pub async fn ring(opener: &Opener, meanwhile: impl FnOnce()) {
    let mut stream = match opener.open(DOORBELL).await {
        Ok(stream) => stream,
        Err(_) => return meanwhile(),
    };
    let rung = send_line(&mut stream, &Ring { version: VERSION, agent: env!("CARGO_PKG_VERSION") }).await;
    // Gives the channel's own task the chance to send.
    tokio::task::yield_now().await;
    meanwhile();
    if rung.is_ok() {
        // After a wrong answer the clock stays as it is.
        let _ = set_clock(&mut stream).await;
        let _ = stream.shutdown().await;
    }
}

async fn send_line(stream: &mut (impl AsyncWrite + Unpin), message: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    stream.write_all(&line).await
}

async fn set_clock(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<()> {
    let mut line = Vec::new();
    let mut limited = stream.take(MAX_ANSWER as u64);
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
