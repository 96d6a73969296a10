//! What a command needs and the doorbell does not. Runs in the agent, after it has told the host that it is there and before it
//! takes the first operation, so that the host's own work on the news overlaps with it.

use std::ffi::CStr;
use std::path::Path;
use std::{fs, io, mem};

use rustix::mount::MountFlags;
use rustix::process::{Resource, Rlimit};

use super::root::make_directory;
use super::{Failed, Phases, Step, cgroup};

/// Mounts of the new root besides /dev and /sys, in order. `favordynmods`: without it every move into a group, and so every command,
/// waits for an RCU grace period.
const MOUNTS: [(&str, &str, &CStr); 4] = [
    ("proc", "/proc", c""),
    ("cgroup2", "/sys/fs/cgroup", c"favordynmods"),
    ("devpts", "/dev/pts", c"gid=5,mode=620,ptmxmode=666"),
    ("tmpfs", "/dev/shm", c"mode=1777"),
];

/// Links every Linux userland expects beside the device nodes; the kernel does not make them.
const LINKS: [(&str, &str); 4] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

/// Open files of the agent: a few for each stream.
const AGENT_FILES: Rlimit = Rlimit { current: Some(524_288), maximum: Some(524_288) };
/// Open files of a command: the old limit for programs that use select(), and the right to raise it.
pub const COMMAND_FILES: Rlimit = Rlimit { current: Some(1024), maximum: Some(524_288) };

/// Pids of commands lie above it, so that a machine that brings back processes has theirs free: its own are below.
const RESERVED_PIDS: &str = "1000";

/// Completes the guest. With `revive` it is for processes that have their pids already.
pub fn complete(hostname: &str, revive: bool, phases: &mut Phases) -> Result<(), Failed> {
    for (kind, at, options) in MOUNTS {
        make_directory(at, 0o755).step(at)?;
        let flags = MountFlags::NOSUID | if kind == "devpts" { MountFlags::NOEXEC } else { MountFlags::NODEV };
        rustix::mount::mount(kind, at, kind, flags, options).step(format!("mount {at}"))?;
    }
    phases.mark("mounts");
    for (target, link) in LINKS {
        rustix::fs::symlink(target, link).step(link)?;
    }
    if !Path::new("/tmp").exists() {
        make_directory("/tmp", 0o1777).step("/tmp")?;
        // mkdir's mode is cut by the umask.
        rustix::fs::chmod("/tmp", rustix::fs::Mode::from_raw_mode(0o1777)).step("/tmp")?;
    }
    phases.mark("files");
    cgroup::set_up().step("cgroups")?;
    phases.mark("cgroups");
    // The agent is the last to go when memory runs out: without it the host cannot even see why.
    fs::write("/proc/self/oom_score_adj", "-1000").step("oom_score_adj")?;
    rustix::process::setrlimit(Resource::Nofile, AGENT_FILES).step("open files")?;
    set_hostname(hostname).step("hostname")?;
    if !revive {
        reserve_pids().step("pids")?;
    }
    loopback_up().step("loopback")
}

/// Lets commands to come have pids of their own range.
pub fn reserve_pids() -> io::Result<()> {
    fs::write("/proc/sys/kernel/ns_last_pid", RESERVED_PIDS)
}

/// Sets the kernel's host name.
pub fn set_hostname(hostname: &str) -> io::Result<()> {
    rustix::system::sethostname(hostname.as_bytes())?;
    Ok(())
}

fn loopback_up() -> io::Result<()> {
    // SAFETY: an all-zero ifreq is a valid one; it is plain numbers.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(c"lo".to_bytes_with_nul()) {
        *to = from.cast_signed();
    }
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the kernel's field is 16 bits, these two flags are below that"
    )]
    let flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    request.ifr_ifru.ifru_flags = flags;
    // SAFETY: plain numbers in, a new descriptor or -1 out.
    let socket = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `request` is a whole ifreq and outlives the call, which only reads it.
    let done = unsafe { libc::ioctl(socket, libc::SIOCSIFFLAGS, &raw const request) };
    let error = io::Error::last_os_error();
    // SAFETY: opened above and not used after this.
    unsafe { libc::close(socket) };
    if done < 0 { Err(error) } else { Ok(()) }
}
