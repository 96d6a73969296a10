//! Keeps what CRIU finds out about the kernel, which otherwise costs every run half a second. CRIU writes this cache itself only to a
//! `/run` in memory, where it is gone with the kernel, but reads it from any `/run`. Ours is on a disk, and the host sees to it that a copy
//! of that disk runs on the same kernel.

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

/// Fills the cache if there is none. Without the cache CRIU works as well, but slower.
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
    // The run's result does not matter: CRIU has written the cache before it judges the kernel.
    let _ = run.finish(LIMIT).await;
    let name = Path::new(CACHE).file_name().unwrap_or_default();
    let found = rustix::fs::openat(&memory, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    let mut content = Vec::new();
    fs::File::from(found?).take(1 << 20).read_to_end(&mut content)?;
    // Written by rename, because CRIU would trust half a cache.
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
