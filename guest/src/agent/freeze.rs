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
use super::threads::blocking;
use crate::reply::{Code, Done, ErrorReply};
use crate::request::Freeze;
use crate::system::cgroup;

/// How long the commands may take to stop, where the request does not say.
const TIMEOUT_MS: u64 = 5000;
/// The longest a request may ask for.
const MAX_TIMEOUT_MS: u64 = 60_000;

/// Freezes the commands until the host says `eof` or leaves. When its whole session ends instead, nothing is thawed: the next host
/// finds a copy.
pub async fn freeze<R, W>(context: &Context, request: &Freeze, exchange: &mut Exchange<R, W>) -> Result<Done, Abort>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    if request.sync {
        // On a thread: the agent must not stand still for as long as a slow disk takes.
        let synced = tokio::task::spawn_blocking(rustix::fs::sync);
        tokio::select! {
            biased;
            () = exchange.input.lost() => return Err(Abort::Gone),
            _ = synced => {}
        }
    }
    // Before anything stands still: in the original it takes its time as well.
    *context.identity_files() = Some(IdentityFiles::prepare(&context.root));
    if !context.gate.hold() {
        return Err(ErrorReply::new(Code::Busy, "a freeze is held already").into());
    }
    let held = hold(context, request, exchange).await;
    // From here to the open gate nothing may be awaited: a session must not end in between.
    if exchange.session_is_over() {
        return Err(Abort::Gone);
    }
    // The gate stays closed before commands that cannot be thawed.
    cgroup::thaw_workload().map_err(|error| Abort::io("thaw", &error))?;
    context.gate.open();
    held
}

async fn hold<R, W>(context: &Context, request: &Freeze, exchange: &mut Exchange<R, W>) -> Result<Done, Abort>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    stop_commands(limit(request.timeout_ms), &mut exchange.input).await?;
    // From now on no command changes them.
    context.identity_files().iter_mut().for_each(IdentityFiles::read);
    if !request.lazy_umount && !context.shares.is_empty() {
        // On a thread: the host may not answer for its directories.
        let shares = context.shares.clone();
        tokio::select! {
            biased;
            () = exchange.input.lost() => return Err(Abort::Gone),
            refused = blocking(move || shares::refuse_holders(&shares)) => refused??,
        }
    }
    exchange.output.send_json(Kind::Started, &Done {}).await?;
    match exchange.input.next().await? {
        Frame { kind: Kind::Eof, .. } => Ok(Done {}),
        Frame { kind, .. } => Err(Abort::bad(format!("unexpected {kind:?} frame"))),
    }
}

/// How long the commands may take to stop.
pub fn limit(timeout_ms: Option<u64>) -> Duration {
    Duration::from_millis(timeout_ms.unwrap_or(TIMEOUT_MS).min(MAX_TIMEOUT_MS))
}

/// Freezes the commands, as long as the host wants it.
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
        // A change since the file was read.
        events.ready(Interest::PRIORITY).await?.clear_ready();
    }
}
