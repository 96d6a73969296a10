//! The operation `revive`: the processes of a dump on this machine's disk go on here.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal};
use tokio::net::unix::pipe;

use super::place::{DIR, IMAGES, SHARED_MEMORY, SHARED_MEMORY_ARCHIVE, directory, remove_images};
use super::program::Criu;
use super::record::{Record, Tree};
use super::{hook, images};
use crate::agent::child::Child;
use crate::agent::context::Context;
use crate::agent::identity_files::IdentityFiles;
use crate::agent::process::{self, Running};
use crate::agent::stream::Abort;
use crate::agent::{archive, main_command, rejuvenate};
use crate::reply::Rejuvenated;
use crate::request::Revive;
use crate::system::after_doorbell;

/// The host has a time limit of its own for all of it.
const LIMIT: Duration = Duration::from_secs(600);

/// Makes this machine one of its own, restores the processes, then opens the gate. After a failure the gate stays closed.
pub async fn revive(context: &Arc<Context>, request: Revive) -> Result<Rejuvenated, Abort> {
    if !context.gate.is_restored() {
        return Err(Abort::bad("this machine does not wait for processes to be brought back"));
    }
    let images = IMAGES.lock().await;
    let record = Record::read().map_err(|error| Abort::io(DIR, &error))?;
    let criu = Criu::find()?;
    *context.identity_files() = Some(IdentityFiles::prepare(&context.root));
    *context.config() = record.config.clone();
    let renewed = rejuvenate::renew(context, request.identity)?;
    archive::load(SHARED_MEMORY_ARCHIVE, SHARED_MEMORY).await?;
    let mut pipes = Pipes::make(&record).map_err(|error| Abort::io("pipes", &error))?;
    for n in 0..record.trees.len() {
        link_remaps(Path::new(&directory(n))).map_err(|error| Abort::io(directory(n), &error))?;
    }
    for (n, tree) in record.trees.iter().enumerate() {
        if request.lazy {
            context.lazy.serve(&criu, &directory(n)).await?;
        }
        restore(&criu, &record, tree, &directory(n), &pipes, request.lazy).await?;
    }
    attend(context, &record, &mut pipes).map_err(|error| Abort::io("restored processes", &error))?;
    if waits_for_others(&record) {
        record.trees.iter().for_each(let_go);
    }
    after_doorbell::reserve_pids().map_err(|error| Abort::io("pids", &error))?;
    context.gate.open();
    let context = Arc::clone(context);
    tokio::spawn(async move {
        context.lazy.finished().await;
        // As after a dump, a failure to remove images is ignored.
        let _ = remove_images(context.lifecycle.disks()).await;
        drop(images);
    });
    Ok(renewed)
}

/// Whether a tree must wait for the others. With several trees none may go on before all are restored: if one changed a file that another
/// has open, CRIU would refuse the other.
fn waits_for_others(record: &Record) -> bool {
    record.trees.len() > 1
}

async fn restore(
    criu: &Criu,
    record: &Record,
    tree: &Tree,
    directory: &str,
    pipes: &Pipes,
    lazy: bool,
) -> Result<(), Abort> {
    let workload = process::workload().map_err(|error| Abort::io("cgroup", &error))?;
    let mut run = criu.action("restore", directory);
    // Restores the root as a child of the agent, in the control group that CRIU is started in.
    run.arg("--restore-detached").arg("--restore-sibling").arg("--manage-cgroups=ignore").in_group(workload);
    run.arg("--file-locks").arg(if record.tcp_close { "--tcp-close" } else { "--tcp-established" });
    if !tree.leads_session {
        run.arg("--shell-job");
    }
    if lazy {
        run.arg("--lazy-pages");
    }
    if waits_for_others(record) {
        run.arg("--leave-stopped");
    }
    for (inode, end) in tree.pipes.iter().filter_map(|inode| Some((inode, pipes.theirs.get(inode)?))) {
        let end = end.try_clone().map_err(|error| Abort::io("pipes", &error))?;
        let number = run.inherit(end);
        run.arg("--inherit-fd").arg(format!("fd[{number}]:pipe:[{inode}]"));
    }
    Ok(run.finish(LIMIT).await?)
}

