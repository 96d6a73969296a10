//! The agent's life: one session after the other, and in each a task for every stream.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;

use machinen_channel::{Incoming, Opener};
use machinen_protocol::ports::{CHANNEL, OPERATIONS};
use tokio::sync::{mpsc, watch};

use super::context::Context;
use super::disks::Disks;
use super::gate::Gate;
use super::lifecycle::Lifecycle;
use super::port::{self, Port};
use super::{doorbell, operation, shares, threads};
use crate::config::BootConfig;
use crate::system::after_doorbell;
use crate::system::console::give_up;
use crate::system::guest::Guest;
use crate::system::phases::Phases;
use crate::system::step::{Failed, Step};

/// Serves until the machine is reset. Returns only if it cannot serve at all.
pub fn run(guest: Guest) -> Result<Infallible, Failed> {
    keep_heap();
    runtime().step("runtime")?.block_on(serve(guest))
}

fn runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(threads::MOST).build()
}

/// How many free bytes at the top of the heap are kept instead of given back to the kernel.
const KEPT_HEAP: libc::c_int = 4 << 20;

/// Makes the allocator take a stream's buffers from the heap and keep them there, instead of mapping and unmapping them each time.
fn keep_heap() {
    for option in [libc::M_TRIM_THRESHOLD, libc::M_MMAP_THRESHOLD] {
        // SAFETY: sets a parameter of the allocator.
        unsafe { libc::mallopt(option, KEPT_HEAP) };
    }
}

async fn serve(mut guest: Guest) -> Result<Infallible, Failed> {
    guest.phases.mark("agent");
    let port = port::find(CHANNEL).await.and_then(|device| Port::open(&device)).step("channel")?;
    guest.phases.mark("port");
    let (sessions, current) = watch::channel(None);
    let lifecycle = Lifecycle::new(Disks::new(guest.writable, guest.mounted), current);
    let gate = if guest.boot.revive { Gate::closed() } else { Gate::new() };
    let context = Arc::new(Context::new(guest.config, lifecycle, gate, "/".into()));
    let mut unfinished = Some((guest.boot, guest.phases));
    machinen_channel::serve_guest(port, |opener, incoming| {
        // Called before any stream of the session can ask the gate.
        context.gate.new_session();
        sessions.send_replace(Some(opener.clone()));
        let first = unfinished.take();
        let context = Arc::clone(&context);
        tokio::spawn(async move {
            if let Some((boot, phases)) = first {
                complete(&opener, &context, &boot, phases).await;
            }
            serve_session(context, opener, incoming).await;
        });
    })
    .await
    .step("channel")?;
    Err(Failed::new("channel", io::ErrorKind::UnexpectedEof.into()))
}

/// Tells the host that this guest is there, and completes the boot meanwhile.
async fn complete(opener: &Opener, context: &Context, boot: &BootConfig, mut phases: Phases) {
    phases.mark("session");
    let complete = |phases: &mut Phases| {
        after_doorbell::complete(boot, phases).unwrap_or_else(|failed| give_up(&failed));
        phases.mark("complete");
    };
    if boot.shares.is_empty() {
        doorbell::ring(opener, || {
            phases.mark("doorbell");
            complete(&mut phases);
        })
        .await;
    } else {
        // The files of /etc are written first, because a share may be mounted over them, and they are not for the host. The host is told last: a
        // share that cannot be mounted is a boot that fails.
        complete(&mut phases);
        shares::mount(context, &boot.shares).await.unwrap_or_else(|failed| give_up(&failed));
        phases.mark("shares");
        doorbell::ring(opener, || ()).await;
    }
    phases.mark("answered");
    phases.print_if_asked();
}

pub async fn serve_session(context: Arc<Context>, session: Opener, mut incoming: mpsc::Receiver<Incoming>) {
    while let Some(request) = incoming.recv().await {
        let (context, session) = (Arc::clone(&context), session.clone());
        tokio::spawn(async move {
            if request.port != OPERATIONS {
                return request.refuse();
            }
            // A stream whose opener has gone is dropped.
            if let Ok(stream) = request.accept().await {
                operation::serve(&context, session, stream).await;
            }
        });
    }
}
