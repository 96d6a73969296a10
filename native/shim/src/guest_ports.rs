//! Guest to host: serves the streams that a guest opens to ports of its host.

use crate::accept::next_client;
use crate::state::State;
use crate::{doorbell, lifecycle, proxy};
use machinen_channel::Incoming;
use machinen_protocol::ports;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;

/// The most calls that are served at once, with those of earlier sessions.
const MAX_CALLS: usize = 2 * machinen_channel::MAX_GUEST_STREAMS;

/// The path of the socket that stands for a port of the host.
pub fn socket(vsock_path: &Path, port: u32) -> PathBuf {
    let mut path = vsock_path.as_os_str().to_owned();
    path.push(format!("_{port}"));
    path.into()
}

/// Serves the guest's streams until the channel has ended and all of them are done.
pub async fn serve(mut arrivals: mpsc::Receiver<Incoming>, vsock_path: PathBuf, state: Arc<State>) {
    let mut calls = JoinSet::new();
    let lifecycle = Arc::new(Semaphore::new(lifecycle::MAX_CALLS));
    while let Some(incoming) = arrivals.recv().await {
        while calls.try_join_next().is_some() {}
        // One session has fewer. Calls of an earlier session may wait for a socket whose peer does not read.
        if calls.len() >= MAX_CALLS {
            incoming.refuse();
            continue;
        }
        let listener = socket(&vsock_path, incoming.port);
        calls.spawn(call(incoming, listener, Arc::clone(&state), Arc::clone(&lifecycle)));
    }
    while calls.join_next().await.is_some() {}
}

/// Serves one call. A failure ends the stream, which tells the guest.
async fn call(incoming: Incoming, listener: PathBuf, state: Arc<State>, lifecycle: Arc<Semaphore>) -> io::Result<()> {
    match incoming.port {
        ports::LIFECYCLE => match lifecycle.try_acquire() {
            Ok(_call) => lifecycle::record(incoming.accept().await?, &state).await,
            Err(_) => {
                incoming.refuse();
                Ok(())
            }
        },
        ports::DOORBELL => doorbell::answer(incoming, &listener, &state).await,
        _ => match UnixStream::connect(listener).await {
            Ok(socket) => proxy::run(socket, incoming.accept().await?).await,
            Err(_) => {
                incoming.refuse();
                Ok(())
            }
        },
    }
}

/// Serves the lifecycle port of a VMM that passes the guest's calls to sockets itself.
pub async fn serve_lifecycle(listener: UnixListener, state: Arc<State>, mut over: watch::Receiver<bool>) {
    let mut calls = JoinSet::new();
    loop {
        tokio::select! {
            biased;
            // A VM announces one end. Further calls wait.
            stream = next_client(&listener), if calls.len() < lifecycle::MAX_CALLS => {
                let state = Arc::clone(&state);
                calls.spawn(async move { lifecycle::record(stream, &state).await });
            }
            Some(_) = calls.join_next() => {}
            () = async { drop(over.wait_for(|over| *over).await) } => break,
        }
    }
    while calls.join_next().await.is_some() {}
}
