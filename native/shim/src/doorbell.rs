//! The doorbell: the guest calls when its agent can serve.

use crate::state::State;
use crate::{clock, line, proxy};
use machinen_channel::Incoming;
use machinen_protocol::doorbell::{Answer, MAX_RING};
use std::io;
use std::path::Path;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

/// Passes the call on to the starter that listens for it. Where none does, the shim answers with the time.
pub async fn answer(incoming: Incoming, listener: &Path, state: &State) -> io::Result<()> {
    let waiting = UnixStream::connect(listener).await;
    let mut stream = incoming.accept().await?;
    // Before the starter hears of it: the entry must say so by then.
    state.ready();
    match waiting {
        Ok(socket) => proxy::run(socket, stream).await,
        Err(_) => {
            line::read(&mut stream, MAX_RING).await?;
            line::answer(&mut stream, &serde_json::to_value(Answer { now_ms: clock::now_ms() })?).await?;
            stream.shutdown().await
        }
    }
}
