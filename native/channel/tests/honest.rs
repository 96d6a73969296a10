//! Tests that honest ends understand each other, whatever they do.

// Clippy exempts test functions only, not what they call.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::{bounded, pattern};
use machinen_channel::{HostSession, MAX_STREAMS, Opener, Stream, connect_host, serve_guest};
use proptest::prelude::*;
use std::io::ErrorKind;
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

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
