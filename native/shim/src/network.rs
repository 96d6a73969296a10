//! The guest's network: forwarded ports of the host, and gvproxy, which serves the guest's card.
//!
//! gvproxy is started when it is first needed (the guest sends a frame, or a client comes to a forwarded port) and started again when it
//! ends, so a VM that uses no network costs no process. The shim holds what outlives gvproxy: the listeners, and the VMM's end of the card.

use crate::error::Error;
use crate::plan::{self, Forward};
use crate::process::{Inherited, Process};
use crate::state::State;
use rustix::net::{RecvFlags, recv};
use std::future::poll_fn;
use std::io;
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep};

/// The descriptor of the card in gvproxy; those of the listeners follow.
const CARD_FD: i32 = 3;
/// A gvproxy that ran this long was of use: when it ends, another one is started at once.
const USEFUL: Duration = Duration::from_secs(60);
/// The first pause after a gvproxy that was of no use; each further pause is twice the one before.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// How long to wait before gvproxy is started again.
#[derive(Default)]
struct Pauses {
    /// How many in a row were not useful.
    failures: u32,
}

impl Pauses {
    /// The pause after a gvproxy that lived for `lived`, or could not be started (`None`). After the first one there is none.
    fn next(&mut self, lived: Option<Duration>) -> Duration {
        if lived.is_some_and(|lived| lived >= USEFUL) {
            self.failures = 0;
        }
        let doubled = match (self.failures, lived) {
            (0, Some(_)) => Duration::ZERO,
            (failures, _) => FIRST_PAUSE.saturating_mul(1 << failures.min(16)),
        };
        self.failures += 1;
        doubled.min(LONGEST_PAUSE)
    }
}

/// The listeners of the forwarded ports.
pub struct Forwards(Vec<(TcpListener, u16)>);

impl Forwards {
    /// Binds all ports or none. From then on clients wait instead of being refused.
    pub fn bind(network: &plan::Network) -> Result<Self, Error> {
        let bind = |Forward { host, guest_port }: &Forward| {
            let listener = TcpListener::bind(host).and_then(|listener| {
                listener.set_nonblocking(true)?;
                Ok(listener)
            });
            listener.map(|listener| (listener, *guest_port)).map_err(|error| Error::io(host, error))
        };
        Ok(Forwards(network.forwards.iter().map(bind).collect::<Result<_, _>>()?))
    }
}

/// The other end of the guest's card: a socket on which the VMM listens, and on which it serves one client after the other.
pub struct Card(PathBuf);

impl Card {
    /// Makes the socket. The listener is for the VMM.
    pub fn listen(dir: &Path) -> io::Result<(Self, UnixListener)> {
        let path = dir.join("net.sock");
        let listener = UnixListener::bind(&path)?;
        Ok((Card(path), listener))
    }
}

/// Serves the network until the VM is over. Then no gvproxy is left.
pub async fn serve(plan: plan::Network, card: Card, forwards: Forwards, state: Arc<State>) {
    let say = |what: &str| state.console.log.write(format!("machinen: {what}\n").as_bytes());
    let mut pauses = Pauses::default();
    loop {
        let needed = async {
            let connection = UnixStream::connect(&card.0).await?;
            until_needed(&connection, &forwards).await?;
            io::Result::Ok(connection)
        };
        let connection = tokio::select! {
            () = state.over() => return,
            connection = needed => connection,
        };
        let started = match connection {
            Ok(connection) => start(&plan, connection, &forwards, &state),
            // The VMM has closed its end of the card, usually because it has ended, which `state` will say.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                tokio::select! {
                    () = state.over() => return,
                    () = turn_away(&forwards, FIRST_PAUSE) => continue,
                }
            }
            Err(error) => Err(error),
        };
        let (pause, why) = match started {
            Ok(mut gvproxy) => {
                let since = Instant::now();
                tokio::select! {
                    () = state.over() => {
                        gvproxy.kill();
                        gvproxy.wait().await;
                        return;
                    }
                    ended = gvproxy.wait() => {
                        let why = format!("gvproxy {}: connections through it are lost", ended.how());
                        (pauses.next(Some(since.elapsed())), why)
                    }
                }
            }
            Err(error) => (pauses.next(None), format!("gvproxy is not started: {}: {error}", plan.gvproxy.argv[0])),
        };
        if *state.over.borrow() {
            return;
        }
        if pause.is_zero() {
            say(&format!("{why}, new ones are served by another"));
            continue;
        }
        say(&format!("{why}. The network is down; next try in {} ms", pause.as_millis()));
        tokio::select! {
            () = state.over() => return,
            () = turn_away(&forwards, pause) => {}
        }
    }
}

