//! The agent: serves the host's operations over the channel, one stream each. Single-threaded but for what may wait for a file system,
//! which has threads (`threads`).

mod archive;
mod child;
mod clock;
mod command;
mod criu;
mod directory;
mod doorbell;
mod exec;
mod files;
mod format;
mod freeze;
mod gate;
mod identity_files;
mod lifecycle;
mod main_command;
mod operation;
mod port;
mod rejuvenate;
mod secrets;
mod shares;
mod stats;
mod stream;
mod terminal;
#[cfg(test)]
mod tests;
mod threads;
mod tunnel;
mod user;
mod vfork;
mod watch;

use std::convert::Infallible;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use machinen_channel::{Incoming, Opener};
use tokio::sync::{self, mpsc};

use crate::config::{BootConfig, GuestConfig, Share};
use crate::reply::{ErrorReply, Rejuvenated};
use crate::system::after_doorbell;
use crate::system::console::give_up;
use crate::system::phases::Phases;
use crate::system::step::{Failed, Step};
pub use criu::hook as criu_hook;
use criu::{LazyPages, MainCommand};
use gate::Gate;
use identity_files::IdentityFiles;
use lifecycle::Lifecycle;
use secrets::Secrets;
use terminal::Terminals;

/// Where operations are served.
const OPERATIONS_PORT: u32 = 1978;

/// What pid 1 hands to the agent.
#[derive(Debug)]
pub struct Guest {
    pub config: GuestConfig,
    pub boot: BootConfig,
    /// A directory of the filesystem that takes the root's writes.
    pub writable: OwnedFd,
    /// The same of the copy of a host directory.
    pub mounted: Option<OwnedFd>,
    pub phases: Phases,
}

/// What every operation can reach.
struct Context {
    /// A copy gets another environment.
    config: Mutex<GuestConfig>,
    lifecycle: Lifecycle,
    gate: Gate,
    /// What of the host's is shared.
    shares: Vec<Share>,
    /// `/`, unless this is a test.
    root: PathBuf,
    /// Of the last freeze: what a copy made during it writes.
    identity_files: Mutex<Option<IdentityFiles>>,
    /// The main command, once it runs.
    main: Mutex<Option<MainCommand>>,
    /// Held while it is being started: it cannot be started twice.
    main_start: tokio::sync::Mutex<()>,
    lazy: LazyPages,
    /// What was renewed, in a copy.
    rejuvenated: Mutex<Option<Rejuvenated>>,
    /// It is to go on when its stream ends.
    main_detached: AtomicBool,
    terminals: Terminals,
    secrets: Mutex<Secrets>,
}

impl Context {
    fn config(&self) -> MutexGuard<'_, GuestConfig> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn secrets(&self) -> MutexGuard<'_, Secrets> {
        self.secrets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn main(&self) -> MutexGuard<'_, Option<MainCommand>> {
        self.main.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn rejuvenated(&self) -> MutexGuard<'_, Option<Rejuvenated>> {
        self.rejuvenated.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn identity_files(&self) -> MutexGuard<'_, Option<IdentityFiles>> {
        self.identity_files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs on a thread what may wait for a file system whose server does not answer (9p, FUSE): the agent goes on meanwhile.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, ErrorReply> {
    // Only a panic could lose the result, and that ends the whole agent.
    tokio::task::spawn_blocking(work).await.map_err(|error| ErrorReply::io("thread", &error.into()))
}

/// Serves until the machine is reset. Comes back only when it cannot serve at all.
pub fn run(guest: Guest) -> Result<Infallible, Failed> {
    keep_heap();
    runtime().step("runtime")?.block_on(serve(guest))
}

fn runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(threads::MOST).build()
}

/// What is free below the top of the heap stays the agent's, up to this much.
const KEPT_HEAP: libc::c_int = 4 << 20;

/// Lets the buffers of a stream come from the heap and stay in it, instead of being mapped and given back each time.
fn keep_heap() {
    for option in [libc::M_TRIM_THRESHOLD, libc::M_MMAP_THRESHOLD] {
        // SAFETY: sets a number of the allocator's.
        unsafe { libc::mallopt(option, KEPT_HEAP) };
    }
}

async fn serve(mut guest: Guest) -> Result<Infallible, Failed> {
    guest.phases.mark("agent");
    let port = port::open().await.step("channel")?;
    guest.phases.mark("port");
    let (sessions, current) = sync::watch::channel(None);
    let context = Arc::new(Context {
        config: Mutex::new(guest.config),
        lifecycle: Lifecycle::new(guest.writable, guest.mounted, current),
        gate: if guest.boot.revive { Gate::closed() } else { Gate::new() },
        shares: std::mem::take(&mut guest.boot.shares),
        root: "/".into(),
        identity_files: Mutex::default(),
        main: Mutex::default(),
        main_start: tokio::sync::Mutex::default(),
        lazy: LazyPages::default(),
        rejuvenated: Mutex::default(),
        main_detached: AtomicBool::new(false),
        terminals: Terminals::default(),
        secrets: Mutex::default(),
    });
    let mut unfinished = Some((guest.boot, guest.phases));
    machinen_channel::serve_guest(port, |opener, incoming| {
        // Before anything of the session can ask.
        context.gate.new_session();
        sessions.send_replace(Some(opener.clone()));
        let first = unfinished.take();
        let context = Arc::clone(&context);
        tokio::spawn(async move {
            if let Some((boot, phases)) = first {
                complete(&opener, &boot, phases).await;
            }
            serve_session(context, opener, incoming).await;
        });
    })
    .await
    .step("channel")?;
    Err(Failed::new("channel", io::ErrorKind::UnexpectedEof.into()))
}

/// Tells the host that this guest is there, and makes the rest of it.
async fn complete(opener: &Opener, boot: &BootConfig, mut phases: Phases) {
    phases.mark("session");
    doorbell::ring(opener, || {
        phases.mark("doorbell");
        after_doorbell::complete(boot, &mut phases).unwrap_or_else(|failed| give_up(&failed));
        phases.mark("complete");
    })
    .await;
    phases.mark("answered");
    phases.print_if_asked();
}

async fn serve_session(context: Arc<Context>, session: Opener, mut incoming: mpsc::Receiver<Incoming>) {
    while let Some(request) = incoming.recv().await {
        let (context, session) = (Arc::clone(&context), session.clone());
        tokio::spawn(async move {
            if request.port != OPERATIONS_PORT {
                return request.refuse();
            }
            // An opener that is gone already wants nothing.
            if let Ok(stream) = request.accept().await {
                operation::serve(&context, session, stream).await;
            }
        });
    }
}
