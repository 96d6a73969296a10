//! Starting a command, and the handles by which it is watched and ended.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::ffi::{CStr, CString};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use rustix::fs::{Mode, OFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Resource, WaitIdStatus};
use tokio::io::AsyncRead;
use tokio::net::unix::pipe;
use zeroize::Zeroize;

use super::child::Child;
use super::context::Context;
use super::format;
use super::stream::{Abort, FrameReader};
use super::threads::COMMANDS;
use super::user::User;
use super::vfork::{self, Start};
use crate::config::GuestConfig;
use crate::errno;
use crate::reply::{Code, ErrorReply, Exit};
use crate::request::{Exec, Secret};
use crate::system::after_doorbell::COMMAND_FILES;
use crate::system::cgroup;

pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Where nothing says otherwise.
const DEFAULT_ENV: [(&str, &str); 4] =
    [("PATH", DEFAULT_PATH), ("HOME", "/root"), ("TERM", "xterm"), ("LANG", "C.UTF-8")];
/// What a command may leave in a pipe before it waits for the agent; more means fewer, larger frames.
const PIPE_BYTES: usize = 256 * 1024;

/// A command that was started: its pid, and so its process group, are its own until `wait` returns. Dropped before that, it is killed.
pub struct Process {
    pub pid: Pid,
    child: Arc<Child>,
    oom_kills: u64,
    /// Once it has been reaped.
    exit: OnceLock<Exit>,
}

/// A command with pipes.
pub struct Running {
    pub process: Process,
    pub stdin: Option<pipe::Sender>,
    pub stdout: pipe::Receiver,
    pub stderr: pipe::Receiver,
}

/// Starts what `request` describes, unless the stream that `input` comes from ends before: then what has been started is killed.
pub async fn start<R: AsyncRead + Unpin>(
    context: &Context,
    request: Exec,
    input: &mut FrameReader<R>,
) -> Result<Running, Abort> {
    let with_stdin = request.stdin;
    let spawn = move |image: &Image, user: Option<&User>| spawn_with_pipes(image, user, with_stdin);
    start_by(spawn, context, request, input).await
}

/// The same, in a session of its own whose terminal is `terminal`.
pub async fn start_in<R: AsyncRead + Unpin>(
    terminal: OwnedFd,
    context: &Context,
    request: Exec,
    input: &mut FrameReader<R>,
) -> Result<Process, Abort> {
    let spawn = move |image: &Image, user: Option<&User>| {
        user.map_or(Ok(()), |user| user.own(&terminal))?;
        self::spawn(image, user, Stdio::Terminal(terminal.as_fd()))
    };
    start_by(spawn, context, request, input).await
}

/// With the configuration and the secrets of this moment.
async fn start_by<R: AsyncRead + Unpin, T: Send + 'static>(
    spawn: impl FnOnce(&Image, Option<&User>) -> io::Result<T> + Send + 'static,
    context: &Context,
    request: Exec,
    input: &mut FrameReader<R>,
) -> Result<T, Abort> {
    let config = context.config().clone();
    let secrets = context.secrets().named(&request.secrets)?;
    let start = Arc::new(Start::default());
    let starting = Arc::clone(&start);
    let started = COMMANDS.run(input, move || execute(&config, &secrets, &request, starting, spawn)).await;
    if started.is_err() {
        start.call_off();
    }
    Ok(started??)
}

fn execute<T>(
    config: &GuestConfig,
    secrets: &[(String, Secret)],
    request: &Exec,
    start: Arc<Start>,
    spawn: impl FnOnce(&Image, Option<&User>) -> io::Result<T>,
) -> Result<T, ErrorReply> {
    let user = request.user.as_deref().or(config.user.as_deref());
    let user = user.map(|spec| User::find(spec, Path::new("/"))).transpose()?;
    let mut environment = environment(config, request);
    if let Some(user) = &user
        && !request.env.contains_key("HOME")
        && !config.env.contains_key("HOME")
    {
        environment.insert("HOME", &user.home);
    }
    environment.extend(secrets.iter().map(|(name, value)| (name.as_str(), value.as_str())));
    let cwd = working_directory(config, request)?;
    let name = request.argv.first().map_or("", String::as_str);
    let program = resolve(name, path_of(&environment), &cwd)?;
    // Looked at before there is a process: one that waits for a file system cannot be frozen with the others, a thread need not be.
    let _ = fs::metadata(cwd.join(&program));
    let image =
        Image::new(start, &request.argv, &environment, &cwd, &program).map_err(|error| refused(name, &error))?;
    spawn(&image, user.as_ref()).map_err(|error| match image.step.load(Ordering::Relaxed) {
        Image::ENTERS => cwd_refused(&cwd, &error),
        Image::EXECUTES => refused_program(name, &cwd.join(&program), &error),
        _ => refused(name, &error),
    })
}

