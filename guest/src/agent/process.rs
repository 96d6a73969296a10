//! A command's process: how it is started, watched and ended.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::ffi::{CStr, CString};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::ptr;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use rustix::fs::{Mode, OFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Resource, WaitIdStatus};
use tokio::net::unix::pipe;
use zeroize::Zeroize;

use super::child::Child;
use super::user::User;
use super::vfork::{self, Start};
use crate::reply::Exit;
use crate::system::after_doorbell::COMMAND_FILES;
use crate::system::open_once::open_once;
use crate::system::{cgroup, oom};

/// How much a command may write to a pipe before it waits for the agent. A larger pipe means fewer, larger frames.
const PIPE_BYTES: usize = 256 * 1024;

/// A command that was started. Its pid, and so its process group, belongs to it until `wait` returns. If it is dropped before, the command
/// is killed.
pub struct Process {
    pub pid: Pid,
    child: Arc<Child>,
    oom_kills: u64,
    /// How the command ended, once it has been reaped.
    exit: OnceLock<Exit>,
}

/// A command with pipes.
pub struct Running {
    pub process: Process,
    pub stdin: Option<pipe::Sender>,
    pub stdout: pipe::Receiver,
    pub stderr: pipe::Receiver,
}

/// The pids of commands that have not been reaped. Only these may be signalled by pid, because no other process can have their pids yet.
static UNREAPED: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());

fn unreaped() -> MutexGuard<'static, BTreeSet<i32>> {
    UNREAPED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sends a signal to a command's process group. A command that has been reaped gets none, because its pid may belong to another process. A
/// number that is no signal is not an error.
fn signal(pid: Pid, signal: i32) {
    let pid = pid.as_raw_pid();
    // Held until the signal is sent: the command cannot be reaped in between.
    let unreaped = unreaped();
    if unreaped.contains(&pid) {
        // SAFETY: plain numbers. The pid is of a child that has not been reaped, and it leads its group.
        unsafe { libc::kill(-pid, signal) };
    }
}

impl Running {
    /// A command that CRIU has brought back as a child of this process, with new pipes.
    pub fn adopt(pid: Pid, stdout: pipe::Receiver, stderr: pipe::Receiver) -> io::Result<Self> {
        let process = Process::new(pid, Child::of(pid)?, oom::kills()?);
        Ok(Self { process, stdin: None, stdout, stderr })
    }
}

impl Process {
    fn new(pid: Pid, child: Child, oom_kills: u64) -> Self {
        unreaped().insert(pid.as_raw_pid());
        Self { pid, child: Arc::new(child), oom_kills, exit: OnceLock::new() }
    }

    /// Waits until the command has ended, without reaping it: its pid remains its own.
    pub async fn ended(&self) -> io::Result<()> {
        self.child.ended().await
    }

    /// Waits for the command itself (not for what it started) and reaps it. Another call returns the same result.
    pub async fn wait(&self) -> io::Result<Exit> {
        if let Some(exit) = self.exit.get() {
            return Ok(*exit);
        }
        self.child.ended().await?;
        let status = reap(self.pid, &self.child)?;
        let exit = match status.terminating_signal() {
            None => Exit::Code(status.exit_status().unwrap_or(0)),
            Some(signal) => Exit::Signal { signal, oom_killed: signal == libc::SIGKILL && self.saw_oom_kill()? },
        };
        Ok(*self.exit.get_or_init(|| exit))
    }

    /// Whether the kernel has killed any process for want of memory since the command began.
    fn saw_oom_kill(&self) -> io::Result<bool> {
        Ok(oom::kills()? > self.oom_kills)
    }

    /// Whether the command has been reaped, so that its pid may belong to another process.
    pub fn is_reaped(&self) -> bool {
        self.exit.get().is_some()
    }

    /// Sends a signal to the process group. A group without members, or a number that is no signal, is not an error.
    pub fn signal(&self, signal: i32) {
        self::signal(self.pid, signal);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.is_reaped() {
            return;
        }
        self.signal(libc::SIGKILL);
        let (pid, child) = (self.pid, Arc::clone(&self.child));
        tokio::spawn(async move { child.ended().await.and_then(|()| reap(pid, &child)) });
    }
}

