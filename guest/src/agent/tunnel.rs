//! The operation `tunnel`: carries a connection to a listener in this guest over the stream. The connection goes by the loopback interface
//! or to a unix socket, so the guest needs no network.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use machinen_protocol::frame::Kind;
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::runtime::Handle;
use tokio::sync::watch;

use super::exchange::Exchange;
use super::stream::{Abort, Chunk, FrameReader, FrameWriter};
use super::threads::FILES;
use crate::reply::{Done, ErrorReply};
use crate::request::{Destination, Tunnel};

/// The result of `tunnel`: the bytes carried in each direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Carried {
    to_guest: u64,
    from_guest: u64,
}

/// Connects, and carries bytes until both sides have ended their direction.
pub async fn tunnel<R, W>(request: Tunnel, exchange: &mut Exchange<R, W>) -> Result<Carried, Abort>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    match request.to {
        Destination::Port(port) => {
            let mut connection = connect(port).await.map_err(|error| Abort::io(format!("port {port}"), &error))?;
            // The tunnel works without it too.
            let _ = connection.set_nodelay(true);
            let (read, write) = connection.split();
            let carried = carry(exchange, read, write).await;
            if carried.is_err() {
                // The program in the guest sees a reset instead of an orderly end.
                let _ = connection.set_zero_linger();
            }
            carried
        }
        Destination::Path(path) => {
            let connecting = move || {
                // Connecting to a unix socket does not wait, but looking its path up may.
                let connected = Handle::current().block_on(UnixStream::connect(&path));
                connected.map_err(|error| ErrorReply::io(&path, &error))
            };
            let mut connection = FILES.run(&mut exchange.input, connecting).await??;
            let (read, write) = connection.split();
            carry(exchange, read, write).await
        }
    }
}

/// Tries both addresses of `localhost`, because a program that listens there may have either.
async fn connect(port: u16) -> io::Result<TcpStream> {
    let loopback: [IpAddr; 2] = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
    match TcpStream::connect((loopback[0], port)).await {
        Err(refused) if refused.kind() == io::ErrorKind::ConnectionRefused => {
            TcpStream::connect((loopback[1], port)).await.map_err(|_| refused)
        }
        connected => connected,
    }
}

async fn carry<R, W>(
    exchange: &mut Exchange<R, W>,
    read: impl AsyncRead + Unpin,
    write: impl AsyncWrite + Unpin,
) -> Result<Carried, Abort>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let Exchange { input, output, .. } = exchange;
    output.send_json(Kind::Started, &Done {}).await?;
    let (finished, mut to_guest) = watch::channel(None);
    let inwards = async {
        let bytes = carry_inwards(input, write).await?;
        finished.send_replace(Some(bytes));
        // The host stays until it is answered. If its stream ends before, that is a failure, even if there is nothing to answer.
        input.closed().await;
        Err(Abort::Gone)
    };
    let outwards = async {
        let from_guest = carry_outwards(read, output).await?;
        // Waiting cannot fail, because the sender outlives it.
        let to_guest = to_guest.wait_for(Option::is_some).await.map_err(|_| Abort::Gone)?.unwrap_or(0);
        Ok(Carried { to_guest, from_guest })
    };
    tokio::select! {
        failed = inwards => failed,
        done = outwards => done,
    }
}

async fn carry_inwards(
    input: &mut FrameReader<impl AsyncRead + Unpin>,
    mut connection: impl AsyncWrite + Unpin,
) -> Result<u64, Abort> {
    let mut bytes = 0;
    while let Some(piece) = input.body().await? {
        connection.write_all(&piece).await.map_err(|error| broken(&error))?;
        bytes += piece.len() as u64;
    }
    match connection.shutdown().await {
        // The peer has closed both directions. What it sent before is still to be read.
        Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(bytes),
        done => done.map(|()| bytes).map_err(|error| broken(&error)),
    }
}

async fn carry_outwards(
    mut connection: impl AsyncRead + Unpin,
    output: &mut FrameWriter<impl AsyncWrite + Unpin>,
) -> Result<u64, Abort> {
    let mut chunk = Chunk::new();
    let mut bytes = 0;
    loop {
        let n = connection.read(chunk.payload()).await.map_err(|error| broken(&error))?;
        if n == 0 {
            break;
        }
        output.send_chunk(&mut chunk, Kind::Data, n).await?;
        bytes += n as u64;
    }
    output.send(Kind::Eof, &[]).await?;
    Ok(bytes)
}

fn broken(error: &io::Error) -> Abort {
    Abort::io("the connection in the guest", error)
}
