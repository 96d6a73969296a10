//! The doorbell: the guest calls when its agent can serve.

use crate::state::State;
use crate::{line, proxy};
use machinen_channel::Incoming;
use std::io;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

/// The longest message of a guest, in bytes.
const MAX_LINE: usize = 4096;

/// Passes the call on to the starter that listens for it. Where none does, the shim answers with the time.
pub async fn answer(incoming: Incoming, listener: &Path, state: &State) -> io::Result<()> {
    let waiting = UnixStream::connect(listener).await;
    let mut stream = incoming.accept().await?;
    // Before the starter hears of it: the entry must say so by then.
    state.ready();
    match waiting {
        Ok(socket) => proxy::run(socket, stream).await,
        Err(_) => {
            line::read(&mut stream, MAX_LINE).await?;
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_millis());
            stream.write_all(format!("{{\"nowMs\":{now}}}\n").as_bytes()).await?;
            stream.shutdown().await
        }
    }
}