/// What somebody who names no command gets: `$SHELL`, or the best there is, as after a login.
pub fn login_shell(config: &GuestConfig, request: &Exec) -> Vec<String> {
    let environment = environment(config, request);
    let configured = environment.get("SHELL").copied().filter(|shell| !shell.is_empty());
    let bash = || resolve("bash", path_of(&environment), Path::new("/")).ok().map(|_| "bash");
    let shell = configured.or_else(bash).unwrap_or("sh");
    vec![shell.to_owned(), "-l".to_owned()]
}

fn path_of<'a>(environment: &BTreeMap<&'a str, &'a str>) -> &'a str {
    environment.get("PATH").copied().unwrap_or_default()
}

/// Commands that have not been reaped, by pid: only these may be killed by pid, for another process cannot have theirs yet.
static UNREAPED: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());

fn unreaped() -> MutexGuard<'static, BTreeSet<i32>> {
    UNREAPED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sends a signal to a command's process group. A command that has been reaped gets none: its number may be another's. A number that is
/// no signal is not an error.
fn signal(pid: Pid, signal: i32) {
    let pid = pid.as_raw_pid();
    // Held until it is sent: nobody reaps in between.
    let unreaped = unreaped();
    if unreaped.contains(&pid) {
        // SAFETY: plain numbers. The pid is of a child that has not been reaped, and it leads its group.
        unsafe { libc::kill(-pid, signal) };
    }
}

impl Running {
    /// A command that CRIU has brought back as a child of this process, with new pipes.
    pub fn adopt(pid: Pid, stdout: pipe::Receiver, stderr: pipe::Receiver) -> io::Result<Self> {
        let process = Process::new(pid, Child::of(pid)?, cgroup::oom_kills()?);
        Ok(Self { process, stdin: None, stdout, stderr })
    }
}

impl Process {
    fn new(pid: Pid, child: Child, oom_kills: u64) -> Self {
        unreaped().insert(pid.as_raw_pid());
        Self { pid, child: Arc::new(child), oom_kills, exit: OnceLock::new() }
    }

    /// Waits until it has ended, and lets its pid be its own still.
    pub async fn ended(&self) -> io::Result<()> {
        self.child.ended().await
    }

    /// Waits for the command itself (not for what it started) and reaps it. Says the same again when asked again.
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

    /// Whether anything has been killed for want of memory since it began.
    fn saw_oom_kill(&self) -> io::Result<bool> {
        Ok(cgroup::oom_kills()? > self.oom_kills)
    }

    /// Whether its pid may be another's.
    pub fn is_reaped(&self) -> bool {
        self.exit.get().is_some()
    }

    /// Sends a signal to the process group. One that has no member left, or a number that is no signal, is not an error.
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
    // Held while it is reaped: whoever wants to signal it does so before, or not at all.
    let mut unreaped = unreaped();
    let status = child.reap()?;
    unreaped.remove(&pid.as_raw_pid());
    Ok(status)
}

fn environment<'a>(config: &'a GuestConfig, request: &'a Exec) -> BTreeMap<&'a str, &'a str> {
    let configured = config.env.iter().chain(&request.env).map(|(key, value)| (key.as_str(), value.as_str()));
    DEFAULT_ENV.into_iter().chain(configured).collect()
}

