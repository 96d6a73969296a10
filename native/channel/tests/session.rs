//! Tests both ends of the channel in one process, over a pipe in memory.

// Clippy exempts test functions only, not what they call.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use machinen_channel::{
    HostSession, Incoming, MAX_GUEST_STREAMS, MAX_STREAMS, Opener, Stream, connect_host, serve_guest,
};
use proptest::prelude::*;
use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};

const ECHO: u32 = 7;
const CLOSED: u32 = 9;

/// Accepts streams to every port but `CLOSED`. `ECHO` echoes; streams to other ports go to `taken`.
async fn accept_all(mut arrivals: mpsc::Receiver<Incoming>, taken: mpsc::UnboundedSender<(u32, Stream)>) {
    while let Some(incoming) = arrivals.recv().await {
        match incoming.port {
            CLOSED => incoming.refuse(),
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

/// Fails a test that takes too long, so that none hangs.
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

/// The plan of one stream of the test below: how many bytes it sends and reads in which pieces, and how it leaves.
#[derive(Clone, Debug)]
struct Plan {
    from_host: bool,
    sent: usize,
    answered: usize,
    piece: usize,
    /// Drops the stream after so many bytes of the answer; `None`: never.
    leaves_after: Option<usize>,
}

fn plan() -> impl Strategy<Value = Plan> {
    let size = || prop_oneof![0usize..100, 0usize..900_000];
    (any::<bool>(), size(), size(), 1usize..100_000, prop::option::of(0usize..300_000)).prop_map(
        |(from_host, sent, answered, piece, leaves_after)| Plan { from_host, sent, answered, piece, leaves_after },
    )
}

/// Opens a stream, and sends and reads at the same time. The bytes that are read are those that were sent, in order, and all of them unless
/// this end leaves.
async fn run_plan(opener: Opener, plan: Plan) {
    let first = pattern(plan.sent, plan.sent.min(plan.piece));
    let header = [plan.sent as u64, plan.answered as u64].map(u64::to_be_bytes).concat();
    let stream = opener.open_with(2, &[&header[..], &first].concat()).await.unwrap();
    let (mut reader, mut writer) = tokio::io::split(stream);
    let all = pattern(plan.sent, plan.sent);
    let send = async {
        for piece in all[first.len()..].chunks(plan.piece) {
            writer.write_all(piece).await?;
        }
        writer.shutdown().await
    };
    let read = async {
        let (mut read, mut buffer) = (Vec::new(), vec![0; plan.piece]);
        loop {
            if plan.leaves_after.is_some_and(|n| read.len() >= n) {
                return;
            }
            match reader.read(&mut buffer).await.unwrap() {
                0 => break,
                n => read.extend_from_slice(&buffer[..n]),
            }
        }
        assert!(read == pattern(plan.answered, plan.answered));
    };
    if plan.leaves_after.is_some() {
        tokio::select! { _ = send => {}, () = read => {} }
    } else {
        tokio::join!(async { send.await.unwrap() }, read);
    }
}

/// The other end: answers as the header says, and checks the bytes it gets as long as the opener stays.
async fn answer_plan(stream: Stream) {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let (Ok(sent), Ok(answered)) = (reader.read_u64().await, reader.read_u64().await) else { return };
    let (sent, answered) = (usize::try_from(sent).unwrap(), usize::try_from(answered).unwrap());
    let answer = async {
        // The opener may leave.
        let _ = writer.write_all(&pattern(answered, answered)).await;
        let _ = writer.shutdown().await;
    };
    let read = async {
        let mut read = Vec::new();
        let whole = reader.read_to_end(&mut read).await.is_ok();
        let expected = pattern(sent, sent);
        assert!(if whole { read == expected } else { expected.starts_with(&read) });
    };
    tokio::join!(answer, read);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    /// Opens many streams from both ends at once, over a pipe of any size: every byte arrives, in order, and nothing is left behind.
    #[test]
    fn honest_ends_understand_each_other(plans in prop::collection::vec(plan(), 1..12), pipe in 1usize..100_000) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(bounded(async move {
            let (left, right) = duplex(pipe.max(plans.iter().map(|plan| plan.sent + plan.answered).sum::<usize>() / 4000));
            let HostSession { opener, mut incoming, driver } = connect_host(left, false);
            tokio::spawn(driver);
            let (opened, mut sessions) = mpsc::unbounded_channel();
            tokio::spawn(serve_guest(right, move |opener, mut arrivals| {
                opened.send(opener).unwrap();
                tokio::spawn(async move {
                    while let Some(incoming) = arrivals.recv().await {
                        tokio::spawn(async move { answer_plan(incoming.accept().await.unwrap()).await });
                    }
                });
            }));
            tokio::spawn(async move {
                while let Some(incoming) = incoming.recv().await {
                    tokio::spawn(async move { answer_plan(incoming.accept().await.unwrap()).await });
                }
            });
            let guest = sessions.recv().await.unwrap();
            let mut running = JoinSet::new();
            for plan in plans {
                running.spawn(run_plan(if plan.from_host { opener.clone() } else { guest.clone() }, plan));
            }
            while let Some(done) = running.join_next().await {
                done.unwrap();
            }
            // The full number of streams can be opened again, so none was left.
            let mut all = JoinSet::new();
            for _ in 0..MAX_STREAMS {
                let opener = opener.clone();
                all.spawn(async move {
                    loop {
                        match opener.open(3).await {
                            Err(error) if error.kind() == ErrorKind::ResourceBusy => tokio::task::yield_now().await,
                            opened => return opened.unwrap(),
                        }
                    }
                });
            }
            let mut open = Vec::new();
            while let Some(stream) = all.join_next().await {
                open.push(stream.unwrap());
            }
            assert_eq!(open.len(), MAX_STREAMS);
        }));
    }
}
