//! What CRIU finds out about the kernel, kept: half a second of every run otherwise. CRIU keeps it itself, but only where it is gone with
//! the kernel, in a `/run` that is memory, and reads it from any. Ours is a disk, and a copy of that disk meets the same kernel: the host
//! sees to it.

use std::ffi::CStr;
use std::fs;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::time::Duration;

use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, fsconfig_create, fsmount, fsopen,
    mount_change, move_mount,
};
use rustix::thread::UnshareFlags;

use super::program::Criu;

const CACHE: &str = "/run/criu.kdat";
const RUN: &CStr = c"/run";
const LIMIT: Duration = Duration::from_secs(10);

/// Fills the cache if there is none. Without it CRIU works as well, only later.
pub async fn remember(criu: &Criu) {
    if !Path::new(CACHE).exists() {
        let _ = find_out(criu).await;
    }
}

async fn find_out(criu: &Criu) -> io::Result<()> {
    let memory = memory()?;
    let theirs = memory.try_clone()?;
    let mut run = criu.bare("check");
    // SAFETY: runs between fork and exec: system calls on a descriptor that the closure owns and on constant strings.
    unsafe {
        run.command.pre_exec(move || {
            rustix::thread::unshare_unsafe(UnshareFlags::NEWNS)?;
            mount_change(c"/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)?;
            move_mount(&theirs, c"", CWD, RUN, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
            Ok(())
        });
    }
    // Whatever it thinks of the kernel: what it has seen of it is what counts.
    let _ = run.finish(LIMIT).await;
    let name = Path::new(CACHE).file_name().unwrap_or_default();
    let found = rustix::fs::openat(&memory, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    let mut content = Vec::new();
    fs::File::from(found?).take(1 << 20).read_to_end(&mut content)?;
    // By rename: half a cache would be believed.
    let draft = format!("{CACHE}.new");
    fs::write(&draft, content)?;
    fs::rename(draft, CACHE)
}

/// A tmpfs that is mounted nowhere.
fn memory() -> io::Result<OwnedFd> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&context)?;
    Ok(fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?)
}
