//! The operation `freeze`: holds the commands still while the machine is being copied.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use machinen_protocol::frame::{Frame, Kind};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest};

use super::context::Context;
use super::exchange::Exchange;
use super::identity_files::IdentityFiles;
use super::shares;
use super::stream::{Abort, FrameReader};
use crate::reply::{Code, Done, ErrorReply};
use crate::request::Freeze;
use crate::system::cgroup;

/// How long the commands may take to stop if the request does not say.
const TIMEOUT_MS: u64 = 5000;
/// The longest a request may ask for.
const MAX_TIMEOUT_MS: u64 = 60_000;

/// Freezes the commands until the host says `eof` or leaves. If the whole session ends instead, nothing is thawed, because the next host
/// finds a copy.
pub async fn freeze<R, W>(context: &Context, request: &Freeze, exchange: &mut Exchange<R, W>) -> Result<Done, Abort>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    if request.sync {
        // On a thread, because the agent must not wait for a slow disk.
        let synced = tokio::task::spawn_blocking(rustix::fs::sync);
        tokio::select! {
            biased;
            () = exchange.input.lost() => return Err(Abort::Gone),
            _ = synced => {}
        }
    }
    // Prepared before anything stands still, because it takes time in the original too.
    *context.identity_files() = Some(IdentityFiles::prepare(&context.root));
    if !context.gate.hold() {
        return Err(ErrorReply::new(Code::Busy, "a freeze is held already").into());
    }
    let held = hold(context, request, exchange).await;
    // Nothing may be awaited from here until the gate is open, because a session must not end in between.
    if exchange.session_is_over() {
        return Err(Abort::Gone);
    }
    // If the commands cannot be thawed, the gate stays closed.
    cgroup::thaw_workload().map_err(|error| Abort::io("thaw", &error))?;
    context.resume_shares();
    context.gate.open();
    held
}

async fn hold<R, W>(context: &Context, request: &Freeze, exchange: &mut Exchange<R, W>) -> Result<Done, Abort>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    stop_commands(limit(request.timeout_ms), &mut exchange.input).await?;
    // Read now, because no command can change them any more.
    context.identity_files().iter_mut().for_each(IdentityFiles::read);
    if let Some(relay) = context.shares.get() {
        let locks = shares::drain(relay, limit(request.timeout_ms), &mut exchange.input).await?;
        shares::check_locks(&locks, request.lazy_umount)?;
    }
    exchange.output.send_json(Kind::Started, &Done {}).await?;
    match exchange.input.next().await? {
        Frame { kind: Kind::Eof, .. } => Ok(Done {}),
        Frame { kind, .. } => Err(Abort::bad(format!("unexpected {kind:?} frame"))),
    }
}

/// How long the commands may take to stop, from the request's `timeout_ms`.
pub fn limit(timeout_ms: Option<u64>) -> Duration {
    Duration::from_millis(timeout_ms.unwrap_or(TIMEOUT_MS).min(MAX_TIMEOUT_MS))
}

/// Freezes the commands. Gives up after `limit`, or when the host's stream is lost.
pub async fn stop_commands<R: AsyncRead + Unpin>(limit: Duration, input: &mut FrameReader<R>) -> Result<(), Abort> {
    tokio::select! {
        biased;
        () = input.lost() => Err(Abort::Gone),
        frozen = tokio::time::timeout(limit, freeze_workload()) => match frozen {
            Ok(frozen) => frozen.map_err(|error| Abort::io("freeze", &error)),
            Err(_) => {
                let message = format!("the commands did not freeze within {} ms", limit.as_millis());
                Err(ErrorReply::new(Code::Timeout, message).into())
            }
        },
    }
}

/// Freezes the commands and waits until the kernel says that all of them are.
async fn freeze_workload() -> io::Result<()> {
    for events in cgroup::freeze_workload()? {
        until_frozen(events.into()).await?;
    }
    Ok(())
}

async fn until_frozen(events: OwnedFd) -> io::Result<()> {
    // SAFETY: an OwnedFd is the same open descriptor for as long as it lives.
    let events = unsafe { AsyncFd::register_with_interest(events, Interest::PRIORITY)? };
    loop {
        let mut text = [0; 256];
        let n = rustix::io::pread(events.as_fd(), &mut text, 0)?;
        if cgroup::is_frozen(&text[..n]) {
            return Ok(());
        }
        // Waits until the file has changed since it was read.
        events.ready(Interest::PRIORITY).await?.clear_ready();
    }
}
