//! The VMM, and helpers beside it: processes that do not outlive the shim.

use crate::event::ProcessExit;
use crate::identity::Identity;
use crate::plan::Command;
use crate::shares::View;
use nix::libc;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{Pid, getpid, getppid};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Stdio;
use tokio::process::Child;

/// Leads its own process group; dies with the shim, however that ends.
pub struct Process {
    child: Child,
    pub identity: Identity,
}

/// What the process finds open, and under which number.
pub struct Inherited {
    pub fd: RawFd,
    pub what: OwnedFd,
}

impl Process {
    /// Starts it, with stdout and stderr in a log. To be called on the main thread: the kernel kills the child when the *thread* ends
    /// that started it.
    pub fn spawn(command: &Command, log: &Path, inherited: Vec<Inherited>, view: Option<View>) -> io::Result<Self> {
        let [program, arguments @ ..] = command.argv.as_slice() else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let log = OpenOptions::new().append(true).create(true).mode(0o600).open(log)?;
        let mut process = std::process::Command::new(program);
        process.args(arguments).env_clear();
        if let Some(path) = std::env::var_os("PATH") {
            process.env("PATH", path);
        }
        process.envs(&command.env).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let placed = Placed::new(inherited)?;
        let moves: Vec<(RawFd, RawFd)> = placed.fds.iter().map(|(fd, to)| (fd.as_raw_fd(), *to)).collect();
        let shim = getpid();
        let mut process = tokio::process::Command::from(process);
        process.process_group(0);
        // SAFETY: after fork only async-signal-safe calls are made, and nothing is allocated: an io::Error of an errno is a number.
        unsafe { process.pre_exec(move || in_child(shim, &moves, view.as_ref())) };
        let mut child = process.spawn()?;
        drop(placed);
        let pid = child.id().ok_or(io::ErrorKind::NotFound)?;
        match Identity::of(pid) {
            Ok(identity) => Ok(Process { child, identity }),
            Err(error) => {
                // It has just been started: killing it cannot fail for a reason that matters here.
                let _ = child.start_kill();
                Err(error)
            }
        }
    }

    /// Kills its process group, unless it has ended.
    pub fn kill(&self) {
        if let Some(pid) = self.child.id().and_then(|pid| i32::try_from(pid).ok()) {
            // It is not reaped yet, so the number is still its own.
            let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }

    /// Waits for its end. May be cancelled and called again.
    pub async fn wait(&mut self) -> ProcessExit {
        // Only a foreign waitpid could take the status away: nothing is known then.
        self.child.wait().await.map_or_else(
            |_| ProcessExit::default(),
            |status| ProcessExit { code: status.code(), signal: status.signal() },
        )
    }
}

/// Descriptors on their way to the child. Their numbers lie above all targets, and every target is taken: otherwise moving the first
/// could overwrite the second, or the pipe through which the standard library reports that exec failed.
struct Placed {
    fds: Vec<(OwnedFd, RawFd)>,
    _fillers: Vec<File>,
}

impl Placed {
    fn new(inherited: Vec<Inherited>) -> io::Result<Self> {
        let highest = inherited.iter().map(|inherited| inherited.fd).max().unwrap_or(0);
        let mut fds = Vec::new();
        for Inherited { fd, what } in inherited {
            fds.push((above(&what, highest)?, fd));
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

/// A duplicate with a number greater than `than`, closed on exec.
fn above(fd: &OwnedFd, than: RawFd) -> io::Result<OwnedFd> {
    let raw = nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(than + 1))?;
    // SAFETY: fcntl has just made it, nobody else knows it.
    Ok(unsafe { std::os::fd::FromRawFd::from_raw_fd(raw) })
}

/// Between fork and exec.
fn in_child(shim: Pid, moves: &[(RawFd, RawFd)], view: Option<&View>) -> io::Result<()> {
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    // A shim that died before the line above would have left us alone in the world.
    if getppid() != shim {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    // Descriptors the shim itself inherited are none of its business.
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
    view.map_or(Ok(()), View::enter)
}
