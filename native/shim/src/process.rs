//! The VMM and helper processes, which do not outlive the shim.

use crate::event::ProcessExit;
use crate::identity::Identity;
use crate::plan::Command;
use crate::transcript::Transcript;
use rustix::io::{Errno, fcntl_dupfd_cloexec};
use rustix::process::{
    Pid, Resource, Rlimit, Signal, getpid, getppid, kill_process_group, set_parent_process_death_signal, setrlimit,
};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::unix::pipe;
use tokio::process::Child;
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// A process that leads its own process group and dies with the shim, however that ends.
pub struct Process {
    child: Child,
    /// The task that reads its output.
    printed: JoinHandle<()>,
    pub identity: Identity,
}

/// Gives up what neither the shim nor its processes ever need: new privileges, and core dumps, which would hold the guest's memory with its
/// secrets.
pub fn restrict() {
    // Both exist on every kernel that runs the rest, and nothing relies on them.
    let _ = rustix::thread::set_no_new_privs(true);
    let _ = setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) });
}

/// A descriptor that the process inherits, and its number there.
pub struct Inherited {
    pub fd: RawFd,
    pub what: OwnedFd,
}

impl Process {
    /// Starts the process. Its output goes to `prints`, whose size is limited, because a guest may make its VMM print without end. Must be
    /// called on the main thread, because the kernel kills the child when the thread that started it ends.
    pub fn spawn(command: &Command, prints: &Arc<Transcript>, inherited: Vec<Inherited>) -> io::Result<Self> {
        let [program, arguments @ ..] = command.argv.as_slice() else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let (from, to) = std::io::pipe()?;
        let from = pipe::Receiver::from_owned_fd(from.into())?;
        let mut process = std::process::Command::new(program);
        process.args(arguments).env_clear();
        if let Some(path) = std::env::var_os("PATH") {
            process.env("PATH", path);
        }
        process.envs(&command.env).stdin(Stdio::null()).stdout(to.try_clone()?).stderr(to);
        let placed = Placed::new(inherited)?;
        let moves: Vec<(RawFd, RawFd)> = placed.fds.iter().map(|(fd, to)| (fd.as_raw_fd(), *to)).collect();
        let shim = getpid();
        let mut process = tokio::process::Command::from(process);
        process.process_group(0);
        // SAFETY: after fork only async-signal-safe calls are made, and nothing is allocated: an io::Error of an errno is a number.
        unsafe { process.pre_exec(move || in_child(shim, &moves)) };
        let mut child = process.spawn()?;
        // Closes the shim's copies of the pipe and of the inherited descriptors.
        drop((process, placed));
        let pid = child.id().ok_or(io::ErrorKind::NotFound)?;
        match Identity::of(pid) {
            Ok(identity) => {
                let prints = Arc::clone(prints);
                let printed = tokio::spawn(async move { prints.drain(from).await });
                Ok(Process { child, printed, identity })
            }
            Err(error) => {
                // Killing a process that has just been started cannot fail for a reason that matters here.
                let _ = child.start_kill();
                Err(error)
            }
        }
    }

    /// Kills the process group, unless the process has ended.
    pub fn kill(&self) {
        if let Some(pid) = self.child.id().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?)) {
            // The process has not been reaped, so its pid is still its own.
            let _ = kill_process_group(pid, Signal::KILL);
        }
    }

    /// Waits until all its output is read, at most for `at_most`, because a process it has left behind may hold the pipe open.
    pub async fn drain_output(&mut self, at_most: Duration) {
        let _ = timeout(at_most, &mut self.printed).await;
        self.printed.abort();
    }

    /// Waits for the process's end. May be cancelled and called again.
    pub async fn wait(&mut self) -> ProcessExit {
        // Only a waitpid elsewhere could take the status away; then nothing is known of it.
        self.child.wait().await.map_or_else(
            |_| ProcessExit::default(),
            |status| ProcessExit { code: status.code(), signal: status.signal() },
        )
    }
}

/// Descriptors for the child. Their numbers are above all targets, and every target is taken. Otherwise moving one could overwrite another,
/// or the pipe through which the standard library reports that exec failed.
struct Placed {
    fds: Vec<(OwnedFd, RawFd)>,
    _fillers: Vec<File>,
}

impl Placed {
    fn new(inherited: Vec<Inherited>) -> io::Result<Self> {
        let highest = inherited.iter().map(|inherited| inherited.fd).max().unwrap_or(0);
        let mut fds = Vec::new();
        for Inherited { fd, what } in inherited {
            fds.push((fcntl_dupfd_cloexec(&what, highest + 1)?, fd));
        }
        let mut fillers = Vec::new();
        loop {
            let filler = File::open("/dev/null")?;
            if filler.as_raw_fd() > highest {
                return Ok(Placed { fds, _fillers: fillers });
            }
            fillers.push(filler);
        }
    }
}

/// Runs between fork and exec.
fn in_child(shim: Pid, moves: &[(RawFd, RawFd)]) -> io::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // If the shim died before the line above, the death signal never comes.
    if getppid() != Some(shim) {
        return Err(Errno::SRCH.into());
    }
    // The child must not get descriptors that the shim itself has inherited.
    // SAFETY: sets a flag on descriptors of this process only.
    if unsafe { libc::close_range(3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC as libc::c_int) } == -1 {
        return Err(io::Error::last_os_error());
    }
    for &(from, to) in moves {
        // SAFETY: `from` is open and owned by the parent's `Placed`; `to` is a filler or a descriptor only the parent needs.
        if unsafe { libc::dup2(from, to) } == -1 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