/// Closes connections to the listeners for the length of the pause, because they might wait for ever.
async fn turn_away(forwards: &Forwards, pause: Duration) {
    let closing = async {
        // Without a free descriptor clients wait nevertheless.
        while any_client(forwards).await.is_ok() && forwards.0.iter().all(|(listener, _)| close_clients(listener)) {}
        std::future::pending().await
    };
    tokio::select! {
        () = closing => {}
        () = sleep(pause) => {}
    }
}

/// Closes all clients that wait. Returns false if that failed.
fn close_clients(listener: &TcpListener) -> bool {
    loop {
        match listener.accept() {
            Ok(client) => drop(client),
            Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
        }
    }
}

/// Resolves when the guest has sent something, or a client has come. Fails with `UnexpectedEof` when the VMM has closed its end.
async fn until_needed(connection: &UnixStream, forwards: &Forwards) -> io::Result<()> {
    let sent = async {
        loop {
            connection.readable().await?;
            let peek = connection.try_io(Interest::READABLE, || Ok(recv(connection, &mut [0], RecvFlags::PEEK)?.1));
            match peek {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    };
    tokio::select! {
        done = sent => done,
        done = any_client(forwards) => done,
    }
}

/// Resolves when a client waits at one of the listeners. The client is not accepted.
async fn any_client(Forwards(forwards): &Forwards) -> io::Result<()> {
    // Registered anew each time, to learn whether a client waits now.
    let listeners = forwards
        .iter()
        // SAFETY: a borrowed descriptor is the same open one for as long as the borrow lives.
        .map(|(listener, _)| unsafe { AsyncFd::register_with_interest(listener.as_fd(), Interest::READABLE) })
        .map(|registered| registered.map_err(io::Error::from))
        .collect::<io::Result<Vec<_>>>()?;
    poll_fn(|cx| {
        for listener in &listeners {
            if let Poll::Ready(ready) = listener.poll_read_ready(cx) {
                return Poll::Ready(ready.map(drop));
            }
        }
        Poll::Pending
    })
    .await
}

/// Starts gvproxy on the card and all listeners.
fn start(
    plan: &plan::Network,
    connection: UnixStream,
    Forwards(forwards): &Forwards,
    state: &State,
) -> io::Result<Process> {
    let mut command = plan.gvproxy.clone();
    let mut inherited = vec![Inherited { fd: CARD_FD, what: connection.into_std()?.into() }];
    for (fd, (listener, guest_port)) in (CARD_FD + 1..).zip(forwards) {
        inherited.push(Inherited { fd, what: listener.try_clone()?.into() });
        command.argv.extend(["-forward".to_owned(), format!("{fd}={guest_port}")]);
    }
    Process::spawn(&command, &state.vmm_prints, inherited)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_limit_and_start_over() {
        let (mut pauses, quick) = (Pauses::default(), Some(Duration::from_millis(1100)));
        let lengths: Vec<_> = (0..9).map(|_| pauses.next(quick).as_millis()).collect();
        assert_eq!(lengths, [0, 500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000]);
        assert_eq!(pauses.next(Some(USEFUL)).as_millis(), 0);
        assert_eq!(pauses.next(quick).as_millis(), 500);
        let mut pauses = Pauses::default();
        assert_eq!([pauses.next(None), pauses.next(None)].map(|pause| pause.as_millis()), [250, 500]);
        for _ in 0..100 {
            assert!(pauses.next(None) <= LONGEST_PAUSE);
        }
    }
}
