//! Carries bytes between a socket on the host and a stream to the guest.

use crate::peer_closed::peer_closed;
use std::io;
use std::pin::pin;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, split};
use tokio::net::UnixStream;

const BUFFER: usize = 64 * 1024;

/// Copies in both directions until both have ended; each end is passed on separately. When the socket breaks or its peer is gone, the
/// guest's side is dropped, so that the guest learns it. A guest that takes no more may have sent the reason. So that a peer which is still
/// sending can read it before its socket breaks, the rest of what the peer sends is read and dropped.
pub async fn run(mut socket: UnixStream, stream: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
    let gone = peer_closed(&socket)?;
    let (mut from_socket, mut to_socket) = socket.split();
    let (mut from_guest, mut to_guest) = split(stream);
    let mut to_guest = pin!(copy_while_heard(&mut from_socket, &mut to_guest));
    let mut to_host = pin!(copy(&mut from_guest, &mut to_socket));
    tokio::select! {
        sent = &mut to_guest => sent?,
        received = &mut to_host => {
            received?;
            return to_guest.await;
        }
    }
    // Everything the peer sent is under way. From here on it matters whether the peer is still there to read the answer.
    tokio::select! {
        received = to_host => received,
        () = gone => Ok(()),
    }
}

/// Copies until `from` ends. When `to` takes no more, the rest is dropped.
async fn copy_while_heard(from: &mut (impl AsyncRead + Unpin), to: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
    let (mut buffer, mut heard) = (vec![0; BUFFER], true);
    loop {
        match from.read(&mut buffer).await? {
            0 if heard => return to.shutdown().await,
            0 => return Ok(()),
            n => heard = heard && to.write_all(&buffer[..n]).await.is_ok(),
        }
    }
}

async fn copy(from: &mut (impl AsyncRead + Unpin), to: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        match from.read(&mut buffer).await? {
            0 => return to.shutdown().await,
            n => to.write_all(&buffer[..n]).await?,
        }
    }
}
