//! A child process: its pid is its own until it has been waited for.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, WaitIdStatus, pidfd_open, waitid};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A child that was started and not yet reaped.
pub struct Child(AsyncFd<OwnedFd>);

impl Child {
    pub fn of(pid: Pid) -> io::Result<Self> {
        Self::by_pidfd(pidfd_open(pid, PidfdFlags::empty())?)
    }

    pub fn by_pidfd(pidfd: OwnedFd) -> io::Result<Self> {
        // SAFETY: an OwnedFd is the same open descriptor for as long as it lives.
        Ok(Self(unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE)? }))
    }

    /// Waits until the child has ended, without reaping it.
    pub async fn ended(&self) -> io::Result<()> {
        loop {
            let mut guard = self.0.readable().await?;
            if self.look(WaitIdOptions::NOWAIT)?.is_some() {
                guard.retain_ready();
                return Ok(());
            }
            guard.clear_ready();
        }
    }

    /// Waits until the child has ended (not for the processes it started) and reaps it.
    pub async fn wait(&self) -> io::Result<WaitIdStatus> {
        self.ended().await?;
        self.reap()
    }

    /// Reaps the child, which must have ended.
    pub fn reap(&self) -> io::Result<WaitIdStatus> {
        self.look(WaitIdOptions::empty())?.ok_or_else(|| io::ErrorKind::WouldBlock.into())
    }

    /// How the child ended, or `None` while it runs.
    fn look(&self, how: WaitIdOptions) -> io::Result<Option<WaitIdStatus>> {
        Ok(waitid(WaitId::PidFd(self.0.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG | how)?)
    }

    /// Kills it alone, without what it has started. A child that has ended already is no error.
    pub fn kill(&self) {
        let _ = rustix::process::pidfd_send_signal(&self.0, Signal::KILL);
    }
}
