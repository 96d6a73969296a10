//! The guest's network: forwarded ports of the host, and gvproxy, which serves the guest's card.
//!
//! gvproxy is started when it is first needed (the guest sends a frame, a client comes to a forwarded port) and started again when it
//! ends: a VM that uses no network costs none. What outlives it is here: the listeners, and the VMM's end of the card.

use crate::event::ProcessExit;
use crate::failed::{Failed, Step};
use crate::plan::{self, Forward};
use crate::process::{Inherited, Process};
use crate::state::State;
use nix::sys::socket::{MsgFlags, recv};
use std::future::poll_fn;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tokio::time::Instant;

/// Where gvproxy finds the card; the listeners follow.
const CARD_FD: i32 = 3;
/// One that ends sooner than this was of no use.
const QUICK: Duration = Duration::from_secs(1);
/// After so many of them in a row it is not tried again.
const QUICK_ENDS: u32 = 5;

/// Forwarded ports, bound.
pub struct Forwards(Vec<(TcpListener, u16)>);

impl Forwards {
    /// Binds all of them or none. From now on clients wait instead of being refused.
    pub fn bind(network: &plan::Network) -> Result<Self, Failed> {
        let bind = |Forward { host, guest_port }: &Forward| {
            let listener = TcpListener::bind(host).and_then(|listener| {
                listener.set_nonblocking(true)?;
                Ok(listener)
            });
            listener.map(|listener| (listener, *guest_port)).map_err(|error| Failed::new(Step::Network, host, &error))
        };
        Ok(Forwards(network.forwards.iter().map(bind).collect::<Result<_, _>>()?))
    }
}

/// The other end of the guest's card: a socket the VMM listens on, and takes one client of after the other.
pub struct Card(PathBuf);

impl Card {
    /// The listener is the VMM's.
    pub fn listen(dir: &Path) -> io::Result<(Self, UnixListener)> {
        let path = dir.join("net.sock");
        let listener = UnixListener::bind(&path)?;
        Ok((Card(path), listener))
    }
}

/// Serves the network until the VM is over; nothing of it runs after that.
pub async fn serve(plan: plan::Network, card: Card, forwards: Forwards, log: PathBuf, state: Arc<State>) {
    let say = |what: &str| state.console.log.write(format!("machinen: {what}\n").as_bytes());
    let mut quick = 0;
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
        let since = Instant::now();
        let started = connection.and_then(|connection| start(&plan, connection, &forwards, &log));
        let mut gvproxy = match started {
            Ok(gvproxy) => gvproxy,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return,
            Err(error) => return say(&format!("the network is down: {}: {error}", plan.gvproxy.argv[0])),
        };
        let ended = tokio::select! {
            () = state.over() => {
                gvproxy.kill();
                gvproxy.wait().await;
                return;
            }
            ended = gvproxy.wait() => ended,
        };
        quick = if since.elapsed() < QUICK { quick + 1 } else { 0 };
        if *state.over.borrow() {
            return;
        }
        if quick == QUICK_ENDS {
            return say(&format!("the network is down: gvproxy {}, again and again", how(ended)));
        }
        say(&format!("gvproxy {}: connections through it are lost, new ones are served by another", how(ended)));
    }
}

fn how(ended: ProcessExit) -> String {
    match ended {
        ProcessExit { signal: Some(signal), .. } => format!("was ended by signal {signal}"),
        ProcessExit { code, .. } => format!("ended with code {}", code.unwrap_or(-1)),
    }
}

/// Resolves when the guest has sent something, or a client has come. Fails with `UnexpectedEof` when the VMM has left.
async fn until_needed(connection: &UnixStream, forwards: &Forwards) -> io::Result<()> {
    let sent = async {
        loop {
            connection.readable().await?;
            let peek = connection
                .try_io(Interest::READABLE, || Ok(recv(connection.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK)?));
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

/// Resolves when a client waits at one of the listeners, which is not accepted.
async fn any_client(Forwards(forwards): &Forwards) -> io::Result<()> {
    // Registered anew each time: whether one waits *now* is the question.
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
    log: &Path,
) -> io::Result<Process> {
    let mut command = plan.gvproxy.clone();
    let mut inherited = vec![Inherited { fd: CARD_FD, what: connection.into_std()?.into() }];
    for (fd, (listener, guest_port)) in (CARD_FD + 1..).zip(forwards) {
        inherited.push(Inherited { fd, what: listener.try_clone()?.into() });
        command.argv.extend(["-forward".to_owned(), format!("{fd}={guest_port}")]);
    }
    Process::spawn(&command, log, inherited, None)
}
