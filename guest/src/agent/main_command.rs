//! The operation `main`: runs the command the VM exists for. When the command ends, the machine ends.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use machinen_protocol::frame::Kind;
use tokio::io::{AsyncRead, AsyncWrite};

use super::context::Context;
use super::criu::record::MainCommand;
use super::exchange::Exchange;
use super::lifecycle::Output;
use super::process::Running;
use super::stream::Abort;
use super::{attend, command};
use crate::reply::{Done, Exit, Started};
use crate::request::{Exec, Main};

/// The result of the main command, which ended, and where it is announced.
pub struct Ended {
    pub exit: Exit,
    /// The lifecycle port's stream, on which the end is announced.
    pub announced: Output,
}

/// Runs the configured command. `None`: the command was started detached. Once the command has started, only the end of the machine
/// follows. A command that cannot be started is an ordinary error, and the host decides what follows.
pub async fn run<R, W>(
    context: &Arc<Context>,
    request: Main,
    exchange: &mut Exchange<R, W>,
) -> Result<Option<Ended>, Abort>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let command = Exec {
        argv: context.config().cmd.clone(),
        stdin: request.stdin && !request.detach,
        // The secrets of a boot are meant for the main command, which has no request to name them.
        secrets: context.secrets().names(),
        ..Exec::default()
    };
    command.check()?;
    let starting = tokio::select! {
        biased;
        starting = context.main_start.lock() => starting,
        () = exchange.input.lost() => return Err(Abort::Gone),
    };
    if context.main().is_some() {
        return Err(Abort::bad("the main command has been started already"));
    }
    let running = command::start(context, command, &mut exchange.input).await?;
    *context.main() = Some(described(&running).map_err(|error| Abort::io("main", &error))?);
    drop(starting);
    if request.detach {
        let started = Started { pid: running.process.pid.as_raw_pid().cast_unsigned() };
        tokio::spawn(attend_detached(Arc::clone(context), running));
        exchange.output.send_json(Kind::Started, &started).await?;
        return Ok(None);
    }
    // In a copy the host is no longer attached to the command.
    let mut announced = context.lifecycle.output();
    let exit = attend::attend(running, exchange, &context.main_detached, &mut announced).await;
    // An error means that the command was killed, because its stream ended or made no sense.
    let exit = exit.unwrap_or(Exit::Signal { signal: libc::SIGKILL, oom_killed: false });
    Ok(Some(Ended { exit, announced }))
}

/// Lets a main command that has a stream go on without it, as if it had been started detached.
pub fn detach(context: &Context) -> Result<Done, Abort> {
    if context.main().is_none() {
        return Err(Abort::bad("there is no main command"));
    }
    context.main_detached.store(true, Ordering::Relaxed);
    Ok(Done {})
}

/// Describes the main command for a dump, which recognizes its pipes by their inodes.
pub fn described(running: &Running) -> io::Result<MainCommand> {
    let inode = |pipe: BorrowedFd<'_>| Ok::<_, io::Error>(rustix::fs::fstat(pipe)?.st_ino);
    let (stdout, stderr) = (inode(running.stdout.as_fd())?, inode(running.stderr.as_fd())?);
    Ok(MainCommand { pid: running.process.pid.as_raw_pid(), stdout, stderr })
}

/// Attends to a main command that no host is attached to.
pub async fn attend_detached(context: Arc<Context>, running: Running) {
    let mut output = context.lifecycle.output();
    let exit = attend::pump_until_end(&running, &mut output).await;
    // Only reading a pipe or waiting can fail here; the command then counts as killed.
    let exit = exit.unwrap_or(Exit::Signal { signal: libc::SIGKILL, oom_killed: false });
    context.lifecycle.power_off(output, &exit, async {}).await
}
