//! The host's files that a guest shares: a server (native/share) that the shim starts before the VMM and connects with it. The server opens
//! the files and confines itself to them before the VMM runs.

use crate::error::Error;
use crate::failed::{Failed, Step};
use crate::plan::{Plan, Shares};
use crate::process::{Inherited, Process};
use crate::share_control::{Control, Report, SERVER, is_end};
use crate::state::State;
use crate::stop::Stops;
use crate::transcript::Transcript;
use rustix::io::Errno;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;

/// The server's descriptors: the stream of the guest's requests, and what the shim asks.
const STREAM_FD: i32 = 3;
const CONTROL_FD: i32 = 4;
/// How long after the server's orderly end, which follows that of the VMM, the VMM's may be noticed.
const REST: Duration = Duration::from_secs(2);

/// A server that is ready to serve.
pub struct Server {
    pub process: Process,
    pub control: Arc<Control>,
    pub report: Report,
}

/// Starts the server and waits until it can serve. Returns the VMM's end of the stream as well. After a failure the server is gone.
pub async fn start(
    plan: &Plan,
    shares: &Shares,
    prints: &Arc<Transcript>,
    stops: &mut Stops,
) -> Result<(Server, Inherited), Failed> {
    let failed = |error| Failed::io(Step::Shares, SERVER, error);
    let (theirs, guests) = UnixStream::pair().map_err(failed)?;
    let (control, end) = UnixStream::pair().map_err(failed)?;
    let mut control = Control::new(control).map_err(failed)?;
    let inherited =
        vec![Inherited { fd: STREAM_FD, what: theirs.into() }, Inherited { fd: CONTROL_FD, what: end.into() }];
    let mut process = Process::spawn(&shares.server, prints, inherited).map_err(failed)?;
    let greeted = tokio::select! {
        greeted = control.greet(shares) => greeted,
        () = stops.unwanted(plan.detached) => Err(Error::errno(SERVER, Errno::CANCELED)),
    };
    match greeted {
        Ok(report) => {
            let stream = Inherited { fd: shares.fd, what: guests.into() };
            Ok((Server { process, control: Arc::new(control), report }, stream))
        }
        Err(error) => {
            let alone = if is_end(&error) { timeout(REST, process.wait()).await.ok() } else { None };
            process.kill();
            process.wait().await;
            let Some(ended) = alone else { return Err(Failed::at(Step::Shares)(error)) };
            process.drain_output(REST).await;
            Err(failed(io::Error::other(format!("it {}, having printed: {}", ended.how(), prints.tail().trim_end()))))
        }
    }
}

/// Stays with the server until the VM is over, and says when it ends before: the guest's callers get errors then, and the VM goes on.
pub async fn attend(mut process: Process, state: Arc<State>) {
    let ended = tokio::select! {
        () = state.over() => {
            process.kill();
            process.wait().await;
            return;
        }
        ended = process.wait() => ended,
    };
    // It ends in order when the VMM has closed the stream, usually because it has ended, which `state` will say.
    if ended.code == Some(0) && timeout(REST, state.over()).await.is_ok() {
        return;
    }
    let what = format!("machinen-share {}: the shared directories are gone", ended.how());
    state.console.log.write(format!("machinen: {what}\n").as_bytes());
    // If the entry cannot be written, the console's log says it alone.
    let _ = state.entry().shares_lost(&what);
}
