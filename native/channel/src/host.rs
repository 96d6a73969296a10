//! The host's end: says hello, and again whenever the session is lost.

use crate::frame::{Epoch, TAKEOVER_PADS};
use crate::link::{End, Link};
use crate::mux::Side;
use crate::stream::{Incoming, Opener, Running, Session};
use std::future::poll_fn;
use std::io;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, watch};

/// What a host holds of its channel.
pub struct HostSession<F> {
    /// Opens streams to the guest; waits while no session is up.
    pub opener: Opener,
    /// Streams the guest wants to open, of all sessions.
    pub incoming: mpsc::Receiver<Incoming>,
    /// Does the work and must be spawned. It ends when the port does, and all streams end with it.
    pub driver: F,
}

/// The host's end of the channel on `port`. `resume`: the guest was running before this host was there, and may be in the middle
/// of a session with another.
///
/// The hello may wait in the port until a guest that is still booting opens its end.
pub fn connect_host<T>(port: T, resume: bool) -> HostSession<impl Future<Output = io::Result<()>>>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let (incoming, arrivals) = mpsc::channel(Side::Guest.limit(true));
    let (current, opener) = watch::channel(None);
    let driver = async move {
        let mut link = Link::new(port);
        let mut pads = if resume { TAKEOVER_PADS } else { 0 };
        loop {
            let mut epoch = Epoch::default();
            getrandom::fill(&mut epoch)?;
            link.begin(&epoch, pads);
            if poll_fn(|cx| link.poll_hello(cx, Some(&epoch))).await?.is_none() {
                return Ok(());
            }
            let running = Running(Session::new(Side::Host, link.take_output()));
            current.send_replace(Some(running.0.clone()));
            let end = poll_fn(|cx| link.poll_session(cx, &running.0, &incoming)).await;
            drop(running);
            current.send_replace(None);
            match end {
                End::Hello(_) | End::OutOfSync => pads = TAKEOVER_PADS,
                End::Port(None) => return Ok(()),
                End::Port(Some(error)) => return Err(error),
            }
        }
    };
    HostSession { opener: Opener::new(opener), incoming: arrivals, driver }
}
