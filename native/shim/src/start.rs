//! The start of a VM, in six steps.

use crate::agent::Agent;
use crate::entry::Entry;
use crate::event::Event;
use crate::failed::{Failed, Step};
use crate::identity::Identity;
use crate::log::Log;
use crate::memory::Memory;
use crate::network::{self, Card, Forwards};
use crate::plan::{self, Inherit, Plan};
use crate::process::{Inherited, Process};
use crate::shares::{self, Server};
use crate::state::{Started, State};
use crate::stop::{Ask, Stops};
use crate::transcript::Transcript;
use crate::{control, files, guest_ports, owner, vsock};
use machinen_channel::connect_host;
use machinen_protocol::ports;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};

/// A running VM and everything that serves it.
pub struct Vm {
    pub vmm: Process,
    pub state: Arc<State>,
    pub asks: mpsc::Receiver<Ask>,
    pub console: JoinHandle<()>,
    /// The tasks that serve the guest's streams. They end once the VM is over.
    pub channel: JoinSet<()>,
    pub control: JoinHandle<()>,
}

/// Starts the VM and tells the starter. After a failure the VMM is gone; the caller removes the files.
pub async fn start(plan: &Plan, forwards: Option<Forwards>, stops: &mut Stops) -> Result<Vm, Failed> {
    let files = open_files(plan)?;
    let listeners = listen(plan)?;
    let prints = open_logs(plan)?;
    let server = match &plan.shares {
        Some(shares) => Some(shares::start(plan, shares, &prints.vmm, stops).await?),
        None => None,
    };
    let (mut vmm, ends) = spawn(plan, files.inherited, forwards, server, &prints)?;
    let (entry, shim) = enter(plan, &mut vmm).await?;
    let shares = ends.shares.as_ref().map(|server| &server.report);
    let started = Event::Started { shim, vmm: vmm.identity, shares }.line();
    let vm = serve(plan, entry, files.memory, listeners, vmm, ends, prints);
    owner::tell(&started);
    Ok(vm)
}

/// The files that the VMM inherits.
struct Files {
    memory: Option<Arc<Memory>>,
    inherited: Vec<Inherited>,
}

/// Step 1: opens files for the VMM.
fn open_files(plan: &Plan) -> Result<Files, Failed> {
    let memory = plan.memory.as_ref().map(Memory::open).transpose().map_err(Failed::at(Step::Files))?.map(Arc::new);
    let mut inherited = Vec::new();
    if let (Some(planned), Some(memory)) = (&plan.memory, &memory) {
        let file = memory.file().try_clone().map_err(vmm_failed(plan))?;
        inherited.push(Inherited { fd: planned.fd(), what: file.into() });
    }
    for Inherit { fd, path } in &plan.inherit {
        let file = files::open(path).map_err(|error| Failed::io(Step::Files, path.display(), error))?;
        inherited.push(Inherited { fd: *fd, what: file.into() });
    }
    Ok(Files { memory, inherited })
}

/// The sockets that others connect to.
struct Listeners {
    control: UnixListener,
    vsock: UnixListener,
}

/// Step 2: listens. The sockets exist before the VMM does, so an early client waits.
fn listen(plan: &Plan) -> Result<Listeners, Failed> {
    let bind = |path: &Path| UnixListener::bind(path).map_err(|error| registry_failed(path, error));
    let control = bind(&plan.control_path)?;
    let vsock = match &plan.channel {
        Some(channel) => bind(&channel.vsock_path)?,
        None => bind(&guest_ports::socket(&plan.vsock_path(), ports::LIFECYCLE))?,
    };
    Ok(Listeners { control, vsock })
}

/// The logs of what is printed.
struct Prints {
    vmm: Arc<Transcript>,
    console: Transcript,
    output: Log,
}

/// Step 3: opens the logs. Then the server of the shares is started (`shares`), which prints, and must be ready before the guest asks.
fn open_logs(plan: &Plan) -> Result<Prints, Failed> {
    let log = |path: &Path| {
        let failed = |error| Failed::io(Step::Files, path.display(), error);
        Log::new(path.to_owned(), plan.console.max_bytes).map_err(failed)
    };
    Ok(Prints {
        vmm: Arc::new(Transcript::new(log(&plan.vmm_log_path)?)),
        console: Transcript::new(log(&plan.console.log_path)?),
        output: log(&plan.output_log_path)?,
    })
}

/// The shim's ends of the pairs whose other ends the VMM has.
struct Ends<'a> {
    console: tokio::net::UnixStream,
    /// The channel's port, and whether the guest was running before.
    port: Option<(tokio::net::UnixStream, bool)>,
    network: Option<(&'a plan::Network, Card, Forwards)>,
    /// The server of the shares, whose stream the VMM has.
    shares: Option<Server>,
}