fn working_directory(config: &GuestConfig, request: &Exec) -> Result<PathBuf, ErrorReply> {
    let cwd = Path::new("/").join(request.cwd.as_deref().or(config.cwd.as_deref()).unwrap_or("/"));
    // Looked at beforehand: from a failed start one cannot tell whether directory or program was missing.
    let error = match fs::metadata(&cwd) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && config.make_cwd && request.cwd.is_none() => {
            match fs::create_dir_all(&cwd) {
                Ok(()) => return Ok(cwd),
                Err(error) => error,
            }
        }
        Ok(found) if found.is_dir() => return Ok(cwd),
        Ok(_) => io::Error::from_raw_os_error(libc::ENOTDIR),
        Err(error) => error,
    };
    Err(cwd_refused(&cwd, &error))
}

fn cwd_refused(cwd: &Path, error: &io::Error) -> ErrorReply {
    let message = format!("working directory {}: {error}", cwd.display());
    ErrorReply { code: Code::CwdInvalid, message, errno: errno::of(error) }
}

/// The file to execute, as a shell would look it up.
pub fn resolve(name: &str, path: &str, cwd: &Path) -> Result<PathBuf, ErrorReply> {
    if name.contains('/') {
        return Ok(PathBuf::from(name));
    }
    let mut reason = libc::ENOENT;
    for directory in path.split(':') {
        // An empty entry, like a relative one, means the working directory.
        let candidate = cwd.join(directory).join(name);
        let Ok(found) = fs::metadata(&candidate) else { continue };
        if found.is_file() && found.permissions().mode() & 0o111 != 0 {
            return Ok(candidate);
        }
        reason = libc::EACCES;
    }
    Err(refused(name, &io::Error::from_raw_os_error(reason)))
}

/// The reply to a command that could not be executed.
fn refused(name: &str, error: &io::Error) -> ErrorReply {
    let code = match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => Code::NotFound,
        Some(libc::EACCES | libc::ENOEXEC | libc::EISDIR | libc::ETXTBSY | libc::ELIBBAD) => Code::NotExecutable,
        Some(libc::E2BIG) => Code::ArgumentsTooLarge,
        Some(libc::ENOSPC) => Code::NoSpace,
        _ => Code::Io,
    };
    let name: String = name.chars().take(256).collect();
    ErrorReply { code, message: format!("{name}: {error}"), errno: errno::of(error) }
}

/// The same for a program that is there: what the kernel missed is not always the program itself.
fn refused_program(name: &str, program: &Path, error: &io::Error) -> ErrorReply {
    let mut reply = refused(name, error);
    let why = match error.raw_os_error() {
        Some(libc::ENOENT) => format::interpreter(program).map(|interpreter| {
            reply.code = Code::NotExecutable;
            format!("it is there, but not {interpreter}, which is to run it")
        }),
        Some(libc::ENOEXEC) => Some(format::foreign(program)),
        _ => None,
    };
    if let Some(why) = why {
        reply.message = format!("{}: {why}", reply.message);
    }
    reply
}

