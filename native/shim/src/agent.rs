//! The shim's own requests to the guest's agent: to power off, and to set the clock.

use crate::{clock, frame, line};
use machinen_channel::Opener;
use machinen_protocol::frame::Kind;
use machinen_protocol::names::{CLOCK, POWER_OFF};
use machinen_protocol::ports::OPERATIONS;
use serde_json::{Value, json};
use std::io::{self, ErrorKind};
use std::path::PathBuf;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;

/// The length of the longest greeting, `OK 4294967295`.
const MAX_GREETING: usize = 13;

/// The connection to the agent.
#[derive(Clone)]
pub enum Agent {
    /// Through the shim's channel.
    Channel(Opener),
    /// Through the socket of a VMM that serves vsock itself.
    Socket(PathBuf),
}

impl Agent {
    /// Asks the guest to power off. Resolves when the guest has taken the request, is busy with it, or may still end for another reason.
    ///
    /// # Errors
    /// When no guest is connected, or the agent refuses: waiting is pointless then.
    pub async fn power_off(self) -> io::Result<()> {
        match self.ask(|| json!({"op": POWER_OFF})).await {
            // The guest is alive and holds all its streams.
            Err(error) if error.kind() == ErrorKind::ResourceBusy => Ok(()),
            asked => asked,
        }
    }

    /// Sets the guest's clock to the host's time, because a machine's clock stands still with the machine. Resolves when the guest has set
    /// it.
    ///
    /// # Errors
    /// When no guest is connected, it has no stream left, or the agent refuses.
    pub async fn set_clock(self) -> io::Result<()> {
        self.ask(|| json!({"op": CLOCK, "nowMs": clock::now_ms()})).await
    }

    /// Sends the request `what`, which is made only when there is a stream to send it on.
    async fn ask(self, what: impl Fn() -> Value) -> io::Result<()> {
        match self {
            Agent::Channel(opener) if !opener.is_connected() => Err(ErrorKind::NotConnected.into()),
            Agent::Channel(opener) => loop {
                match opener.open_urgent(OPERATIONS).await {
                    Ok(stream) => return request(stream, &what()).await,
                    // The session broke off: the agent is asked again in the next one.
                    Err(error) if error.kind() == ErrorKind::ConnectionReset => tokio::task::yield_now().await,
                    Err(error) => return Err(error),
                }
            },
            Agent::Socket(path) => {
                let mut socket = UnixStream::connect(path).await?;
                socket.write_all(format!("CONNECT {OPERATIONS}\n").as_bytes()).await?;
                let greeting = line::read(&mut socket, MAX_GREETING).await?;
                if !greeting.text.starts_with(b"OK ") {
                    return Err(ErrorKind::ConnectionRefused.into());
                }
                request(socket, &what()).await
            }
        }
    }
}

/// Sends the request and keeps the stream open until the guest ends it, because closing it early would cancel the operation.
async fn request(mut stream: impl AsyncRead + AsyncWrite + Unpin, what: &Value) -> io::Result<()> {
    stream.write_all(&frame::encode(Kind::Request, what.to_string().as_bytes())?).await?;
    stream.flush().await?;
    while let Ok(Some(head)) = frame::head(&mut stream).await {
        if head.kind() == Some(Kind::Error) {
            return Err(ErrorKind::Unsupported.into());
        }
        if tokio::io::copy(&mut (&mut stream).take(head.length.into()), &mut tokio::io::sink()).await.is_err() {
            break;
        }
    }
    Ok(())
}
