//! What the shim itself says to the guest and hears from it: doorbell, announcements, power-off.

use crate::event::Status;
use crate::frame;
use crate::vm::Vm;
use machinen_channel::Opener;
use serde::Deserialize;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;

/// The guest's agent.
const AGENT: u32 = 1978;
/// The guest rings when it can serve.
pub const DOORBELL: u32 = 1979;
/// Output of a detached main command, and the announcement of a power-off.
pub const LIFECYCLE: u32 = 1980;

/// How long the guest may take to ring.
const RING: Duration = Duration::from_secs(10);
/// Longest ring.
const MAX_RING: u64 = 64 * 1024;

/// A way into the guest.
#[derive(Clone, Debug)]
pub enum Door {
    /// The channel this shim keeps.
    Channel(Opener),
    /// The hybrid vsock socket the VMM keeps.
    Vsock(PathBuf),
    None,
}

impl Door {
    /// Asks the agent to power off, and waits until it has done with the request. An error: it could not be asked.
    pub async fn power_off(&self) -> io::Result<()> {
        match self {
            // Not up: nobody to ask, and nothing to wait for.
            Door::Channel(opener) if opener.is_connected() => request_power_off(opener.open(AGENT).await?).await,
            Door::Vsock(path) => request_power_off(dial(path, AGENT).await?).await,
            Door::Channel(_) | Door::None => Err(io::ErrorKind::NotConnected.into()),
        }
    }
}

async fn request_power_off(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
    stream.write_all(&frame::request(r#"{"op":"poweroff"}"#)).await?;
    // The stream is kept open until the guest closes it: closing it would take the request back.
    let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
    Ok(())
}

/// Connects to a guest port through a hybrid vsock socket.
async fn dial(path: &Path, port: u32) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(path).await?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
    let mut greeting = Vec::new();
    while greeting.last() != Some(&b'\n') {
        if greeting.len() > 32 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        greeting.push(stream.read_u8().await?);
    }
    if greeting.starts_with(b"OK ") { Ok(stream) } else { Err(io::ErrorKind::ConnectionRefused.into()) }
}

/// Answers the doorbell in place of a starter that is gone: the guest gets its clock.
pub async fn answer_doorbell(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
    let mut ring = tokio::io::BufReader::with_capacity(512, (&mut stream).take(MAX_RING));
    let mut line = Vec::new();
    let heard = tokio::io::AsyncBufReadExt::read_until(&mut ring, b'\n', &mut line);
    tokio::time::timeout(RING, heard).await.map_err(|_| io::ErrorKind::TimedOut)??;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
    stream.write_all(format!("{{\"nowMs\":{now}}}\n").as_bytes()).await?;
    stream.shutdown().await
}

/// `end` frames carry at least this when there was a main command.
#[derive(Deserialize)]
struct MainEnd {
    code: i32,
    signal: Option<i32>,
}

/// Records what the guest says about its main command and its power-off.
pub async fn hear_lifecycle(mut stream: impl AsyncRead + AsyncWrite + Unpin, vm: &Vm) -> io::Result<()> {
    let mut payload = Vec::new();
    while let Some(kind) = frame::read(&mut stream, &mut payload).await? {
        match kind {
            frame::STDOUT | frame::STDERR => vm.output.append(&payload),
            frame::END => {
                let main = serde_json::from_slice::<MainEnd>(&payload).ok();
                vm.announce(main.map(|end| Status { code: Some(end.code), signal: end.signal }));
            }
            // A frame of a later version.
            _ => {}
        }
    }
    stream.shutdown().await
}