/// What a command has for its standard files.
#[derive(Clone, Copy)]
enum Stdio<'a> {
    Pipes([BorrowedFd<'a>; 3]),
    /// For all three, and as the terminal it is controlled from.
    Terminal(BorrowedFd<'a>),
}

fn spawn_with_pipes(image: &Image, user: Option<&User>, with_stdin: bool) -> io::Result<Running> {
    let (stdout, child_stdout) = pipe_with(PipeFlags::CLOEXEC)?;
    let (stderr, child_stderr) = pipe_with(PipeFlags::CLOEXEC)?;
    // Refused when the user's share of pipe memory is used up; the default size does too.
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
    let process = spawn(image, user, Stdio::Pipes([child_stdin.as_fd(), child_stdout.as_fd(), child_stderr.as_fd()]))?;
    // End of file is when the command's ends are gone.
    drop((child_stdin, child_stdout, child_stderr));
    let (stdout, stderr) = (pipe::Receiver::from_owned_fd(stdout)?, pipe::Receiver::from_owned_fd(stderr)?);
    Ok(Running { process, stdin, stdout, stderr })
}

fn spawn(image: &Image, user: Option<&User>, stdio: Stdio<'_>) -> io::Result<Process> {
    let oom_kills = cgroup::oom_kills()?;
    let workload = workload()?;
    // SAFETY: `become_command` makes system calls on memory prepared before, and nothing else.
    let spawned = unsafe { vfork::spawn(&image.start, &|| image.become_command(workload, user, stdio)) }?;
    Ok(Process::new(spawned.pid, Child::by_pidfd(spawned.pidfd)?, oom_kills))
}

/// Writing "0" here moves the writer into the commands' control group.
pub fn workload() -> io::Result<&'static File> {
    static WORKLOAD: OnceLock<File> = OnceLock::new();
    cgroup::open_once(&WORKLOAD, || OpenOptions::new().write(true).open(format!("{}/cgroup.procs", cgroup::WORKLOAD)))
}

/// All that the child needs, laid out before it is made: it may not allocate.
struct Image {
    start: Arc<Start>,
    program: CString,
    cwd: CString,
    /// Owner of what `argv` and `envp` point to.
    strings: Vec<CString>,
    argv: Vec<*const libc::c_char>,
    envp: Vec<*const libc::c_char>,
    /// How far the child has come, which runs in the same memory.
    step: AtomicU8,
}

impl Image {
    /// It goes to its working directory.
    const ENTERS: u8 = 1;
    /// It executes its program.
    const EXECUTES: u8 = 2;

    fn new(
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

    /// Turns the child into the command; comes back only when that fails.
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

/// It may hold secrets.
impl Drop for Image {
    fn drop(&mut self) {
        self.strings.zeroize();
    }
}

/// With room for the NUL at its end, so that no copy is left behind when that is added.
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

    #[test]
    fn later_layers_of_the_environment_win() {
        let config = GuestConfig {
            env: [("PATH".into(), "/image".into()), ("A".into(), "image".into())].into(),
            ..Default::default()
        };
        let request = Exec { env: [("A".into(), "request".into())].into(), ..Default::default() };
        let environment = environment(&config, &request);
        let expected =
            [("A", "request"), ("HOME", "/root"), ("LANG", "C.UTF-8"), ("PATH", "/image"), ("TERM", "xterm")];
        assert_eq!(environment.into_iter().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn looks_a_command_up_in_its_own_path() {
        assert_eq!(resolve("sh", "/nowhere:/bin", Path::new("/")).unwrap(), Path::new("/bin/sh"));
        assert_eq!(resolve("sh", "bin", Path::new("/")).unwrap(), Path::new("/bin/sh"));
        assert_eq!(resolve("./x", "/bin", Path::new("/")).unwrap(), Path::new("./x"));
    }

    #[test]
    fn tells_a_missing_command_from_one_that_cannot_run() {
        assert_eq!(resolve("no-such-command", "/bin", Path::new("/")).unwrap_err().code, Code::NotFound);
        assert_eq!(resolve("passwd", "/etc", Path::new("/")).unwrap_err().code, Code::NotExecutable);
    }

    #[test]
    fn a_working_directory_must_be_one() {
        let request = |cwd: &str| Exec { cwd: Some(cwd.into()), ..Default::default() };
        let reply = working_directory(&GuestConfig::default(), &request("/etc/passwd")).unwrap_err();
        assert_eq!((reply.code, reply.errno.as_deref()), (Code::CwdInvalid, Some("ENOTDIR")));
        let reply = working_directory(&GuestConfig::default(), &request("/nowhere")).unwrap_err();
        assert_eq!((reply.code, reply.errno.as_deref()), (Code::CwdInvalid, Some("ENOENT")));
    }

    #[test]
    fn only_the_working_directory_of_an_image_is_made() {
        let root = tempfile::tempdir().unwrap();
        let (own, other) = (root.path().join("a/b"), root.path().join("c"));
        let cwd = |path: &Path| Some(path.to_str().unwrap().to_owned());
        let mut config = GuestConfig { cwd: cwd(&own), ..Default::default() };
        assert!(working_directory(&config, &Exec::default()).is_err());
        config.make_cwd = true;
        assert!(working_directory(&config, &Exec { cwd: cwd(&other), ..Default::default() }).is_err());
        assert_eq!(working_directory(&config, &Exec::default()).unwrap(), own);
        assert!(own.is_dir() && !other.exists());
    }
}
