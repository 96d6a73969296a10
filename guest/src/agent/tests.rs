//! Tests of the agent behind a channel in memory: which requests wait at the gate, and what the next host finds. Commands need a guest and
//! are left out.

// Clippy exempts test functions, but not the functions they call.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::sync::Arc;

use bytes::BytesMut;
use machinen_channel::{Opener, Stream, connect_host, serve_guest};
use machinen_protocol::frame::{self, Kind};
use machinen_protocol::ports::OPERATIONS;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::sync::{mpsc, watch};

use super::context::Context;
use super::disks::Disks;
use super::gate::Gate;
use super::lifecycle::Lifecycle;
use super::serve::serve_session;
use crate::config::GuestConfig;

struct Machine {
    context: Arc<Context>,
    hosts: mpsc::Sender<DuplexStream>,
}

fn machine() -> Machine {
    let (port, mut guest) = duplex(100_000);
    let (hosts, mut replaced) = mpsc::channel::<DuplexStream>(1);
    tokio::spawn(async move {
        let mut host = replaced.recv().await.unwrap();
        // Bytes between the two ends are lost, as in a snapshot.
        while let Some(next) = tokio::select! {
            _ = tokio::io::copy_bidirectional(&mut guest, &mut host) => None,
            next = replaced.recv() => next,
        } {
            host = next;
        }
    });
    let (sessions, current) = watch::channel(None);
    let lifecycle = Lifecycle::new(Disks::new(File::open("/").unwrap().into(), None), current);
    let root = std::env::temp_dir().join("machinen-agent-test");
    let context = Arc::new(Context::new(GuestConfig::default(), lifecycle, Gate::new(), root));
    let served = Arc::clone(&context);
    tokio::spawn(serve_guest(port, move |opener, incoming| {
        served.gate.new_session();
        sessions.send_replace(Some(opener.clone()));
        tokio::spawn(serve_session(Arc::clone(&served), opener, incoming));
    }));
    Machine { context, hosts }
}

impl Machine {
    /// Another host takes the place of the last.
    async fn next_host(&self) -> Opener {
        let (near, far) = duplex(100_000);
        let session = connect_host(near, true);
        self.hosts.send(far).await.unwrap();
        tokio::spawn(session.driver);
        session.opener
    }
}

async fn ask(host: &Opener, request: Value) -> Stream {
    let mut stream = host.open(OPERATIONS).await.unwrap();
    stream.write_all(&frame::encode(Kind::Request, request.to_string().as_bytes()).unwrap()).await.unwrap();
    stream
}

/// The last frame of a stream, or `None` if the stream ends without one.
async fn answer(mut stream: Stream) -> Option<(Kind, Value)> {
    let mut received = BytesMut::new();
    while !matches!(stream.read_buf(&mut received).await, Ok(0) | Err(_)) {}
    let mut last = None;
    while let Some(frame) = frame::decode(&mut received).unwrap() {
        last = Some((frame.kind, serde_json::from_slice(&frame.payload).unwrap()));
    }
    last
}

fn write(path: &std::path::Path) -> Value {
    json!({"op": "write", "path": path})
}

fn rejuvenate() -> Value {
    json!({
        "op": "rejuvenate",
        "seed": "5a".repeat(32),
        "nowMs": 1,
        "hostname": "copy",
        "machineId": "0".repeat(32),
        "generation": "6f2c1a52-7c0e-4a53-9d0e-0a1b2c3d4e5f",
    })
}

#[tokio::test]
async fn an_operation_waits_at_the_gate_with_what_was_sent_to_it() {
    let machine = machine();
    let host = machine.next_host().await;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    assert!(machine.context.gate.hold());
    let mut waiting = ask(&host, write(&path)).await;
    waiting.write_all(&frame::encode(Kind::Data, b"abc").unwrap()).await.unwrap();
    waiting.write_all(&frame::encode(Kind::Eof, b"").unwrap()).await.unwrap();
    // The answer shows that the other request, which waits, has been received.
    let (kind, _) = answer(ask(&host, json!({"op": "freeze"})).await).await.unwrap();
    assert_eq!((kind, path.exists()), (Kind::Error, false));
    machine.context.gate.open();
    assert_eq!(answer(waiting).await, Some((Kind::End, json!({"bytes": 3}))));
    assert_eq!(std::fs::read(&path).unwrap(), b"abc");
}

#[tokio::test]
async fn an_operation_whose_stream_ends_at_the_gate_is_none() {
    let machine = machine();
    let host = machine.next_host().await;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    assert!(machine.context.gate.hold());
    let mut waiting = ask(&host, write(&path)).await;
    waiting.shutdown().await.unwrap();
    assert_eq!(answer(waiting).await, None);
    machine.context.gate.open();
    assert!(answer(ask(&host, json!({"op": "stat", "path": "/"})).await).await.is_some());
    assert!(!path.exists());
}

#[tokio::test]
async fn one_freeze_at_a_time() {
    let machine = machine();
    let host = machine.next_host().await;
    assert!(machine.context.gate.hold());
    let (kind, error) = answer(ask(&host, json!({"op": "freeze"})).await).await.unwrap();
    assert_eq!((kind, &error["code"]), (Kind::Error, &json!("AGENT_BUSY")));
}

#[tokio::test]
async fn what_waited_for_the_last_host_is_not_done_for_the_next() {
    let machine = machine();
    let host = machine.next_host().await;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    assert!(machine.context.gate.hold());
    let waiting = ask(&host, write(&path)).await;
    // More than a waiting operation takes in, so that it does not see the end of its stream.
    let mut flooding = ask(&host, write(&path)).await;
    let flood = frame::encode(Kind::Data, &[0; 1 << 20]).unwrap();
    for _ in 0..2 {
        flooding.write_all(&flood).await.unwrap();
    }
    assert!(answer(ask(&host, json!({"op": "freeze"})).await).await.is_some());

    let next = machine.next_host().await;
    let mut late = ask(&next, json!({"op": "stat", "path": "/"})).await;
    assert!(answer(ask(&next, json!({"op": "freeze"})).await).await.is_some());
    assert!(machine.context.gate.is_restored());
    tokio::select! {
        biased;
        _ = late.read_u8() => panic!("served behind the gate"),
        () = tokio::task::yield_now() => {}
    }
    machine.context.gate.open();
    let mut kind = [0];
    late.read_exact(&mut kind).await.unwrap();
    assert_eq!(kind, [Kind::End as u8]);
    assert!(!path.exists());
    drop((waiting, flooding));
}

#[tokio::test]
async fn only_a_copy_is_made_itself() {
    let machine = machine();
    let host = machine.next_host().await;
    for held in [false, true] {
        if held {
            assert!(machine.context.gate.hold());
        }
        let (kind, error) = answer(ask(&host, rejuvenate()).await).await.unwrap();
        assert_eq!((kind, &error["code"]), (Kind::Error, &json!("AGENT_BAD_REQUEST")));
    }
}
