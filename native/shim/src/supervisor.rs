//! The life of a VM, step by step.

use crate::error::Error;
use crate::event::{Event, ExitRecord, ProcessExit, Reason};
use crate::failed::{Failed, Step};
use crate::log::Log;
use crate::network::Forwards;
use crate::plan::Plan;
use crate::replace::replace;
use crate::start::{Vm, start};
use crate::stop::{Ask, Stops};
use crate::{cleanup, files, owner};
use machinen_protocol::names;
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit, umask};
use std::io;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

/// How long bytes that a dead VMM has left in its sockets may take to arrive.
const REST: Duration = Duration::from_secs(2);
/// Longer graces are cut to a day: an `Instant` cannot be moved without end.
const MAX_GRACE: Duration = Duration::from_secs(24 * 60 * 60);
/// The limit of descriptors: two for each possible client.
const DESCRIPTORS: u64 = 4096;

/// Reads the plan and carries it out.
pub fn main() -> ExitCode {
    // Only the user may read what the shim makes.
    umask(Mode::RWXG | Mode::RWXO);
    let plan = match Plan::read(io::stdin().lock()).map_err(Failed::at(Step::Plan)) {
        Ok(Some(plan)) => plan,
        Ok(None) => return ExitCode::SUCCESS,
        Err(failed) => return report(&failed),
    };
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let wanted = maximum.map_or(DESCRIPTORS, |maximum| DESCRIPTORS.min(maximum));
    // If that fails, fewer clients can be served.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: current.map(|current| current.max(wanted)), maximum });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let ended = match runtime {
        Ok(runtime) => runtime.block_on(run(&plan)),
        Err(error) => Err(Failed::io(Step::Plan, "no runtime", error)),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(failed) => {
            cleanup::run(&plan);
            report(&failed)
        }
    }
}

fn report(failed: &Failed) -> ExitCode {
    owner::tell(&Event::Failed(failed).line());
    ExitCode::FAILURE
}

/// Runs the VM from the plan to its end. After a failure the VMM is gone; the caller removes the files.
async fn run(plan: &Plan) -> Result<(), Failed> {
    let mut stops = Stops::new().map_err(|error| Failed::io(Step::Plan, "signals", error))?;
    // Done before anything is copied, because it is cheap, and another program may have a port.
    let forwards = plan.network.as_ref().map(Forwards::bind).transpose().map_err(Failed::at(Step::Network))?;
    make_files(plan, &mut stops).await?;
    let mut vm = start(plan, forwards, &mut stops).await?;
    let exit = vm.until_exit(plan, &mut stops).await;
    vm.finish(plan, exit).await;
    Ok(())
}

/// Copies files on another thread, and stops when the VM is no longer wanted.
async fn make_files(plan: &Plan, stops: &mut Stops) -> Result<(), Failed> {
    let cancel = Arc::new(AtomicBool::new(false));
    let (copies, cancelled) = (plan.files.clone(), Arc::clone(&cancel));
    let mut copying = tokio::task::spawn_blocking(move || files::copy_all(&copies, &cancelled));
    let done = loop {
        tokio::select! {
            done = &mut copying => break done,
            () = stops.unwanted(plan.detached) => cancel.store(true, Ordering::Relaxed),
        }
    };
    let copied = match done {
        Ok(Ok(_)) if cancel.load(Ordering::Relaxed) => Err(Error::errno("stopped", Errno::CANCELED)),
        Ok(copied) => copied,
        Err(error) => Err(Error::io("copying", io::Error::other(error))),
    };
    copied.map(drop).map_err(Failed::at(Step::Files))
}

