//! A guest that sends raw bytes to `connect_host`.

// A helper that fails fails its test.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use machinen_channel::{HostSession, Incoming, Opener, Stream, connect_host};
use std::io::ErrorKind;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::sync::mpsc;

pub const OPEN: u8 = 2;
pub const ACCEPT: u8 = 3;
pub const DATA: u8 = 4;
pub const CREDIT: u8 = 5;
pub const FINISH: u8 = 6;
pub const RESET: u8 = 7;
/// A hello before its epoch.
pub const HELLO: [u8; 6] = [1, 0, 0, 0, 17, 3];

pub fn frame(kind: u8, id: u32, rest: &[u8]) -> Vec<u8> {
    let length = u32::try_from(4 + rest.len()).unwrap();
    [&[kind], &length.to_be_bytes()[..], &id.to_be_bytes(), rest, &[0x5a]].concat()
}

pub fn open(id: u32, port: u32) -> Vec<u8> {
    frame(OPEN, id, &[&port.to_be_bytes()[..], &[0]].concat())
}

/// A guest that sends raw bytes, and the host it talks to.
pub struct Peer {
    pub port: DuplexStream,
    pub opener: Opener,
    pub incoming: mpsc::Receiver<Incoming>,
    /// Bytes that were read and not yet decoded.
    pub heard: Vec<u8>,
}

impl Peer {
    /// A session that has just begun.
    pub async fn new() -> Peer {
        let (near, far) = duplex(256 * 1024);
        let HostSession { opener, incoming, driver } = connect_host(near, false);
        tokio::spawn(driver);
        let mut peer = Peer { port: far, opener, incoming, heard: Vec::new() };
        peer.greet().await;
        peer
    }

    /// Answers the next hello of the host, whatever comes before it.
    pub async fn greet(&mut self) {
        loop {
            let at = self.heard.windows(6).position(|bytes| bytes == HELLO);
            if let Some(at) = at
                && self.heard.len() >= at + 23
            {
                let hello = self.heard[at..at + 23].to_vec();
                self.heard.drain(..at + 23);
                self.port.write_all(&hello).await.unwrap();
                break;
            }
            self.hear().await;
        }
        while !self.opener.is_connected() {
            tokio::task::yield_now().await;
        }
    }

    pub async fn hear(&mut self) {
        assert_ne!(self.port.read_buf(&mut self.heard).await.unwrap(), 0);
    }

    pub async fn say(&mut self, bytes: &[u8]) {
        self.port.write_all(bytes).await.unwrap();
    }

    /// The next frame: kind, id, the rest of its body.
    pub async fn next(&mut self) -> (u8, u32, Vec<u8>) {
        loop {
            if let Some(head) = self.heard.first_chunk::<5>() {
                let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
                if self.heard.len() > 5 + length {
                    let frame: Vec<u8> = self.heard.drain(..5 + length + 1).collect();
                    assert_eq!(frame.last(), Some(&0x5a));
                    return (
                        frame[0],
                        u32::from_be_bytes([frame[5], frame[6], frame[7], frame[8]]),
                        frame[9..5 + length].to_vec(),
                    );
                }
            }
            self.hear().await;
        }
    }

    /// A stream that the host has opened and this peer has accepted.
    pub async fn accepted(&mut self) -> (Stream, u32) {
        let opener = self.opener.clone();
        let opening = tokio::spawn(async move { opener.open(1).await });
        // Skips the ends of streams that the test has dropped before.
        let id = loop {
            match self.next().await {
                (OPEN, id, _) => break id,
                (kind, ..) => assert_eq!(kind, RESET),
            }
        };
        self.say(&frame(ACCEPT, id, &[])).await;
        (opening.await.unwrap().unwrap(), id)
    }

    /// Checks that the session goes on: a stream can be opened and carries bytes.
    pub async fn goes_on(&mut self) {
        let (mut stream, id) = self.accepted().await;
        self.say(&frame(DATA, id, b"x")).await;
        assert_eq!(stream.read_u8().await.unwrap(), b'x');
    }

    /// Waits until the host has dropped the session.
    pub async fn is_dropped(&self) {
        while self.opener.is_connected() {
            tokio::task::yield_now().await;
        }
    }

    /// Waits until the host has dropped the session and says hello anew, behind pads, which complete the frame it had begun.
    pub async fn is_refused(&mut self, stream: Option<Stream>) {
        self.is_dropped().await;
        if let Some(mut stream) = stream {
            let mut rest = Vec::new();
            assert_eq!(stream.read_to_end(&mut rest).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
        }
        self.greet().await;
        self.goes_on().await;
    }
}
