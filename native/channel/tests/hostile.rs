//! Tests the host's end against a hostile peer: raw bytes into `connect_host`. Whatever the peer sends, the memory that the host holds for
//! it stays below a bound, and the session ends or goes on as docs/protocol.md says.

// Clippy exempts test functions only, not what they call.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod peer;

use machinen_channel::{LARGE_WINDOW, MAX_GUEST_STREAMS, MAX_LARGE, MAX_STREAMS, Stream, WINDOW};
use peer::{ACCEPT, CREDIT, DATA, FINISH, HELLO, OPEN, Peer, RESET, frame, open};
use std::io::ErrorKind;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;

/// How many bytes a session may hold besides its streams: its output (1 MiB, 64 KiB and a frame, in a buffer that has doubled), and its
/// tables.
const SESSION: usize = 4 << 20;

/// Fails a test that takes too long, so that none hangs.
async fn bounded(work: impl Future<Output = ()>) {
    tokio::time::timeout(Duration::from_secs(60), work).await.expect("took too long");
}

/// Sends `bytes` many times, without reading, until the session has ended or everything is sent.
async fn flood(peer: &mut Peer, bytes: &[u8], times: usize, bound: usize) {
    for _ in 0..times {
        if !peer.opener.is_connected() {
            break;
        }
        peer.say(bytes).await;
        assert!(peer.opener.held() < bound, "{} bytes are held", peer.opener.held());
    }
}

#[tokio::test]
async fn opens_beyond_the_limit_are_refused_until_the_refusals_are_not_read() {
    bounded(async {
        let mut peer = Peer::new().await;
        let mut kept = Vec::new();
        for n in 0..u32::try_from(MAX_GUEST_STREAMS).unwrap() {
            peer.say(&open(2 * n + 2, 5)).await;
            kept.push(peer.incoming.recv().await.unwrap().accept().await.unwrap());
            assert_eq!(peer.next().await.0, ACCEPT);
        }
        peer.say(&open(100_000, 5)).await;
        assert_eq!(peer.next().await, (RESET, 100_000, vec![2]));
        peer.goes_on().await;
        // The peer sends 20 MB of requests and reads no answer.
        let many: Vec<u8> = (0..2000).flat_map(|n| open(200_000 + 2 * n, 5)).collect();
        flood(&mut peer, &many, 700, SESSION).await;
        peer.is_refused(kept.pop()).await;
    })
    .await;
}

#[tokio::test]
async fn what_is_opened_and_reset_for_ever_costs_no_more_than_what_is_open() {
    bounded(async {
        let mut peer = Peer::new().await;
        let bytes: Vec<u8> = (1..1000)
            .flat_map(|n| [open(2 * n, 5), frame(DATA, 2 * n, &[1; 64]), frame(RESET, 2 * n, &[0])].concat())
            .collect();
        // The test does not take the incoming streams, so they wait to be accepted.
        flood(&mut peer, &bytes, 200, SESSION + 2 * MAX_GUEST_STREAMS * WINDOW).await;
        // Then they are refused, and the refusals cannot be sent either.
        let mut incoming = std::mem::replace(&mut peer.incoming, mpsc::channel(1).1);
        tokio::spawn(async move { while incoming.recv().await.is_some() {} });
        flood(&mut peer, &bytes, 200, SESSION + 2 * MAX_GUEST_STREAMS * WINDOW).await;
    })
    .await;
}

#[tokio::test]
async fn streams_that_are_accepted_written_and_reset_leave_a_bounded_backlog() {
    bounded(async {
        let mut peer = Peer::new().await;
        let mut incoming = std::mem::replace(&mut peer.incoming, mpsc::channel(1).1);
        tokio::spawn(async move {
            while let Some(incoming) = incoming.recv().await {
                tokio::spawn(async move {
                    let Ok(mut stream) = incoming.accept().await else { return };
                    while stream.write_all(&[3; 10_000]).await.is_ok() {}
                });
            }
        });
        for n in 1..2000 {
            peer.say(&open(2 * n, 5)).await;
            tokio::task::yield_now().await;
            tokio::task::yield_now().await;
            peer.say(&frame(RESET, 2 * n, &[0])).await;
            assert!(peer.opener.held() < SESSION, "{} bytes are held", peer.opener.held());
        }
    })
    .await;
}

