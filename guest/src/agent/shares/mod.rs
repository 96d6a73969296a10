//! Shared directories (live mounts) of the running machine.

mod invalidation;
mod messages;
pub mod relay;

use std::fs::{self, OpenOptions};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use machinen_protocol::ports::SHARE;
use tokio::io::AsyncRead;

use super::context::Context;
use super::port;
use super::stream::{Abort, FrameReader};
use crate::config::Share;
use crate::reply::{Code, ErrorReply};
use crate::request::ShareMode;
use crate::system::shares;
use crate::system::step::{Failed, Step};
use relay::{Lock, Relay};

/// How long a copy waits for news of its shared directories.
const CATCHES_UP_WITHIN: Duration = Duration::from_secs(5);
/// How long an operation waits for news of shared directories.
const SETTLES_WITHIN: Duration = Duration::from_secs(1);
/// How many holders an error names.
const NAMED: usize = 8;

/// Mounts the shares of a machine that has some. From then on they are served by the port to the host's file server.
pub async fn mount(context: &Context, shares: &[Share]) -> Result<(), Failed> {
    if shares.is_empty() {
        return Ok(());
    }
    let device = port::find(SHARE).await.step("shared directories")?;
    let port = OpenOptions::new().read(true).write(true).open(&device).step(device)?;
    let (kernel, connection) = shares::mount_all()?;
    let relay = Relay::start(kernel, port, Some(connection), shares.to_vec()).step("shared directories")?;
    shares::mount_each(shares)?;
    // Shares are mounted once in the life of a machine.
    let _ = context.shares.set(relay);
    Ok(())
}

/// Waits until no request for a shared directory is under way. Returns the locks that are held.
pub async fn drain<R: AsyncRead + Unpin>(
    relay: &Arc<Relay>,
    limit: Duration,
    input: &mut FrameReader<R>,
) -> Result<Vec<Lock>, Abort> {
    tokio::select! {
        biased;
        () = input.lost() => Err(Abort::Gone),
        drained = tokio::time::timeout(limit, relay.drain()) => drained.map_err(|_| {
            let message = "the host does not answer for its shared directories".to_owned();
            ErrorReply::new(Code::Timeout, message).into()
        }),
    }
    .map(|locks| locks.into_iter().map(|Lock { pid, path }| Lock { pid, path: place(&relay.shares, &path) }).collect())
}

/// Where the guest has what the host's file server calls by a share's tag and a path in it.
fn place(shares: &[Share], path: &str) -> String {
    let (tag, _) = path.split_once('/').unwrap_or((path, ""));
    let share = shares.iter().find(|share| share.tag == tag);
    share.map_or_else(|| path.to_owned(), |share| format!("{}{}", share.guest, &path[tag.len()..]))
}

/// Lets the requests of a copy go on, once the kernel knows what changed on the host since the freeze.
pub async fn resume_copy(context: &Context) {
    let Some(relay) = context.shares.get() else { return };
    relay.resume();
    // A server that does not answer must not keep the commands from going on: they find it out where they need it.
    let _ = tokio::time::timeout(CATCHES_UP_WITHIN, relay.caught_up()).await;
}

/// Makes the mounts of a copy read-only or writable, as this copy was given them.
///
/// # Errors
/// The first that could not be changed. It stays as it was.
pub async fn set_modes(modes: Vec<ShareMode>) -> io::Result<()> {
    // On a thread, because the way to a place may lead through another share.
    let changing = tokio::task::spawn_blocking(move || {
        modes.iter().try_for_each(|ShareMode { guest, read_only }| {
            let failed = |error| io::Error::other(format!("{guest}: {error}"));
            shares::set_read_only(guest, *read_only).map_err(failed)
        })
    });
    tokio::time::timeout(CATCHES_UP_WITHIN, changing).await??
}

/// Waits until the kernel knows what the host has changed in shares before this, so that an operation sees it. Changes are told within a moment
/// in any case; this is for a caller that changes a file and then has a command read it.
pub async fn settle(context: &Context) {
    let Some(relay) = context.shares.get() else { return };
    // A server that does not answer must not hold up operations.
    let _ = tokio::time::timeout(SETTLES_WITHIN, relay.settle()).await;
}

/// Fails if processes hold locks, which a copy cannot have beside its original, unless they `may_be_lost`.
pub fn check_locks(locks: &[Lock], may_be_lost: bool) -> Result<(), ErrorReply> {
    if locks.is_empty() || may_be_lost {
        return Ok(());
    }
    let named = locks.iter().take(NAMED).map(|Lock { pid, path }| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        format!("{pid} ({}) {path}", name.trim_end())
    });
    let mut message = format!("files on shared directories are locked: {}", named.collect::<Vec<_>>().join(", "));
    let more = locks.len().saturating_sub(NAMED);
    if more > 0 {
        message.push_str(&format!(", and {more} more"));
    }
    Err(ErrorReply::new(Code::MountBusy, message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_named_by_their_places_in_the_guest() {
        let share = |tag: &str, guest: &str| Share { tag: tag.into(), guest: guest.into(), read_only: false };
        let shares = [share("machinen-lm1", "/work"), share("machinen-lm10", "/etc/hosts")];
        for (path, expected) in [
            ("machinen-lm1/a/b", "/work/a/b"),
            ("machinen-lm10", "/etc/hosts"),
            ("machinen-lm1/", "/work/"),
            ("machinen-lm2/a", "machinen-lm2/a"),
        ] {
            assert_eq!(place(&shares, path), expected);
        }
    }
}
