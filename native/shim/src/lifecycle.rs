//! What the guest reports of its end, and the output of a detached main command.

use crate::event::MainExit;
use crate::frame;
use crate::state::State;
use machinen_protocol::exit::{ExitReport, MAX_EXIT};
use machinen_protocol::frame::Kind;
use std::io::{self, ErrorKind};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// The most streams that are served at once. A guest announces one end, and has one main command whose output it sends.
pub const MAX_CALLS: usize = 8;
const BUFFER: usize = 16 * 1024;

/// Records frames until the `end` frame, and confirms that by closing the stream.
pub async fn record(mut stream: impl AsyncRead + AsyncWrite + Unpin, state: &State) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    while let Some(head) = frame::head(&mut stream).await? {
        let mut payload = (&mut stream).take(head.length.into());
        match head.kind() {
            Some(Kind::Stdout | Kind::Stderr) => {
                while let n @ 1.. = payload.read(&mut buffer).await? {
                    // A slow disk slows the command down.
                    state.output.write_all(&buffer[..n]).await;
                }
            }
            Some(Kind::End) if head.length as usize <= MAX_EXIT => {
                let mut json = Vec::new();
                payload.read_to_end(&mut json).await?;
                let ExitReport { code, signal, .. } = serde_json::from_slice(&json)?;
                state.announced(code.map(|code| MainExit { code, signal }));
                return stream.shutdown().await;
            }
            _ => return Err(ErrorKind::InvalidData.into()),
        }
    }
    Ok(())
}
