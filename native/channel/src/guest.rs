//! The guest's end: answers hellos, serves sessions.

use crate::link::{End, Link};
use crate::mux::Side;
use crate::stream::{Incoming, Opener, Running, Session};
use std::future::poll_fn;
use std::io;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, watch};

/// Serves one session after the other on `port` until it reaches end of file.
///
/// `on_session` is called when a host has said hello; it is expected to spawn whatever serves the receiver. When the next host
/// says hello, or the bytes make no sense, the streams of the session end with an error and its receiver ends.
///
/// # Errors
/// Those of the port.
pub async fn serve_guest<T, F>(port: T, mut on_session: F) -> io::Result<()>
where
    T: AsyncRead + AsyncWrite + Unpin,
    F: FnMut(Opener, mpsc::Receiver<Incoming>),
{
    let mut link = Link::new(port);
    let mut next = None;
    loop {
        let epoch = match next.take() {
            Some(epoch) => epoch,
            None => match poll_fn(|cx| link.poll_hello(cx, None)).await? {
                Some(epoch) => epoch,
                None => return Ok(()),
            },
        };
        link.begin(&epoch, 0);
        let (incoming, arrivals) = mpsc::channel(Side::Host.limit(true));
        let running = Running(Session::new(Side::Guest, link.take_output()));
        // The sender is kept so that the opener tells "over" from "not yet".
        let (_current, current) = watch::channel(Some(running.0.clone()));
        on_session(Opener::new(current), arrivals);
        let end = poll_fn(|cx| link.poll_session(cx, &running.0, &incoming)).await;
        let unsent = running.0.lock().end();
        match end {
            End::Hello(epoch) => next = Some(epoch),
            End::OutOfSync => link.announce_end(unsent.into_bytes()),
            End::Port(None) => return Ok(()),
            End::Port(Some(error)) => return Err(error),
        }
    }
}
