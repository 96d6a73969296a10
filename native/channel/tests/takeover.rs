//! Tests of sessions that end: with the port, by a new host, and when an end has lost its place.

// Clippy exempts test functions only, not what they call.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::{ECHO, Guest, Host, bounded, guest, host, pattern, round_trip};
use std::io::ErrorKind;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::sync::mpsc;

#[tokio::test]
async fn everything_ends_with_the_port() {
    bounded(async {
        let (mut switch, right) = duplex(100_000);
        let mut guest = guest(right);

        let (near, mut far) = duplex(100_000);
        let first = host(near, false);
        let relay = tokio::spawn(async move {
            tokio::io::copy_bidirectional(&mut far, &mut switch).await.unwrap_or_default();
            switch
        });
        let mut old = first.opener.open(5).await.unwrap();
        let (_, mut old_peer) = guest.streams.recv().await.unwrap();
        let old_opener = guest.sessions.recv().await.unwrap();
        old.write_all(b"x").await.unwrap();
        assert_eq!(old_peer.read_u8().await.unwrap(), b'x');
        relay.abort();
        assert!(relay.await.is_err());
        assert_eq!(old_peer.read_u8().await.unwrap_err().kind(), ErrorKind::ConnectionReset);
        assert!(guest.task.await.unwrap().is_ok());
        assert_eq!(old_opener.open(1).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
        assert!(first.opener.open(1).await.is_err());
        drop(old);
    })
    .await;
}

/// A port whose host end can be exchanged while the guest keeps its own.
async fn exchange(guest_port: &mut DuplexStream, host_port: &mut DuplexStream, until: &mut mpsc::Receiver<()>) {
    tokio::select! {
        _ = tokio::io::copy_bidirectional(guest_port, host_port) => {}
        _ = until.recv() => {}
    }
}

#[tokio::test]
async fn a_restored_guest_is_taken_over_in_mid_frame() {
    bounded(async {
        let (mut middle, right) = duplex(200_000);
        let mut guest = guest(right);
        let (cut, mut until) = mpsc::channel(1);
        let (near, mut far) = duplex(100_000);
        let first = host(near, false);
        let relay = tokio::spawn(async move {
            exchange(&mut middle, &mut far, &mut until).await;
            middle
        });
        let old = first.opener.open(5).await.unwrap();
        let (_, mut old_peer) = guest.streams.recv().await.unwrap();
        let old_session = guest.sessions.recv().await.unwrap();
        cut.send(()).await.unwrap();
        let mut middle = relay.await.unwrap();
        first.task.abort();

        // Half a frame, as a snapshot would leave it.
        middle.write_all(&[4, 0, 0, 255, 255, 0, 0, 0, 1, 1, 1]).await.unwrap();

        let (near, mut far) = duplex(100_000);
        let second = host(near, true);
        tokio::spawn(async move { tokio::io::copy_bidirectional(&mut middle, &mut far).await });
        let sent = pattern(2, 1 << 20);
        assert!(round_trip(second.opener.open(ECHO).await.unwrap(), sent.clone()).await == sent);
        assert_eq!(old_peer.read_u8().await.unwrap_err().kind(), ErrorKind::ConnectionReset);
        assert!(old_session.open(1).await.is_err());
        assert!(guest.sessions.recv().await.unwrap().open(1).await.is_ok());
        drop((old, second.streams));
    })
    .await;
}

/// Which end gets a byte that makes no sense to it.
enum Confused {
    Guest,
    Host,
}

/// A session in which one end was sent nonsense. Its old streams have ended, and both ends begin another.
async fn confuse(end: Confused) -> (Host, Guest) {
    let (mut middle, right) = duplex(200_000);
    let guest = guest(right);
    let (cut, mut until) = mpsc::channel(1);
    let (near, mut far) = duplex(200_000);
    let host = host(near, false);
    let relay = tokio::spawn(async move {
        exchange(&mut middle, &mut far, &mut until).await;
        (middle, far)
    });
    let mut old = host.opener.open(5).await.unwrap();
    cut.send(()).await.unwrap();
    let (mut middle, mut far) = relay.await.unwrap();
    let sent_to = match end {
        Confused::Guest => &mut middle,
        Confused::Host => &mut far,
    };
    sent_to.write_all(&[77]).await.unwrap();
    tokio::spawn(async move { tokio::io::copy_bidirectional(&mut middle, &mut far).await });
    assert_eq!(old.read_u8().await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    (host, guest)
}

#[tokio::test]
async fn the_host_starts_over_when_the_guest_talks_nonsense() {
    bounded(async {
        let (host, mut guest) = confuse(Confused::Host).await;
        let sent = pattern(3, 100_000);
        assert!(round_trip(host.opener.open(ECHO).await.unwrap(), sent.clone()).await == sent);
        assert!(guest.sessions.recv().await.is_some() && guest.sessions.recv().await.is_some());
    })
    .await;
}

#[tokio::test]
async fn the_guest_that_lost_its_place_makes_the_host_start_over() {
    bounded(async {
        let (host, _guest) = confuse(Confused::Guest).await;
        assert!(round_trip(host.opener.open(ECHO).await.unwrap(), vec![1; 10]).await == [1; 10]);
    })
    .await;
}
