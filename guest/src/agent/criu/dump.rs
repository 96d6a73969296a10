//! The operation `dump`: saves every process to files, and keeps all still until the host has copied the disk that holds the files.

use std::fs;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use machinen_protocol::frame::{Frame, Kind};
use tokio::io::{AsyncRead, AsyncWrite};

use super::place::{DIR, IMAGES, SHARED_MEMORY, SHARED_MEMORY_ARCHIVE, directory, remove_images};
use super::program::Criu;
use super::record::{Record, Tree};
use super::{freeze_outside_vfork, images, kdat, process_trees};
use crate::agent::context::Context;
use crate::agent::exchange::Exchange;
use crate::agent::stream::Abort;
use crate::agent::threads::COMMANDS;
use crate::agent::{archive, freeze, shares};
use crate::reply::{Code, Done, Dumped, ErrorReply};
use crate::request::Dump;
use crate::system::cgroup;

/// The largest deleted file whose content CRIU puts into the images.
const LARGEST_GHOST: &str = "1G";
/// A CRIU that runs this long is taken to hang. It is not killed earlier, whatever limit the host asked for, because in the middle of a
/// dump CRIU's own code runs inside the processes.
const HANGS: Duration = Duration::from_secs(600);

/// Dumps the commands, and keeps them and the disk still until the host says `eof` or leaves. The processes go on in either case.
pub async fn dump<R, W>(context: &Arc<Context>, request: &Dump, exchange: &mut Exchange<R, W>) -> Result<Done, Abort>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let criu = Criu::find()?;
    let prepared = async {
        let images = IMAGES.lock().await;
        kdat::remember(&criu).await;
        remove_images(context.lifecycle.disks()).await?;
        fs::create_dir_all(DIR)?;
        Ok(images)
    };
    let images = tokio::select! {
        biased;
        () = exchange.input.lost() => return Err(Abort::Gone),
        prepared = prepared => prepared.map_err(|error: io::Error| Abort::io(DIR, &error))?,
    };
    if !context.gate.hold() {
        return Err(ErrorReply::new(Code::Busy, "a freeze is held already").into());
    }
    let held = hold(context, request, &criu, exchange).await;
    context.lifecycle.disks().thaw();
    // If the commands cannot be thawed, the gate stays closed.
    cgroup::thaw_workload().map_err(|error| Abort::io("thaw", &error))?;
    context.gate.open();
    let context = Arc::clone(context);
    tokio::spawn(async move {
        // Images that cannot be removed only take space; the next dump tries again.
        let _ = remove_images(context.lifecycle.disks()).await;
        drop(images);
    });
    held
}

async fn hold<R, W>(
    context: &Context,
    request: &Dump,
    criu: &Criu,
    exchange: &mut Exchange<R, W>,
) -> Result<Done, Abort>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let began = Instant::now();
    // Waits for commands that are just being started: such a process is neither the agent any more nor a command yet. The gate is closed,
    // so no others follow.
    let _none_starts = COMMANDS.acquire_all(freeze::limit(request.timeout_ms), &mut exchange.input).await?;
    context.terminals.refuse_open()?;
    let frozen = freeze_outside_vfork::stop_commands(freeze::limit(request.timeout_ms), &mut exchange.input).await?;
    // Freezing takes a moment; the time of a dump grows with the memory in use.
    let limit = request.timeout_ms.map_or(HANGS, Duration::from_millis).min(HANGS);
    if let Some(relay) = context.shares.get() {
        let locks = shares::drain(relay, freeze::limit(request.timeout_ms), &mut exchange.input).await;
        // CRIU reads files of shared directories.
        relay.resume();
        shares::check_locks(&locks?, request.lazy_umount)?;
    }
    let (trees, pipes) = process_trees::read()?;
    for (n, tree) in trees.iter().enumerate() {
        save(criu, tree, &directory(n), request.tcp_close, limit).await?;
        if began.elapsed() > limit {
            let message = format!("the processes were not dumped within {} ms", limit.as_millis());
            return Err(ErrorReply::new(Code::Timeout, message).into());
        }
    }
    archive::save(SHARED_MEMORY, SHARED_MEMORY_ARCHIVE).await?;
    let processes = trees.iter().map(|tree| tree.processes.len()).sum();
    let record = Record::new(context.config().clone(), *context.main(), trees, pipes, request.tcp_close);
    record.write().map_err(|error| Abort::io(DIR, &error))?;
    context.lifecycle.disks().freeze().await.map_err(|error| Abort::io("the disk", &error))?;
    let frozen_ms = u64::try_from(frozen.elapsed().as_millis()).unwrap_or(u64::MAX);
    exchange.output.send_json(Kind::Started, &Dumped { frozen_ms, processes }).await?;
    match exchange.input.next().await? {
        Frame { kind: Kind::Eof, .. } => Ok(Done {}),
        Frame { kind, .. } => Err(Abort::bad(format!("unexpected {kind:?} frame"))),
    }
}

/// Runs CRIU, which stops the processes in its own way and afterwards leaves them frozen, as they were.
async fn save(criu: &Criu, tree: &Tree, directory: &str, tcp_close: bool, limit: Duration) -> Result<(), Abort> {
    fs::create_dir(directory).map_err(|error| Abort::io(directory, &error))?;
    let mut run = criu.action("dump", directory);
    run.arg("-t").arg(tree.root.to_string());
    run.arg("--leave-running").arg("--freeze-cgroup").arg(cgroup::WORKLOAD).arg("--manage-cgroups=ignore");
    run.arg("--file-locks").arg("--link-remap").arg("--ghost-limit").arg(LARGEST_GHOST).arg("--skip-in-flight");
    run.arg(if tcp_close { "--tcp-close" } else { "--tcp-established" });
    if !tree.leads_session {
        run.arg("--shell-job");
    }
    run.arg("--action-script").arg(format!("/proc/{}/exe", std::process::id()));
    run.arg("--timeout").arg(limit.as_secs().max(1).to_string());
    run.finish(HANGS).await?;
    images::rearm_timers(directory.as_ref()).map_err(|error| Abort::io(directory, &error))
}
