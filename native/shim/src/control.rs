//! The control socket: each connection carries one request, a JSON line. Only `capture` takes further lines.

use crate::accept::Reserve;
use crate::capture;
use crate::event::Reason;
use crate::line::{self, MAX_LINE, answer};
use crate::log::Log;
use crate::peer_closed::peer_closed;
use crate::state::State;
use crate::stop::Ask;
use serde::Deserialize;
use serde_json::json;
use std::io;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// The most clients that are served at once; further ones wait.
const MAX_CLIENTS: usize = 128;
/// The most clients that may stay for long (`wait`, `logs`, `capture`). The rest is for requests that are answered at once.
const MAX_STAYING: usize = 96;
const BUFFER: usize = 64 * 1024;

#[derive(Deserialize)]
#[serde(tag = "op", rename_all = "camelCase", rename_all_fields = "camelCase")]
enum Request {
    Stop {
        grace_ms: Option<u64>,
    },
    Kill,
    Wait,
    Detach,
    Logs {
        source: Source,
        #[serde(default)]
        follow: bool,
        tail_bytes: Option<u64>,
    },
    Status,
    Name {
        name: Option<String>,
        pin: Option<PathBuf>,
    },
    Capture(capture::Request),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
enum Source {
    Console,
    Output,
}

/// Serves clients until the VM has ended, and those that wait for its end until they have been told.
pub async fn serve(listener: UnixListener, state: Arc<State>) {
    let mut clients = JoinSet::new();
    let mut reserve = Reserve::new();
    let staying = Arc::new(Semaphore::new(MAX_STAYING));
    let mut exited = state.exited.subscribe();
    loop {
        tokio::select! {
            // Clients that connected before the socket was removed are served.
            biased;
            client = reserve.accept(&listener), if clients.len() < MAX_CLIENTS => {
                clients.spawn(serve_client(client, Arc::clone(&state), Arc::clone(&staying)));
            }
            Some(_) = clients.join_next() => reserve.refill(),
            () = async { drop(exited.wait_for(Option::is_some).await) } => break,
        }
    }
    drop(listener);
    while clients.join_next().await.is_some() {}
}

async fn serve_client(mut client: UnixStream, state: Arc<State>, staying: Arc<Semaphore>) -> io::Result<()> {
    let line = line::read(&mut client, MAX_LINE).await;
    let request = line.map_err(|error| error.to_string()).and_then(|line| {
        let request = serde_json::from_slice::<Request>(&line.text).map_err(|error| error.to_string())?;
        Ok((request, line.rest))
    });
    let (request, rest) = match request {
        Ok(request) => request,
        Err(message) => return answer(&mut client, &json!({"ok": false, "message": message})).await,
    };
    let stays = matches!(request, Request::Wait | Request::Logs { .. } | Request::Capture(_));
    let _stay = match staying.try_acquire() {
        Err(_) if stays => {
            let message = format!("{MAX_STAYING} clients wait or read logs already");
            return answer(&mut client, &json!({"ok": false, "code": "EBUSY", "message": message})).await;
        }
        permit => permit.ok().filter(|_| stays),
    };
    match request {
        Request::Stop { grace_ms } => {
            end(&mut client, &state, Reason::Stop, Ask::Stop(grace_ms.map(Duration::from_millis))).await
        }
        Request::Kill => end(&mut client, &state, Reason::Kill, Ask::Kill).await,
        Request::Wait => {
            answer(&mut client, &json!({"ok": true})).await?;
            exited(&mut client, &state).await
        }
        Request::Detach => {
            state.detach();
            answer(&mut client, &json!({"ok": true})).await
        }
        Request::Logs { source, follow, tail_bytes } => {
            let log = match source {
                Source::Console => &state.console.log,
                Source::Output => &state.output,
            };
            answer(&mut client, &json!({"ok": true})).await?;
            send_log(&mut client, log, follow, tail_bytes).await
        }
        Request::Status => {
            let uptime = u64::try_from(state.since.elapsed().as_millis()).unwrap_or(u64::MAX);
            let (ready, detached) = (state.is_ready(), state.is_detached());
            answer(&mut client, &json!({"ok": true, "ready": ready, "detached": detached, "uptimeMs": uptime})).await
        }
        Request::Name { name, pin } => {
            let named = state.entry().named(name.as_deref(), pin);
            let said = match named {
                Ok(()) => json!({"ok": true}),
                Err(error) => json!({"ok": false, "message": error.to_string()}),
            };
            answer(&mut client, &said).await
        }
        Request::Capture(request) => capture::serve(&mut client, rest, request, &state).await,
    }
}

/// Asks the supervisor to end the VM, for a client that may not stay to see it.
async fn end(client: &mut UnixStream, state: &State, reason: Reason, ask: Ask) -> io::Result<()> {
    state.asked(reason);
    // Sending fails only when the VM has ended, which is what was asked for.
    let _ = state.asks.send(ask).await;
    answer(client, &json!({"ok": true})).await?;
    exited(client, state).await
}

async fn exited(client: &mut UnixStream, state: &State) -> io::Result<()> {
    let mut exited = state.exited.subscribe();
    let watched = peer_closed(client);
    let gone = async {
        match watched {
            Ok(gone) => gone.await,
            // Out of descriptors: a client that leaves is noticed only when the VM ends.
            Err(_) => std::future::pending().await,
        }
    };
    let event = tokio::select! {
        event = async { exited.wait_for(Option::is_some).await.ok().and_then(|event| event.clone()) } => event,
        () = gone => return Ok(()),
    };
    client.write_all(event.as_deref().unwrap_or_default().as_bytes()).await
}

/// Sends a log from its beginning, or from `tail` bytes before its end, to its present end; with `follow`, to its end with the VM. A client
/// that is slower than two rotations misses what was rotated away.
async fn send_log(client: &mut UnixStream, log: &Log, follow: bool, tail: Option<u64>) -> io::Result<()> {
    let mut news = log.subscribe();
    let mut extent = news.borrow_and_update().clone();
    let limit = if follow { u64::MAX } else { extent.end };
    let mut at = tail.map_or(0, |tail| extent.end.saturating_sub(tail));
    let mut gone = pin!(peer_closed(client)?);
    let mut buffer = vec![0; BUFFER];
    loop {
        at = at.max(extent.oldest);
        let wanted = extent.end.min(limit).saturating_sub(at);
        if wanted > 0 {
            let room = usize::try_from(wanted).map_or(BUFFER, |wanted| wanted.min(BUFFER));
            let n = extent.read(at, &mut buffer[..room])?;
            if n == 0 {
                return Ok(());
            }
            client.write_all(&buffer[..n]).await?;
            at += n as u64;
        } else if extent.closed || at >= limit {
            return Ok(());
        } else {
            tokio::select! {
                more = news.changed() => more.map_err(io::Error::other)?,
                () = &mut gone => return Ok(()),
            }
        }
        extent = news.borrow_and_update().clone();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::Value;

    /// Generates JSON values of every kind in every place.
    fn values() -> impl Strategy<Value = Value> {
        let names = prop::sample::select(vec![
            "op",
            "graceMs",
            "source",
            "follow",
            "tailBytes",
            "name",
            "pin",
            "memory",
            "files",
            "from",
            "to",
            "size",
            "undo",
            "remove",
            "socket",
            "lines",
        ]);
        let words = prop::sample::select(vec![
            "stop", "kill", "wait", "detach", "logs", "status", "name", "capture", "console", "/",
        ]);
        let leaves = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            words.prop_map(Value::from),
            any::<String>().prop_map(Value::from),
        ];
        leaves.prop_recursive(3, 40, 6, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map(names.clone().prop_map(str::to_owned), inner, 0..6)
                    .prop_map(|fields| Value::Object(fields.into_iter().collect())),
            ]
        })
    }

    proptest! {
        /// Nothing panics, and only known operations are taken for requests.
        #[test]
        fn nothing_panics_and_only_operations_are_requests(value in values()) {
            let read = serde_json::from_slice::<Request>(value.to_string().as_bytes());
            // Serde takes an array for the fields in their order, of which the operation is the first.
            let operation = value.get("op").or(value.get(0));
            prop_assert!(read.is_err() || operation.is_some_and(Value::is_string));
        }

        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            prop_assert!(serde_json::from_slice::<Request>(&bytes).is_err());
        }
    }
}
