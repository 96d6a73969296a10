//! Notices that a peer is gone, as opposed to one that has only finished sending.

use std::io;
use std::os::fd::AsFd;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;

/// Resolves when the peer has closed its socket (or both ends together have shut down both directions).
///
/// Epoll always reports a hang-up, and with this interest nothing else. It watches a duplicate, because a descriptor can be registered only
/// once.
pub fn peer_closed(peer: &UnixStream) -> io::Result<impl Future<Output = ()> + use<>> {
    let duplicate = peer.as_fd().try_clone_to_owned()?;
    // SAFETY: the descriptor is always the same, and open until AsyncFd, which owns it, has deregistered it.
    let watched = unsafe { AsyncFd::register_with_interest(duplicate, Interest::PRIORITY) }?;
    Ok(async move {
        // Waiting fails only together with the runtime.
        let _ = watched.ready(Interest::PRIORITY).await;
    })
}
