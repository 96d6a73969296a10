//! Measures the throughput of one stream over a socketpair, with each end on its own thread: `cargo run --release --example throughput`.

use machinen_channel::{HostSession, connect_host, serve_guest};
use std::os::unix::net::UnixStream;
use std::time::Instant;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const TOTAL: usize = 2 << 30;

fn main() -> std::io::Result<()> {
    let (left, right) = UnixStream::pair()?;
    for end in [&left, &right] {
        end.set_nonblocking(true)?;
    }
    let guest = std::thread::spawn(move || run(send(right)));
    run(receive(left))?;
    drop(guest);
    Ok(())
}

fn run<T>(work: impl Future<Output = std::io::Result<T>>) -> std::io::Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
}

async fn send(port: UnixStream) -> std::io::Result<()> {
    let port = tokio::net::UnixStream::from_std(port)?;
    serve_guest(port, |_, mut arrivals| {
        tokio::spawn(async move {
            while let Some(incoming) = arrivals.recv().await {
                tokio::spawn(async move {
                    let mut stream = incoming.accept().await?;
                    let block = vec![7; 65_536];
                    for _ in 0..TOTAL / block.len() {
                        stream.write_all(&block).await?;
                    }
                    stream.shutdown().await
                });
            }
        });
    })
    .await
}

async fn receive(port: UnixStream) -> std::io::Result<()> {
    let HostSession { opener, driver, incoming: _incoming } =
        connect_host(tokio::net::UnixStream::from_std(port)?, false);
    tokio::spawn(driver);
    let started = Instant::now();
    let mut stream = opener.open(1).await?;
    println!("first stream after {:?}", started.elapsed());
    let (started, mut block, mut total) = (Instant::now(), vec![0; 65_536], 0);
    loop {
        match stream.read(&mut block).await? {
            0 => break,
            n => total += n,
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    println!("{} MiB in {seconds:.2} s: {:.0} MiB/s", total >> 20, (total >> 20) as f64 / seconds);
    let (started, rounds) = (Instant::now(), 1000);
    for _ in 0..rounds {
        drop(opener.open(1).await?);
    }
    println!("open: {:?}", started.elapsed() / rounds);
    Ok(())
}