#[tokio::test]
async fn a_peer_that_reads_nothing_costs_a_backlog_and_the_writer_waits() {
    bounded(async {
        let mut peer = Peer::new().await;
        let mut streams = Vec::new();
        for _ in 0..40 {
            streams.push(peer.accepted().await.0);
        }
        let write = |mut stream: Stream| async move { while stream.write_all(&[1; 50_000]).await.is_ok() {} };
        let writers: Vec<_> = streams.into_iter().map(|stream| tokio::spawn(write(stream))).collect();
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert!(peer.opener.held() > 1 << 20, "they have not written");
        assert!(peer.opener.held() < SESSION, "{} bytes are held", peer.opener.held());
        assert!(writers.iter().all(|writer| !writer.is_finished()));
        // When the peer reads at last, all streams get their turn.
        let mut heard = std::collections::HashMap::<u32, usize>::new();
        while heard.len() < 40 || heard.values().any(|n| *n < WINDOW) {
            if let (DATA, id, data) = peer.next().await {
                *heard.entry(id).or_default() += data.len();
            }
        }
        // No stream sends more than it was granted.
        assert!(heard.values().all(|n| *n == WINDOW), "{heard:?}");
    })
    .await;
}

#[tokio::test]
async fn credit_beyond_a_large_window_ends_the_session() {
    bounded(async {
        let more = u32::try_from(LARGE_WINDOW - WINDOW).unwrap();
        for credit in [more + 1, 0, 0xf000_0000, u32::MAX] {
            let mut peer = Peer::new().await;
            let (stream, id) = peer.accepted().await;
            peer.say(&frame(CREDIT, id, &credit.to_be_bytes())).await;
            peer.is_refused(Some(stream)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn credit_is_what_a_writer_gets_and_no_more() {
    bounded(async {
        let mut peer = Peer::new().await;
        let (mut stream, id) = peer.accepted().await;
        let writing = tokio::spawn(async move { stream.write_all(&vec![1; 3 * WINDOW]).await.map(|()| stream) });
        let mut heard = 0;
        while heard < WINDOW {
            heard += peer.next().await.2.len();
        }
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert!(peer.heard.is_empty() && !writing.is_finished());
        peer.say(&frame(CREDIT, id, &1u32.to_be_bytes())).await;
        assert_eq!(peer.next().await, (DATA, id, vec![1]));
        peer.say(&frame(CREDIT, id, &u32::try_from(WINDOW).unwrap().to_be_bytes())).await;
        while heard < 2 * WINDOW {
            heard += peer.next().await.2.len();
        }
        // The rest of this credit and a whole large window is too much.
        peer.say(&frame(CREDIT, id, &u32::try_from(WINDOW + 1).unwrap().to_be_bytes())).await;
        peer.say(&frame(CREDIT, id, &u32::try_from(LARGE_WINDOW).unwrap().to_be_bytes())).await;
        assert_eq!(writing.await.unwrap().map(drop).unwrap_err().kind(), ErrorKind::ConnectionReset);
        peer.is_refused(None).await;
    })
    .await;
}

#[tokio::test]
async fn readers_that_keep_up_get_a_large_window_as_far_as_there_are_any() {
    bounded(async {
        let mut peer = Peer::new().await;
        let piece = vec![7; WINDOW / 8];
        let mut streams = Vec::new();
        for n in 0..=MAX_LARGE {
            let (mut stream, id) = peer.accepted().await;
            for _ in 0..4 {
                peer.say(&frame(DATA, id, &piece)).await;
            }
            stream.read_exact(&mut vec![0; WINDOW / 2]).await.unwrap();
            let more = if n < MAX_LARGE { LARGE_WINDOW - WINDOW } else { 0 };
            let granted = u32::try_from(WINDOW / 2 + more).unwrap();
            assert_eq!(peer.next().await, (CREDIT, id, granted.to_be_bytes().to_vec()), "{n}");
            streams.push((stream, id));
        }
        // The stream is not read any more: the host takes a whole window, and no byte more.
        let held = peer.opener.held();
        for _ in 0..LARGE_WINDOW / piece.len() {
            peer.say(&frame(DATA, streams[0].1, &piece)).await;
        }
        peer.goes_on().await;
        assert!(peer.opener.held() <= held + LARGE_WINDOW);
        // A stream that ends leaves its place to the next whose reader keeps up. A stream with unread data does not keep up.
        let (gone, id) = streams.remove(1);
        drop(gone);
        while peer.next().await != (RESET, id, vec![0]) {}
        peer.say(&frame(RESET, id, &[0])).await;
        let (last, id) = streams.last_mut().unwrap();
        for (unread, more) in [(1, 0), (0, 1 + LARGE_WINDOW - WINDOW)] {
            for _ in 0..4 {
                peer.say(&frame(DATA, *id, &piece)).await;
            }
            if unread > 0 {
                peer.say(&frame(DATA, *id, &[7])).await;
            }
            peer.goes_on().await;
            last.read_exact(&mut vec![0; WINDOW / 2]).await.unwrap();
            let granted = u32::try_from(WINDOW / 2 + more).unwrap();
            while peer.next().await != (CREDIT, *id, granted.to_be_bytes().to_vec()) {}
            last.read_exact(&mut vec![0; unread]).await.unwrap();
        }
        peer.say(&frame(DATA, streams[0].1, &[7])).await;
        peer.is_refused(None).await;
    })
    .await;
}

#[tokio::test]
async fn data_beyond_a_window_ends_the_session() {
    bounded(async {
        let mut peer = Peer::new().await;
        let (mut stream, id) = peer.accepted().await;
        let piece = frame(DATA, id, &[7; 32_768]);
        for _ in 0..WINDOW / 32_768 {
            peer.say(&piece).await;
        }
        peer.goes_on().await;
        assert!(peer.opener.held() < SESSION + WINDOW);
        peer.say(&frame(DATA, id, &[8])).await;
        peer.is_dropped().await;
        // The bytes that had arrived are still read, and no byte more.
        let mut read = Vec::new();
        assert_eq!(stream.read_to_end(&mut read).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
        assert!(read == vec![7; WINDOW]);
        peer.is_refused(None).await;
    })
    .await;
}

#[tokio::test]
async fn small_frames_into_a_window_that_is_not_read_cost_their_bytes() {
    bounded(async {
        let mut peer = Peer::new().await;
        let (stream, id) = peer.accepted().await;
        let byte = frame(DATA, id, &[7]);
        flood(&mut peer, &byte.repeat(1024), WINDOW / 1024, SESSION + WINDOW).await;
        peer.goes_on().await;
        peer.say(&byte).await;
        peer.is_refused(Some(stream)).await;
    })
    .await;
}

#[tokio::test]
async fn a_peer_that_sends_on_credit_it_cannot_have_read_costs_a_backlog() {
    bounded(async {
        let mut peer = Peer::new().await;
        let (mut stream, id) = peer.accepted().await;
        let reading = tokio::spawn(async move {
            let mut buffer = vec![0; 65_536];
            while stream.read(&mut buffer).await.is_ok_and(|n| n > 0) {}
        });
        // Sends half a window at a time, as an honest peer would, but without waiting for credit: 400 MB.
        let piece = frame(DATA, id, &[7; 65_000]);
        flood(&mut peer, &piece, 6_000, SESSION + LARGE_WINDOW).await;
        reading.abort();
    })
    .await;
}

#[tokio::test]
async fn everything_about_streams_that_are_gone_is_ignored() {
    bounded(async {
        let mut peer = Peer::new().await;
        let (stream, gone) = peer.accepted().await;
        drop(stream);
        assert_eq!(peer.next().await, (RESET, gone, vec![0]));
        for id in [gone, 77_777, 88_888, 0, u32::MAX] {
            for bytes in [
                frame(ACCEPT, id, &[]),
                frame(DATA, id, &[1; 1000]),
                frame(CREDIT, id, &u32::MAX.to_be_bytes()),
                frame(FINISH, id, &[]),
                frame(RESET, id, &[1]),
            ] {
                flood(&mut peer, &bytes.repeat(100), 10, SESSION).await;
                peer.goes_on().await;
            }
        }
    })
    .await;
}

#[tokio::test]
async fn what_no_honest_peer_says_of_a_stream_ends_the_session() {
    bounded(async {
        let says: [fn(u32) -> Vec<u8>; 8] = [
            |id| frame(ACCEPT, id, &[]),
            |id| open(id, 5),
            |id| [frame(FINISH, id, &[]), frame(FINISH, id, &[])].concat(),
            |id| [frame(FINISH, id, &[]), frame(DATA, id, &[1])].concat(),
            |id| [frame(RESET, id, &[0]), frame(DATA, id, &[1])].concat(),
            |id| [frame(RESET, id, &[0]), frame(RESET, id, &[0])].concat(),
            |_| [open(2, 5), open(2, 5)].concat(),
            |_| [open(2, 5), frame(ACCEPT, 2, &[])].concat(),
        ];
        for (n, say) in says.into_iter().enumerate() {
            let mut peer = Peer::new().await;
            let (stream, id) = peer.accepted().await;
            peer.say(&say(id)).await;
            peer.is_dropped().await;
            drop(stream);
            peer.greet().await;
            peer.goes_on().await;
            println!("{n}");
        }
        // Before the answer no other frame is allowed.
        for early in [DATA, FINISH] {
            let mut peer = Peer::new().await;
            let opener = peer.opener.clone();
            let opening = tokio::spawn(async move { opener.open(1).await });
            let (_, id, _) = peer.next().await;
            peer.say(&frame(early, id, if early == DATA { b"x" } else { b"" })).await;
            assert_eq!(opening.await.unwrap().unwrap_err().kind(), ErrorKind::ConnectionReset);
            peer.is_refused(None).await;
        }
    })
    .await;
}

#[tokio::test]
async fn frames_of_impossible_sizes_end_the_session_at_their_head() {
    bounded(async {
        for head in [
            [DATA, 0, 1, 0, 1],
            [DATA, 0xff, 0xff, 0xff, 0xff],
            [DATA, 0, 0, 0, 4],
            [OPEN, 0, 0, 0, 8],
            [CREDIT, 0, 0, 1, 0],
            [RESET, 0, 0, 0, 4],
            [9, 0, 0, 0, 1],
        ] {
            let mut peer = Peer::new().await;
            let (stream, _) = peer.accepted().await;
            peer.say(&head).await;
            peer.is_refused(Some(stream)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn half_a_hello_is_waited_for_and_a_wrong_one_starts_over() {
    bounded(async {
        let mut peer = Peer::new().await;
        let (stream, _) = peer.accepted().await;
        peer.say(&[&HELLO[..], &[1, 2, 3]].concat()).await;
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert!(peer.opener.is_connected());
        // Its end byte is missing.
        peer.say(&[0; 14]).await;
        peer.is_refused(Some(stream)).await;
        // A whole frame, but for a stream that is not the host's.
        let (stream, _) = peer.accepted().await;
        peer.say(&[&[1, 0, 0, 0, 17, 2][..], &[9; 16], &[0x5a]].concat()).await;
        peer.is_refused(Some(stream)).await;
    })
    .await;
}

#[tokio::test]
async fn a_stream_that_is_neither_accepted_nor_refused_holds_back_no_other() {
    bounded(async {
        let mut peer = Peer::new().await;
        for _ in 0..MAX_STREAMS - 1 {
            let opener = peer.opener.clone();
            tokio::spawn(async move { opener.open_with(1, &[1; 1000]).await });
            assert_eq!(peer.next().await.0, OPEN);
            assert_eq!(peer.next().await.0, DATA);
        }
        peer.goes_on().await;
        assert!(peer.opener.held() < SESSION);
    })
    .await;
}
