//! Guest to host: what a guest reaches when it dials a port of its host.

use crate::state::State;
use crate::{doorbell, lifecycle, proxy};
use machinen_channel::Incoming;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

/// Where a listener for a port of the host is to be found.
pub fn socket(vsock_path: &Path, port: u32) -> PathBuf {
    let mut path = vsock_path.as_os_str().to_owned();
    path.push(format!("_{port}"));
    path.into()
}

/// Serves what the guest opens, until the channel ends and everything that came over it is dealt with.
pub async fn serve(mut arrivals: mpsc::Receiver<Incoming>, vsock_path: PathBuf, state: Arc<State>) {
    let mut calls = JoinSet::new();
    while let Some(incoming) = arrivals.recv().await {
        while calls.try_join_next().is_some() {}
        let listener = socket(&vsock_path, incoming.port);
        calls.spawn(call(incoming, listener, Arc::clone(&state)));
    }
    while calls.join_next().await.is_some() {}
}

/// A call that fails has ended for the guest as well; there is nobody else to tell.
async fn call(incoming: Incoming, listener: PathBuf, state: Arc<State>) -> io::Result<()> {
    match incoming.port {
        lifecycle::PORT => lifecycle::record(incoming.accept().await?, &state).await,
        doorbell::PORT => doorbell::answer(incoming, &listener, &state).await,
        _ => match UnixStream::connect(listener).await {
            Ok(socket) => proxy::run(socket, incoming.accept().await?).await,
            Err(_) => {
                incoming.refuse().await;
                Ok(())
            }
        },
    }
}

/// The lifecycle port of a VMM that brings the guest's calls to sockets itself.
pub async fn serve_lifecycle(listener: UnixListener, state: Arc<State>, mut over: watch::Receiver<bool>) {
    let mut calls = JoinSet::new();
    loop {
        tokio::select! {
            biased;
            // One VM announces one end; whoever calls more often waits.
            Ok((stream, _)) = listener.accept(), if calls.len() < 8 => {
                let state = Arc::clone(&state);
                calls.spawn(async move { lifecycle::record(stream, &state).await });
            }
            Some(_) = calls.join_next() => {}
            () = async { drop(over.wait_for(|over| *over).await) } => break,
        }
    }
    while calls.join_next().await.is_some() {}
}
