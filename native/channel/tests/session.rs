//! Both ends of the channel in one process, over a pipe in memory.

// Clippy exempts test functions only, not what they call.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use machinen_channel::{HostSession, Incoming, MAX_STREAMS, Opener, Stream, connect_host, serve_guest};
use std::io::{self, ErrorKind};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};

const ECHO: u32 = 7;
const CLOSED: u32 = 9;

/// Accepts everything but `CLOSED`; `ECHO` echoes, other ports go to `taken`.
async fn accept_all(mut arrivals: mpsc::Receiver<Incoming>, taken: mpsc::UnboundedSender<(u32, Stream)>) {
    while let Some(incoming) = arrivals.recv().await {
        match incoming.port {
            CLOSED => incoming.refuse().await,
            ECHO => drop(tokio::spawn(async move { echo(incoming.accept().await?).await })),
            port => drop(taken.send((port, incoming.accept().await.unwrap()))),
        }
    }
}

async fn echo(stream: Stream) -> io::Result<()> {
    let (mut reader, mut writer) = tokio::io::split(stream);
    tokio::io::copy(&mut reader, &mut writer).await?;
    writer.shutdown().await
}

struct Guest {
    task: JoinHandle<io::Result<()>>,
    sessions: mpsc::UnboundedReceiver<Opener>,
    streams: mpsc::UnboundedReceiver<(u32, Stream)>,
}

fn guest(port: DuplexStream) -> Guest {
    let (opened, sessions) = mpsc::unbounded_channel();
    let (taken, streams) = mpsc::unbounded_channel();
    let task = tokio::spawn(serve_guest(port, move |opener, arrivals| {
        opened.send(opener).unwrap();
        tokio::spawn(accept_all(arrivals, taken.clone()));
    }));
    Guest { task, sessions, streams }
}

struct Host {
    opener: Opener,
    streams: mpsc::UnboundedReceiver<(u32, Stream)>,
    task: JoinHandle<io::Result<()>>,
}

fn host(port: DuplexStream, resume: bool) -> Host {
    let HostSession { opener, incoming, driver } = connect_host(port, resume);
    let (taken, streams) = mpsc::unbounded_channel();
    tokio::spawn(accept_all(incoming, taken));
    Host { opener, streams, task: tokio::spawn(driver) }
}

fn pair() -> (Host, Guest) {
    let (left, right) = duplex(100_000);
    (host(left, false), guest(right))
}

/// No test may hang: what takes longer than this is a failure.
async fn bounded<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), work).await.expect("took too long")
}

fn pattern(seed: usize, len: usize) -> Vec<u8> {
    (0..len).map(|i| u8::try_from((i * 7 + seed * 31) % 251).unwrap()).collect()
}

async fn round_trip(stream: Stream, sent: Vec<u8>) -> Vec<u8> {
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

#[tokio::test]
async fn eight_streams_of_which_one_is_stalled() {
    bounded(async {
        let (host, mut guest) = pair();
        // Nobody reads this one at the other end: it fills its window and waits.
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
        // It still reads an orderly end, and its writes fail instead of waiting for window forever.
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
async fn a_restored_guest_is_taken_over_in_mid_chunk() {
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

        // Half a chunk, as a snapshot would leave it.
        middle.write_all(&[2, 0, 0, 255, 255, 1, 1, 1]).await.unwrap();

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

#[tokio::test]
async fn the_host_starts_over_when_the_guest_talks_nonsense() {
    bounded(async {
        let (mut middle, right) = duplex(200_000);
        let mut guest = guest(right);
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
        far.write_all(&[77]).await.unwrap();
        tokio::spawn(async move { tokio::io::copy_bidirectional(&mut middle, &mut far).await });
        assert_eq!(old.read_u8().await.unwrap_err().kind(), ErrorKind::ConnectionReset);
        let sent = pattern(3, 100_000);
        assert!(round_trip(host.opener.open(ECHO).await.unwrap(), sent.clone()).await == sent);
        assert!(guest.sessions.recv().await.is_some() && guest.sessions.recv().await.is_some());
    })
    .await;
}

#[tokio::test]
async fn the_guest_that_lost_its_place_makes_the_host_start_over() {
    bounded(async {
        let (mut middle, right) = duplex(200_000);
        let _guest = guest(right);
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
        middle.write_all(&[77]).await.unwrap();
        tokio::spawn(async move { tokio::io::copy_bidirectional(&mut middle, &mut far).await });
        assert_eq!(old.read_u8().await.unwrap_err().kind(), ErrorKind::ConnectionReset);
        assert!(round_trip(host.opener.open(ECHO).await.unwrap(), vec![1; 10]).await == [1; 10]);
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
        let opener = guest.sessions.recv().await.unwrap();
        assert_eq!(opener.open(1).await.unwrap_err().kind(), ErrorKind::ResourceBusy);
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
