//! Both ends of the channel in one process, over a pipe in memory.

// Each test file uses only a part.
#![allow(dead_code)]
// A helper that fails fails its test.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use machinen_channel::{HostSession, Incoming, Opener, Stream, connect_host, serve_guest};
use std::io;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

pub const ECHO: u32 = 7;
pub const CLOSED: u32 = 9;

/// Accepts streams to every port but `CLOSED`. `ECHO` echoes; streams to other ports go to `taken`.
pub async fn accept_all(mut arrivals: mpsc::Receiver<Incoming>, taken: mpsc::UnboundedSender<(u32, Stream)>) {
    while let Some(incoming) = arrivals.recv().await {
        match incoming.port {
            CLOSED => incoming.refuse(),
            ECHO => drop(tokio::spawn(async move { echo(incoming.accept().await?).await })),
            port => drop(taken.send((port, incoming.accept().await.unwrap()))),
        }
    }
}

pub async fn echo(stream: Stream) -> io::Result<()> {
    let (mut reader, mut writer) = tokio::io::split(stream);
    tokio::io::copy(&mut reader, &mut writer).await?;
    writer.shutdown().await
}

pub struct Guest {
    pub task: JoinHandle<io::Result<()>>,
    pub sessions: mpsc::UnboundedReceiver<Opener>,
    pub streams: mpsc::UnboundedReceiver<(u32, Stream)>,
}

pub fn guest(port: DuplexStream) -> Guest {
    let (opened, sessions) = mpsc::unbounded_channel();
    let (taken, streams) = mpsc::unbounded_channel();
    let task = tokio::spawn(serve_guest(port, move |opener, arrivals| {
        opened.send(opener).unwrap();
        tokio::spawn(accept_all(arrivals, taken.clone()));
    }));
    Guest { task, sessions, streams }
}

pub struct Host {
    pub opener: Opener,
    pub streams: mpsc::UnboundedReceiver<(u32, Stream)>,
    pub task: JoinHandle<io::Result<()>>,
}

pub fn host(port: DuplexStream, resume: bool) -> Host {
    let HostSession { opener, incoming, driver } = connect_host(port, resume);
    let (taken, streams) = mpsc::unbounded_channel();
    tokio::spawn(accept_all(incoming, taken));
    Host { opener, streams, task: tokio::spawn(driver) }
}

pub fn pair() -> (Host, Guest) {
    let (left, right) = duplex(100_000);
    (host(left, false), guest(right))
}

/// Fails a test that takes too long, so that none hangs.
pub async fn bounded<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), work).await.expect("took too long")
}

pub fn pattern(seed: usize, len: usize) -> Vec<u8> {
    (0..len).map(|i| u8::try_from((i * 7 + seed * 31) % 251).unwrap()).collect()
}

pub async fn round_trip(stream: Stream, sent: Vec<u8>) -> Vec<u8> {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let mut received = Vec::new();
    let send = async {
        writer.write_all(&sent).await.unwrap();
        writer.shutdown().await.unwrap();
    };
    let (_, read) = tokio::join!(send, reader.read_to_end(&mut received));
    read.unwrap();
    received
}