/// Makes the temporary names again that CRIU expects.
fn link_remaps(directory: &Path) -> io::Result<()> {
    for (n, name) in images::link_remaps(directory)?.into_iter().enumerate() {
        match fs::hard_link(directory.join(hook::kept(n)), &name) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            linked => linked?,
        }
    }
    Ok(())
}

/// New pipes in place of those that led to the old agent, by the inodes of the old ones.
struct Pipes {
    theirs: BTreeMap<u64, OwnedFd>,
    outputs: BTreeMap<u64, pipe::Receiver>,
    inputs: BTreeMap<u64, OwnedFd>,
}

impl Pipes {
    fn make(record: &Record) -> io::Result<Self> {
        let mut pipes = Self { theirs: BTreeMap::new(), outputs: BTreeMap::new(), inputs: BTreeMap::new() };
        for old in &record.pipes {
            if !record.trees.iter().any(|tree| tree.pipes.contains(&old.inode)) {
                continue;
            }
            let (reads, writes) = pipe_with(PipeFlags::CLOEXEC)?;
            if old.agent_reads {
                pipes.outputs.insert(old.inode, pipe::Receiver::from_owned_fd(reads)?);
                pipes.theirs.insert(old.inode, writes);
            } else {
                pipes.inputs.insert(old.inode, writes);
                pipes.theirs.insert(old.inode, reads);
            }
        }
        Ok(pipes)
    }

    fn output(&mut self, inode: u64) -> io::Result<pipe::Receiver> {
        match self.outputs.remove(&inode) {
            Some(output) => Ok(output),
            // The command had closed its output: a pipe without a writer stands for it.
            None => pipe::Receiver::from_owned_fd(pipe_with(PipeFlags::CLOEXEC)?.0),
        }
    }
}

/// Watches over the restored processes. The main command's output goes where it always does; that of the others is dropped.
fn attend(context: &Arc<Context>, record: &Record, pipes: &mut Pipes) -> io::Result<()> {
    // A pipe reads as ended only when the agent's copies of the commands' ends are closed.
    pipes.theirs.clear();
    for tree in &record.trees {
        let root = Pid::from_raw(tree.root).ok_or(io::ErrorKind::InvalidData)?;
        // The inputs are never written and never closed, as in any copy.
        let inputs: Vec<_> = tree.pipes.iter().filter_map(|inode| pipes.inputs.remove(inode)).collect();
        match record.main {
            Some(main) if main.pid == tree.root => {
                let (stdout, stderr) = (pipes.output(main.stdout)?, pipes.output(main.stderr)?);
                let running = Running::adopt(root, stdout, stderr)?;
                *context.main() = Some(main_command::described(&running)?);
                tokio::spawn(main_command::attend_detached(Arc::clone(context), running));
                // Leaks the pipes, which are to stay open until the machine ends.
                inputs.into_iter().for_each(std::mem::forget);
            }
            _ => {
                let child = Child::of(root)?;
                tokio::spawn(async move {
                    let _ = child.wait().await;
                    drop(inputs);
                });
            }
        }
    }
    for output in std::mem::take(&mut pipes.outputs).into_values() {
        tokio::spawn(drain(output));
    }
    Ok(())
}

/// Reads a pipe and drops what comes: the command must not wait for a reader.
async fn drain(output: pipe::Receiver) {
    let mut buffer = vec![0; 4096];
    while output.readable().await.is_ok() {
        match output.try_read(&mut buffer) {
            Ok(1..) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Ok(0) | Err(_) => break,
        }
    }
}

/// Continues the processes that job control had not stopped before.
fn let_go(tree: &Tree) {
    for pid in tree.processes.iter().filter(|pid| !tree.stopped.contains(pid)) {
        if let Some(pid) = Pid::from_raw(*pid) {
            // A process that was killed meanwhile is no error.
            let _ = rustix::process::kill_process(pid, Signal::CONT);
        }
    }
}
