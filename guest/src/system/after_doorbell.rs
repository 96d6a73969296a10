//! Prepares what commands need but the doorbell does not. It runs in the agent before the first operation, and after the doorbell, so that
//! the host acts on the doorbell meanwhile. (In a machine with shares it runs before the shares are mounted, and these before the doorbell.)

use std::ffi::CStr;
use std::path::Path;
use std::{fs, io};

use rustix::mount::MountFlags;
use rustix::process::{Resource, Rlimit};

use super::phases::Phases;
use super::root::make_directory;
use super::step::{Failed, Step};
use super::{cgroup, console, host_name, network};
use crate::config::{BootConfig, RootKind};

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

/// The agent's limit of open files: it needs a few for each stream.
const AGENT_FILES: Rlimit = Rlimit { current: Some(524_288), maximum: Some(524_288) };
/// A command's limit of open files: the old limit, for programs that use select(), and the right to raise it.
pub const COMMAND_FILES: Rlimit = Rlimit { current: Some(1024), maximum: Some(524_288) };

/// Commands get pids above this. The machine's own processes have pids below, so a machine that restores processes has their pids free.
const RESERVED_PIDS: &str = "1000";

/// Completes the guest. With `revive` pids are not reserved, because restored processes have theirs already.
pub fn complete(boot: &BootConfig, phases: &mut Phases) -> Result<(), Failed> {
    for (kind, at, options) in MOUNTS {
        make_directory(at, 0o755).step(at)?;
        let flags = MountFlags::NOSUID | if kind == "devpts" { MountFlags::NOEXEC } else { MountFlags::NODEV };
        rustix::mount::mount(kind, at, kind, flags, options).step(format!("mount {at}"))?;
    }
    phases.mark("mounts");
    for (target, link) in LINKS {
        rustix::fs::symlink(target, link).step(link)?;
    }
    // A dangling link of the image stays as it is; programs that need /tmp report it.
    if Path::new("/tmp").symlink_metadata().is_err() {
        make_directory("/tmp", 0o1777).step("/tmp")?;
        // mkdir's mode is cut by the umask.
        rustix::fs::chmod("/tmp", rustix::fs::Mode::from_raw_mode(0o1777)).step("/tmp")?;
    }
    phases.mark("files");
    cgroup::set_up().step("cgroups")?;
    phases.mark("cgroups");
    // The kernel must not kill the agent when memory runs out, because without the agent the host cannot see why.
    fs::write("/proc/self/oom_score_adj", "-1000").step("oom_score_adj")?;
    rustix::process::setrlimit(Resource::Nofile, AGENT_FILES).step("open files")?;
    host_name::set(&boot.hostname).step("hostname")?;
    // A root disk of the caller's keeps its own host name. An image whose files cannot be written runs without.
    if let Err(error) = host_name::write(Path::new("/"), &boot.hostname, boot.root == RootKind::Disk) {
        console::say(&format!("/etc/hostname, /etc/hosts: {error}"));
    }
    phases.mark("names");
    if !boot.revive {
        reserve_pids().step("pids")?;
    }
    network::loopback_up().step("loopback")?;
    if let Some(network) = &boot.network {
        // A root disk of the caller's keeps its own resolver configuration.
        network::set_up(network, boot.root == RootKind::Disk)?;
        phases.mark("network");
    }
    Ok(())
}

/// Makes commands that are started from now on get pids above the reserved ones.
pub fn reserve_pids() -> io::Result<()> {
    fs::write("/proc/sys/kernel/ns_last_pid", RESERVED_PIDS)
}
