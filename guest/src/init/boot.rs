//! Pid 1: from the kernel's first user-space instruction to a running agent.
//!
//! 1. `root`: mount devtmpfs and sysfs, find the disks by serial (`disks`), mount them, join them by overlayfs and make that the root
//! 2. `mounts`: mount the copy of a host directory that the boot names, below /mnt
//! 3. fork the agent; pid 1 frees the initramfs and from then on only reaps orphans (`reaper`)
//! 4. `after_doorbell`: everything a command needs but the doorbell does not; the agent runs it between doorbell and first operation
//!
//! Under TCG every code path that runs for the first time costs its translation, so steps 1 and 2 do the least that lets the
//! agent answer. A step that fails is named on the console in one line, and the machine is reset: it never hangs half made.

use std::convert::Infallible;
use std::{fs, io};

use machinen_protocol::names::GUEST_CONFIG;
use serde::de::DeserializeOwned;

use super::reaper;
use crate::config::{BootConfig, GuestConfig};
use crate::system::console::{self, give_up};
use crate::system::guest::Guest;
use crate::system::phases::Phases;
use crate::system::step::{Failed, Step};
use crate::system::{mounts, root};

const BOOT_CONFIG: &str = "/machinen-boot.json";
/// The only version of `/machinen-boot.json` there is.
const BOOT_VERSION: u32 = 1;

/// Makes the machine and starts `agent` in it. This process, pid 1, stays and reaps orphans.
///
/// # Errors
/// The first step that failed.
pub fn boot(agent: impl FnOnce(Guest) -> Result<Infallible, Failed>) -> Result<Infallible, Failed> {
    let mut phases = Phases::start();
    let guest: GuestConfig = read_json(&format!("/{GUEST_CONFIG}"))?;
    let boot: BootConfig = read_json(BOOT_CONFIG)?;
    if boot.version != BOOT_VERSION {
        return Err(Failed::new(BOOT_CONFIG, io::Error::other(format!("unknown version {}", boot.version))));
    }
    root::mount_kernel_filesystems()?;
    phases.mark("kernel-filesystems");
    let writable = root::mount_root(boot.root, &mut phases)?;
    let initramfs = root::switch()?;
    phases.mark("root-moved");
    console::reopen().step("console")?;
    phases.mark("switched");
    let mounted = boot.mount.as_deref().map(mounts::mount_copy).transpose()?;
    // SAFETY: no thread has been started yet, so the child is a complete copy.
    match unsafe { libc::fork() } {
        -1 => Err(Failed::new("fork", io::Error::last_os_error())),
        0 => {
            drop(initramfs);
            match agent(Guest { config: guest, boot, writable, mounted, phases }) {
                Ok(never) => match never {},
                Err(failed) => give_up(&failed),
            }
        }
        // Closes `writable`, because the child has its own copy and pid 1 keeps no descriptor but the console.
        pid => {
            drop((writable, mounted));
            root::free(initramfs)?;
            reaper::reap_until_agent_ends(pid)
        }
    }
}

fn read_json<T: DeserializeOwned>(path: &str) -> Result<T, Failed> {
    let read = || Ok(serde_json::from_slice(&fs::read(path)?)?);
    read().map_err(|error| Failed::new(path.to_owned(), error))
}