impl Vm {
    /// Waits for the VMM's end, and ends it when that is asked for.
    async fn until_exit(&mut self, plan: &Plan, stops: &mut Stops) -> ProcessExit {
        let grace = Duration::from_millis(plan.grace_ms);
        // When the VMM is killed, once it was asked to end.
        let mut deadline: Option<Instant> = None;
        // The tasks that ask the guest; they return whether it could be asked.
        let mut asking = JoinSet::new();
        loop {
            let ask = tokio::select! {
                exit = self.vmm.wait() => return exit,
                Some(asked) = asking.join_next() => match asked {
                    Ok(Ok(())) => continue,
                    _ => Ask::Kill,
                },
                () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => Ask::Kill,
                reason = stops.next() => {
                    if reason == Reason::OwnerLost && self.state.is_detached() {
                        continue;
                    }
                    self.state.asked(reason);
                    // A second signal kills at once.
                    if reason == Reason::Stop && deadline.is_some() { Ask::Kill } else { Ask::Stop(None) }
                }
                Some(ask) = self.asks.recv() => ask,
            };
            match ask {
                Ask::Kill => {
                    self.vmm.kill();
                    return self.vmm.wait().await;
                }
                Ask::Stop(other) => {
                    let latest = Instant::now() + other.unwrap_or(grace).min(MAX_GRACE);
                    if deadline.is_none() {
                        asking.spawn(self.state.agent.clone().power_off());
                    }
                    deadline = Some(deadline.map_or(latest, |deadline| deadline.min(latest)));
                }
            }
        }
    }

    /// Removes everything and reports how the VM ended.
    async fn finish(mut self, plan: &Plan, vmm: ProcessExit) {
        // Kills helpers that the VMM may have started, because they would hold its sockets open.
        self.state.over.send_replace(true);
        let console = timeout(REST, &mut self.console);
        let _ = tokio::join!(console, self.vmm.drain_output(REST));
        self.console.abort();
        let rest = async { while self.channel.join_next().await.is_some() {} };
        let _ = timeout(REST, rest).await;
        self.channel.shutdown().await;
        self.asks.close();
        let state = self.state;
        // Waits until a capture has been undone, because `exited` says that nothing is left. The permit is kept, so that no other begins.
        let _last = state.capturing.acquire().await;
        let logs = [&state.console.log, &state.output, &state.vmm_prints.log];
        logs.iter().for_each(|log| log.close());
        let [console, output, vmm_prints] = logs.map(Log::finished);
        let _ = timeout(REST, async { tokio::join!(console, output, vmm_prints) }).await;

        let end = state.end();
        let console_tail = state.console.tail();
        let exit = ExitRecord {
            vmm,
            main: end.main,
            orderly: end.orderly,
            reason: end.reason.unwrap_or(if says_power_off(&console_tail) { Reason::Guest } else { Reason::Vmm }),
            console_tail,
            vmm_log_tail: state.vmm_prints.tail(),
        };
        state.entry().remove();
        cleanup::run(plan);
        if let Some(path) = &plan.exit_record_path {
            // Clients of `wait` get the record as well. Where its directory is missing, the owner has removed it.
            let _ = serde_json::to_vec(&exit).map_err(io::Error::from).and_then(|record| replace(path, &record));
        }
        let line = Event::Exited { exit: &exit }.line();
        state.exited.send_replace(Some(line.as_str().into()));
        let clients = timeout(REST, self.control);
        let _ = tokio::join!(clients, owner::tell_last(line));
    }
}

/// Whether the guest's kernel was told to power off or reboot without our agent (`poweroff -f`): the kernel prints that last. A panic
/// prints no such line, and our init prints the reason before it reboots a guest that it has given up.
fn says_power_off(console: &str) -> bool {
    console.lines().last().is_some_and(|line| line.contains("] reboot: ")) && !console.contains(names::INIT)
}

#[cfg(test)]
mod tests {
    use super::says_power_off;

    #[test]
    fn a_guest_that_powers_off_says_so_last() {
        for last in ["reboot: Restarting system", "reboot: Power off not available: System halted instead"] {
            assert!(says_power_off(&format!("booted\r\n[    0.7] {last}\r\n")));
            assert!(!says_power_off(&format!("machinen-init: agent: killed by signal 9\r\n[    0.7] {last}\r\n")));
            assert!(!says_power_off(&format!("[    0.7] {last}\r\n[    9.0] Kernel panic - not syncing: crash\r\n")));
        }
        assert!(!says_power_off(""));
    }
}
