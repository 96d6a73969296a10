//! Tests both ends of the channel in one process, over a pipe in memory.

// Clippy exempts test functions only, not what they call.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::{CLOSED, ECHO, bounded, guest, host, pair, pattern, round_trip};
use machinen_channel::{MAX_GUEST_STREAMS, MAX_STREAMS};
use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio::task::JoinSet;

#[tokio::test]
async fn eight_streams_of_which_one_is_stalled() {
    bounded(async {
        let (host, mut guest) = pair();
        // The other end does not read this stream, so it fills its window and waits.
        let mut stalled = host.opener.open(100).await.unwrap();
        let (_, mut unread) = guest.streams.recv().await.unwrap();
        let stalled = tokio::spawn(async move {
            stalled.write_all(&pattern(99, 4 << 20)).await.unwrap();
            stalled.shutdown().await.unwrap();
        });

        let mut others = JoinSet::new();
        for seed in 0..7 {
            let opener = host.opener.clone();
            others.spawn(async move {
                let sent = pattern(seed, 3 << 20);
                assert!(round_trip(opener.open(ECHO).await.unwrap(), sent.clone()).await == sent);
            });
        }
        while let Some(done) = others.join_next().await {
            done.unwrap();
        }
        assert!(!stalled.is_finished());

        let mut late = Vec::new();
        unread.read_to_end(&mut late).await.unwrap();
        assert!(late == pattern(99, 4 << 20));
        stalled.await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn the_guest_opens_streams_too() {
    bounded(async {
        let (mut host, mut guest) = pair();
        let opener = guest.sessions.recv().await.unwrap();
        let mut stream = opener.open(1979).await.unwrap();
        let (port, mut accepted) = host.streams.recv().await.unwrap();
        assert_eq!(port, 1979);
        stream.write_all(b"ding").await.unwrap();
        let mut heard = [0; 4];
        accepted.read_exact(&mut heard).await.unwrap();
        assert_eq!(&heard, b"ding");
    })
    .await;
}

#[tokio::test]
async fn refused_ports() {
    bounded(async {
        let (host, mut guest) = pair();
        assert_eq!(host.opener.open(CLOSED).await.unwrap_err().kind(), ErrorKind::ConnectionRefused);
        let opener = guest.sessions.recv().await.unwrap();
        assert_eq!(opener.open(CLOSED).await.unwrap_err().kind(), ErrorKind::ConnectionRefused);
        assert!(round_trip(host.opener.open(ECHO).await.unwrap(), pattern(1, 10)).await == pattern(1, 10));
    })
    .await;
}

#[tokio::test]
async fn what_is_said_first_travels_with_the_request() {
    bounded(async {
        let (mut host, mut guest) = pair();
        let first = pattern(3, 200_000);
        let mut stream = host.opener.open_with(ECHO, &first).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut heard = Vec::new();
        stream.read_to_end(&mut heard).await.unwrap();
        assert!(heard == first);

        let refused = host.opener.open_with(CLOSED, b"unheard").await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        let opener = guest.sessions.recv().await.unwrap();
        let _stream = opener.open_with(1979, b"ding").await.unwrap();
        let (_, mut accepted) = host.streams.recv().await.unwrap();
        let mut heard = [0; 4];
        accepted.read_exact(&mut heard).await.unwrap();
        assert_eq!(&heard, b"ding");
    })
    .await;
}

#[tokio::test]
async fn half_close_leaves_the_other_direction_open() {
    bounded(async {
        let (host, mut guest) = pair();
        let mut stream = host.opener.open(1).await.unwrap();
        let (_, mut peer) = guest.streams.recv().await.unwrap();
        stream.write_all(b"question").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut question = String::new();
        peer.read_to_string(&mut question).await.unwrap();
        peer.write_all(b"answer").await.unwrap();
        peer.shutdown().await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert_eq!((question.as_str(), answer.as_str()), ("question", "answer"));
    })
    .await;
}

#[tokio::test]
async fn dropped_streams_are_resets() {
    bounded(async {
        let (host, mut guest) = pair();
        let mut stream = host.opener.open(1).await.unwrap();
        stream.write_all(b"partial").await.unwrap();
        let (_, mut peer) = guest.streams.recv().await.unwrap();
        drop(stream);
        let mut read = Vec::new();
        assert_eq!(peer.read_to_end(&mut read).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
        assert_eq!(read, b"partial");
    })
    .await;
}

#[tokio::test]
async fn a_writer_learns_that_its_half_closed_reader_is_gone() {
    bounded(async {
        let (host, mut guest) = pair();
        let mut stream = host.opener.open(1).await.unwrap();
        let (_, mut peer) = guest.streams.recv().await.unwrap();
        stream.shutdown().await.unwrap();
        drop(stream);
        // The stream still reads an orderly end, and its writes fail instead of waiting for credit forever.
        assert_eq!(peer.read(&mut [0; 8]).await.unwrap(), 0);
        let error = loop {
            if let Err(error) = peer.write_all(&[1; 100_000]).await {
                break error;
            }
        };
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    })
    .await;
}

#[tokio::test]
async fn sent_then_shut_and_dropped_arrives_whole() {
    bounded(async {
        let (host, mut guest) = pair();
        let mut stream = host.opener.open(1).await.unwrap();
        let (_, mut peer) = guest.streams.recv().await.unwrap();
        let sent = pattern(4, 2 << 20);
        let (expected, reading) = (sent.clone(), async move {
            let mut read = Vec::new();
            peer.read_to_end(&mut read).await.unwrap();
            read
        });
        let reading = tokio::spawn(reading);
        stream.write_all(&sent).await.unwrap();
        stream.shutdown().await.unwrap();
        drop(stream);
        assert!(reading.await.unwrap() == expected);
    })
    .await;
}

#[tokio::test]
async fn open_waits_for_a_guest_that_is_still_booting() {
    bounded(async {
        let (left, right) = duplex(100_000);
        let host = host(left, true);
        let opener = host.opener.clone();
        let waiting = tokio::spawn(async move { opener.open(ECHO).await });
        tokio::task::yield_now().await;
        assert!(!host.opener.is_connected() && !waiting.is_finished());
        let _guest = guest(right);
        assert!(round_trip(waiting.await.unwrap().unwrap(), pattern(1, 100)).await == pattern(1, 100));
    })
    .await;
}

#[tokio::test]
async fn streams_over_the_limit_are_refused_and_the_session_goes_on() {
    bounded(async {
        let (host, mut guest) = pair();
        let mut open = Vec::new();
        for _ in 0..MAX_STREAMS {
            open.push(host.opener.open(1).await.unwrap());
        }
        assert_eq!(host.opener.open(1).await.unwrap_err().kind(), ErrorKind::ResourceBusy);
        // An urgent stream still gets through, and the guest's streams are counted separately.
        let urgent = host.opener.open_urgent(ECHO).await.unwrap();
        assert!(round_trip(urgent, pattern(1, 10)).await == pattern(1, 10));
        let opener = guest.sessions.recv().await.unwrap();
        let mut guests = Vec::new();
        for _ in 0..MAX_GUEST_STREAMS {
            guests.push(opener.open(ECHO).await.unwrap());
        }
        assert_eq!(opener.open(1).await.unwrap_err().kind(), ErrorKind::ResourceBusy);
        assert!(round_trip(opener.open_urgent(ECHO).await.unwrap(), pattern(2, 10)).await == pattern(2, 10));
        open.truncate(10);
        while guest.streams.try_recv().is_ok() {}
        while host.opener.open(1).await.is_err() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn both_directions_full_at_once() {
    bounded(async {
        let (left, right) = duplex(4096);
        let (host, _guest) = (host(left, false), guest(right));
        let mut all = JoinSet::new();
        for seed in 0..16 {
            let opener = host.opener.clone();
            all.spawn(async move {
                let sent = pattern(seed, 1 << 20);
                assert!(round_trip(opener.open(ECHO).await.unwrap(), sent.clone()).await == sent);
            });
        }
        while let Some(done) = all.join_next().await {
            done.unwrap();
        }
    })
    .await;
}

#[tokio::test]
async fn a_small_request_takes_its_turn_among_those_that_send_much() {
    bounded(async {
        let (left, right) = duplex(100_000);
        let (host, _guest) = (host(left, false), guest(right));
        // Started before the others, which then fill all windows.
        let mut asking = host.opener.open(ECHO).await.unwrap();
        let others = Arc::new(AtomicUsize::new(0));
        for _ in 0..30 {
            let others = Arc::clone(&others);
            let (mut reader, mut writer) = tokio::io::split(host.opener.open(ECHO).await.unwrap());
            tokio::spawn(async move { while writer.write_all(&[1; 65_536]).await.is_ok() {} });
            tokio::spawn(async move {
                let mut buffer = vec![0; 65_536];
                while let Ok(n @ 1..) = reader.read(&mut buffer).await {
                    others.fetch_add(n, Ordering::Relaxed);
                }
            });
        }
        for _ in 0..1000 {
            tokio::task::yield_now().await;
        }
        for n in 0..20 {
            let before = others.load(Ordering::Relaxed);
            asking.write_all(&[n]).await.unwrap();
            assert_eq!(asking.read_u8().await.unwrap(), n);
            let meanwhile = others.load(Ordering::Relaxed) - before;
            // Its bytes wait only for what both ends have already put out, and for a share of each other stream.
            assert!(meanwhile < 16 << 20, "{meanwhile} bytes went first");
        }
        drop(host.opener.open(ECHO).await.unwrap());
        assert!(host.opener.held() > 1 << 20, "the other streams have sent nothing");
    })
    .await;
}