/// Reaps a command that has ended.
fn reap(pid: Pid, child: &Child) -> io::Result<WaitIdStatus> {
    // Held while it is reaped: a signal is sent before, or not at all.
    let mut unreaped = unreaped();
    let status = child.reap()?;
    unreaped.remove(&pid.as_raw_pid());
    Ok(status)
}

/// A command's stdin, stdout and stderr.
#[derive(Clone, Copy)]
pub enum Stdio<'a> {
    Pipes([BorrowedFd<'a>; 3]),
    /// A terminal for all three, which becomes the command's controlling terminal.
    Terminal(BorrowedFd<'a>),
}

pub fn spawn_with_pipes(prepared: &PreparedCommand, user: Option<&User>, with_stdin: bool) -> io::Result<Running> {
    let (stdout, child_stdout) = pipe_with(PipeFlags::CLOEXEC)?;
    let (stderr, child_stderr) = pipe_with(PipeFlags::CLOEXEC)?;
    // The kernel refuses this when the user's share of pipe memory is used up. The default size works too.
    let _ = rustix::pipe::fcntl_setpipe_size(&stdout, PIPE_BYTES);
    let (child_stdin, stdin) = if with_stdin {
        let (child_stdin, stdin) = pipe_with(PipeFlags::CLOEXEC)?;
        (child_stdin, Some(pipe::Sender::from_owned_fd(stdin)?))
    } else {
        (rustix::fs::open(c"/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?, None)
    };
    if let Some(user) = user {
        for pipe in [&child_stdin, &child_stdout, &child_stderr].into_iter().skip(usize::from(!with_stdin)) {
            user.own(pipe)?;
        }
    }
    let process =
        spawn(prepared, user, Stdio::Pipes([child_stdin.as_fd(), child_stdout.as_fd(), child_stderr.as_fd()]))?;
    // Closes the command's ends here, so that their end is seen as end of file.
    drop((child_stdin, child_stdout, child_stderr));
    let (stdout, stderr) = (pipe::Receiver::from_owned_fd(stdout)?, pipe::Receiver::from_owned_fd(stderr)?);
    Ok(Running { process, stdin, stdout, stderr })
}

pub fn spawn(prepared: &PreparedCommand, user: Option<&User>, stdio: Stdio<'_>) -> io::Result<Process> {
    let oom_kills = oom::kills()?;
    let workload = workload()?;
    // SAFETY: `become_command` makes system calls on memory prepared before, and nothing else.
    let spawned = unsafe { vfork::spawn(&prepared.start, &|| prepared.become_command(workload, user, stdio)) }?;
    Ok(Process::new(spawned.pid, Child::by_pidfd(spawned.pidfd)?, oom_kills))
}

/// `cgroup.procs` of the commands' control group. Writing "0" to it moves the writer into the group.
pub fn workload() -> io::Result<&'static File> {
    static WORKLOAD: OnceLock<File> = OnceLock::new();
    open_once(&WORKLOAD, || OpenOptions::new().write(true).open(format!("{}/cgroup.procs", cgroup::WORKLOAD)))
}

/// Everything the child needs, laid out before it is made, because the child may not allocate.
pub struct PreparedCommand {
    start: Arc<Start>,
    program: CString,
    cwd: CString,
    /// Owns the strings that `argv` and `envp` point to.
    strings: Vec<CString>,
    argv: Vec<*const libc::c_char>,
    envp: Vec<*const libc::c_char>,
    /// How far the child has come. The child runs in the same memory until it executes its program.
    step: AtomicU8,
}

impl PreparedCommand {
    /// The child changes to its working directory.
    pub const ENTERS: u8 = 1;
    /// The child executes its program.
    pub const EXECUTES: u8 = 2;

    pub fn new(
        start: Arc<Start>,
        argv: &[String],
        environment: &BTreeMap<&str, &str>,
        cwd: &Path,
        program: &Path,
    ) -> io::Result<Self> {
        let c_path = |path: &Path| CString::new(path.as_os_str().as_encoded_bytes());
        let arguments = argv.iter().map(|argument| CString::new(argument.as_str()));
        let variables = environment.iter().map(|(key, value)| CString::new(variable(key, value)));
        let strings = arguments.chain(variables).collect::<Result<Vec<_>, _>>()?;
        let (arguments, variables) = strings.split_at(argv.len());
        let pointers = |strings: &[CString]| strings.iter().map(|s| s.as_ptr()).chain([ptr::null()]).collect();
        Ok(Self {
            start,
            program: c_path(program)?,
            cwd: c_path(cwd)?,
            argv: pointers(arguments),
            envp: pointers(variables),
            strings,
            step: AtomicU8::new(0),
        })
    }

    /// The step at which the child has failed.
    pub fn step(&self) -> u8 {
        self.step.load(Ordering::Relaxed)
    }

    /// Turns the child into the command. Returns only if that fails.
    fn become_command(&self, workload: &File, user: Option<&User>, stdio: Stdio<'_>) -> io::Error {
        let Err(error) = self.try_become(workload, user, stdio);
        error
    }

    fn try_become(&self, workload: &File, user: Option<&User>, stdio: Stdio<'_>) -> io::Result<Infallible> {
        rustix::io::write(workload, b"0")?;
        let [stdin, stdout, stderr] = match stdio {
            Stdio::Pipes(pipes) => pipes,
            Stdio::Terminal(terminal) => [terminal; 3],
        };
        rustix::stdio::dup2_stdin(stdin)?;
        rustix::stdio::dup2_stdout(stdout)?;
        rustix::stdio::dup2_stderr(stderr)?;
        rustix::process::setsid()?;
        if let Stdio::Terminal(terminal) = stdio {
            rustix::process::ioctl_tiocsctty(terminal)?;
        }
        write_file(c"/proc/self/oom_score_adj", b"0")?;
        rustix::process::setrlimit(Resource::Nofile, COMMAND_FILES)?;
        user.map_or(Ok(()), User::assume)?;
        self.step.store(Self::ENTERS, Ordering::Relaxed);
        rustix::process::chdir(self.cwd.as_c_str())?;
        self.step.store(Self::EXECUTES, Ordering::Relaxed);
        // SAFETY: all pointers are to NUL-terminated strings or end an array of such, and outlive the call. Not `execvp`, which runs
        // a file of unknown format as a shell script.
        unsafe { libc::execve(self.program.as_ptr(), self.argv.as_ptr(), self.envp.as_ptr()) };
        Err(io::Error::last_os_error())
    }
}

/// Overwrites the strings, because they may hold secrets.
impl Drop for PreparedCommand {
    fn drop(&mut self) {
        self.strings.zeroize();
    }
}

/// `KEY=VALUE` with room for the NUL at its end, so that adding it does not leave a copy of the value in freed memory.
fn variable(key: &str, value: &str) -> Vec<u8> {
    let mut variable = Vec::with_capacity(key.len() + value.len() + 2);
    variable.extend_from_slice(key.as_bytes());
    variable.push(b'=');
    variable.extend_from_slice(value.as_bytes());
    variable
}

/// Writes to a file without allocating.
fn write_file(path: &CStr, content: &[u8]) -> io::Result<()> {
    let file = rustix::fs::open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::io::write(file, content)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::CommandExt;
    use std::process::Command;

    /// The number of a command that has been reaped may be that of any process, such as this one, which is no command yet.
    #[tokio::test]
    async fn only_commands_that_have_not_been_reaped_are_signalled() {
        let mut sleeping = Command::new("sleep").arg("60").process_group(0).spawn().unwrap();
        let pid = Pid::from_child(&sleeping);
        signal(pid, libc::SIGKILL);
        let child = Child::of(pid).unwrap();
        unreaped().insert(pid.as_raw_pid());
        signal(pid, libc::SIGTERM);
        child.ended().await.unwrap();
        assert_eq!(reap(pid, &child).unwrap().terminating_signal(), Some(libc::SIGTERM));
        assert!(!unreaped().contains(&pid.as_raw_pid()));
        assert!(sleeping.wait().is_err(), "it had been reaped before");
    }
}
