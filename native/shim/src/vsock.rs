//! Host to guest: `vsock.sock` and its CONNECT line (docs/protocol.md, section 2).

use crate::accept::next_client;
use crate::peer_closed::peer_closed;
use crate::{line, proxy};
use machinen_channel::Opener;
use std::io::{self, ErrorKind};
use tokio::io::AsyncWriteExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// The most connections that are served at once; the channel has no more streams either.
const MAX_CLIENTS: usize = machinen_channel::MAX_STREAMS;
/// The length of the longest line, `CONNECT 4294967295`.
const MAX_CONNECT: usize = 18;

/// Serves clients until the VM is `over`, and then until every connection has got what was still under way to it.
pub async fn serve(listener: UnixListener, opener: Opener, mut over: watch::Receiver<bool>) {
    let mut clients = JoinSet::new();
    loop {
        tokio::select! {
            client = next_client(&listener), if clients.len() < MAX_CLIENTS => {
                clients.spawn(serve_client(client, opener.clone()));
            }
            Some(_) = clients.join_next() => {}
            () = async { drop(over.wait_for(|over| *over).await) } => break,
        }
    }
    drop(listener);
    while clients.join_next().await.is_some() {}
}

/// Serves one client. If it breaks the rules, or asks for something that is refused, its connection is closed.
async fn serve_client(mut client: UnixStream, opener: Opener) -> io::Result<()> {
    let line = line::read(&mut client, MAX_CONNECT).await?;
    let port = port(&line.text).ok_or(ErrorKind::InvalidData)?;
    let gone = peer_closed(&client)?;
    let stream = tokio::select! {
        stream = opener.open_with(port, &line.rest) => stream?,
        // The client may leave while a guest that boots keeps it waiting.
        () = gone => return Ok(()),
    };
    client.write_all(format!("OK {port}\n").as_bytes()).await?;
    drop(line);
    proxy::run(client, stream).await
}

/// The port of a CONNECT line: decimal digits and nothing else.
fn port(line: &[u8]) -> Option<u32> {
    let digits = std::str::from_utf8(line.strip_prefix(b"CONNECT ")?).ok()?;
    if digits.bytes().all(|byte| byte.is_ascii_digit()) { digits.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::port;
    use proptest::prelude::*;

    #[test]
    fn only_connect_lines_are_connect_lines() {
        assert_eq!(port(b"CONNECT 1978"), Some(1978));
        assert_eq!(port(b"CONNECT 4294967295"), Some(u32::MAX));
        for line in [
            "",
            "CONNECT",
            "CONNECT ",
            "CONNECT -1",
            "CONNECT +1",
            "CONNECT 1 ",
            "CONNECT  1",
            "connect 1",
            "CONNECT 4294967296",
            "CONNECT 1\r",
            "CONNECT 0x1",
        ] {
            assert_eq!(port(line.as_bytes()), None, "{line:?}");
        }
    }

    proptest! {
        #[test]
        fn every_port_is_understood(number: u32) {
            prop_assert_eq!(port(format!("CONNECT {number}").as_bytes()), Some(number));
        }

        #[test]
        fn no_line_panics(line in prop::collection::vec(any::<u8>(), 0..30)) {
            port(&line);
        }
    }
}