/// Step 4: starts the VMM with one end of every pair.
fn spawn<'a>(
    plan: &'a Plan,
    mut inherited: Vec<Inherited>,
    forwards: Option<Forwards>,
    server: Option<(Server, Inherited)>,
    prints: &Prints,
) -> Result<(Process, Ends<'a>), Failed> {
    let failed = vmm_failed(plan);
    let (console, end) = pair().map_err(&failed)?;
    inherited.push(Inherited { fd: plan.console.fd, what: end.into() });
    let mut port = None;
    if let Some(channel) = &plan.channel {
        let (ours, end) = pair().map_err(&failed)?;
        inherited.push(Inherited { fd: channel.fd, what: end.into() });
        port = Some((ours, channel.resume));
    }
    let mut network = None;
    if let (Some(planned), Some(forwards)) = (&plan.network, forwards) {
        let vsock_path = plan.vsock_path();
        let (card, end) = Card::listen(vsock_path.parent().unwrap_or(Path::new("/"))).map_err(&failed)?;
        inherited.push(Inherited { fd: planned.fd, what: end.into() });
        network = Some((planned, card, forwards));
    }
    let mut shares = None;
    if let Some((server, stream)) = server {
        inherited.push(stream);
        shares = Some(server);
    }
    let vmm = Process::spawn(&plan.vmm, &prints.vmm, inherited).map_err(&failed)?;
    Ok((vmm, Ends { console, port, network, shares }))
}

/// Step 5: adds shim and VMM to the entry. A VM that is not in the registry must not run.
async fn enter(plan: &Plan, vmm: &mut Process) -> Result<(Entry, Identity), Failed> {
    let mut entry = Entry::new(plan.entry_path.clone(), plan.entry.clone());
    let entered = Identity::of(std::process::id())
        .and_then(|shim| entry.started(shim, vmm.identity, is_resumed(plan)).map(|()| shim));
    match entered {
        Ok(shim) => Ok((entry, shim)),
        Err(error) => {
            vmm.kill();
            vmm.wait().await;
            Err(registry_failed(&plan.entry_path, error))
        }
    }
}

/// Step 6: starts everything that serves the VM.
fn serve(
    plan: &Plan,
    entry: Entry,
    memory: Option<Arc<Memory>>,
    listeners: Listeners,
    vmm: Process,
    ends: Ends,
    prints: Prints,
) -> Vm {
    let (ask, asks) = mpsc::channel(16);
    let session = ends.port.map(|(port, resume)| connect_host(port, resume));
    let agent = match &session {
        Some(session) => Agent::Channel(session.opener.clone()),
        None => Agent::Socket(plan.vsock_path()),
    };
    let started = Started {
        entry,
        vmm: vmm.identity,
        agent,
        vmm_prints: prints.vmm,
        memory,
        shares: ends.shares.as_ref().map(|server| Arc::clone(&server.control)),
        detached: plan.detached,
        ready: is_resumed(plan),
    };
    let state = Arc::new(State::new(started, prints.console, prints.output, ask));
    let is_over = state.over.subscribe();
    let mut channel = JoinSet::new();
    match session {
        Some(session) => {
            let driver = session.driver;
            // The driver ends when the VMM closes its end of the pair.
            channel.spawn(async move { drop(driver.await) });
            channel.spawn(guest_ports::serve(session.incoming, plan.vsock_path(), Arc::clone(&state)));
            channel.spawn(vsock::serve(listeners.vsock, session.opener, is_over));
        }
        None => drop(channel.spawn(guest_ports::serve_lifecycle(listeners.vsock, Arc::clone(&state), is_over))),
    }
    let console = tokio::spawn({
        let state = Arc::clone(&state);
        async move { state.console.drain(ends.console).await }
    });
    let control = tokio::spawn(control::serve(listeners.control, Arc::clone(&state)));
    if let Some(server) = ends.shares {
        channel.spawn(shares::attend(server.process, Arc::clone(&state)));
    }
    if let Some((network, card, forwards)) = ends.network {
        channel.spawn(network::serve(network.clone(), card, forwards, Arc::clone(&state)));
    }
    Vm { vmm, state, asks, console, channel, control }
}

/// Whether the guest was running before this VMM.
fn is_resumed(plan: &Plan) -> bool {
    plan.channel.as_ref().is_some_and(|channel| channel.resume)
}

fn registry_failed(path: &Path, error: io::Error) -> Failed {
    Failed::io(Step::Registry, path.display(), error)
}

fn vmm_failed(plan: &Plan) -> impl Fn(io::Error) -> Failed {
    |error| Failed::io(Step::Vmm, &plan.vmm.argv[0], error)
}

/// A socketpair: the shim's end, for the runtime, and the VMM's.
fn pair() -> io::Result<(tokio::net::UnixStream, UnixStream)> {
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    Ok((tokio::net::UnixStream::from_std(ours)?, theirs))
}
