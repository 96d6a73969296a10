//! The root filesystem: from an initramfs that holds this program to the image's tree.

use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::{fs, io};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

use super::disks::{self, Disk};
use super::grow;
use super::phases::Phases;
use super::step::{Failed, Step};
use crate::config::RootKind;

const BASE: &str = "/base";
const UPPER: &str = "/upper";
const NEW_ROOT: &str = "/new-root";

/// The options `index` and `nfs_export` give files the handles that CRIU needs to restore inotify watches. They cannot be changed for an
/// upper that has been used, because the upper records them.
const OVERLAY_OPTIONS: &CStr = c"lowerdir=/base,upperdir=/upper/upper,workdir=/upper/work,index=on,nfs_export=on";
/// The same options for any other overlay.
pub const OVERLAY_FEATURES: &str = "index=on,nfs_export=on";

/// Turns off the thread that writes zeros over inode tables (in a sparse file they are zeros already) and the reading ahead of bitmaps.
/// Both would run in the first seconds of every machine, and again in every copy of one in which they had not finished (ext4(5); the
/// kernel's `ext4_lazyinit_thread`).
const WRITABLE_OPTIONS: &CStr = c"noinit_itable,no_prefetch_block_bitmaps";

/// Mounts /dev and /sys, through which the disks are found. They move into the new root later; /proc is mounted only there.
pub fn mount_kernel_filesystems() -> Result<(), Failed> {
    for (kind, at) in [("devtmpfs", "/dev"), ("sysfs", "/sys")] {
        mount(kind, at, kind, MountFlags::empty(), None)?;
    }
    Ok(())
}

/// Mounts the root at `NEW_ROOT`. Returns a descriptor of the file system that takes the writes. With an overlay no path leads to it any
/// more; power-off freezes it through the descriptor, and `stats` measures it.
pub fn mount_root(kind: RootKind, phases: &mut Phases) -> Result<OwnedFd, Failed> {
    match kind {
        RootKind::Disk => {
            let [root] = disks::find(["root"])?;
            phases.mark("disks");
            let writable = mount_writable(&root, NEW_ROOT)?;
            phases.mark("root");
            Ok(writable)
        }
        RootKind::Overlay => {
            let [base, upper] = disks::find(["root", "upper"])?;
            phases.mark("disks");
            // With noload, because a read-only base has no journal to replay, and many VMs share it.
            mount(&base.node(), BASE, "ext4", MountFlags::RDONLY, Some(c"noload"))?;
            phases.mark("base");
            let writable = mount_writable(&upper, UPPER)?;
            for directory in ["/upper/upper", "/upper/work"] {
                make_directory(directory, 0o755).step(directory)?;
            }
            phases.mark("upper");
            mount("overlay", NEW_ROOT, "overlay", MountFlags::empty(), Some(OVERLAY_OPTIONS))?;
            for layer in [BASE, UPPER] {
                rustix::mount::unmount(layer, UnmountFlags::DETACH).step(format!("detach {layer}"))?;
            }
            phases.mark("overlay");
            Ok(writable)
        }
    }
}

/// Makes `NEW_ROOT` the root of everything. Returns the root of the initramfs, to which no path leads any more.
pub fn switch() -> Result<OwnedFd, Failed> {
    for directory in ["/dev", "/sys"] {
        let target = format!("{NEW_ROOT}{directory}");
        make_directory(&target, 0o755).step(target.clone())?;
        rustix::mount::mount_move(directory, &target).step(format!("move {directory}"))?;
    }
    let initramfs = open_directory("/").step("initramfs")?;
    rustix::process::chdir(NEW_ROOT).step("chdir")?;
    rustix::mount::mount_move(".", "/").step("move root")?;
    rustix::process::chroot(".").step("chroot")?;
    rustix::process::chdir("/").step("chdir /")?;
    Ok(initramfs)
}

/// Deletes the files of the initramfs, to free their memory. The running program itself stays in memory. Nothing waits for this, so it is
/// done while there is nothing else to do.
pub fn free(initramfs: OwnedFd) -> Result<(), Failed> {
    set_scheduling(libc::SCHED_IDLE).step("initramfs")?;
    // Otherwise the kernel would not look again before the next tick.
    rustix::thread::sched_yield();
    rustix::process::fchdir(&initramfs).step("initramfs")?;
    let device = rustix::fs::fstat(initramfs).step("initramfs")?.st_dev;
    empty_working_directory(device).step("initramfs")?;
    rustix::process::chdir("/").step("chdir /")?;
    set_scheduling(libc::SCHED_OTHER).step("initramfs")
}

/// Mounts an ext4 disk and grows the file system to the disk's size. Returns its root.
pub fn mount_writable(disk: &Disk, at: &str) -> Result<OwnedFd, Failed> {
    mount(&disk.node(), at, "ext4", MountFlags::empty(), Some(WRITABLE_OPTIONS))?;
    let writable = open_directory(at).step(at.to_owned())?;
    grow::to_disk(&writable, disk).step(format!("grow {at}"))?;
    Ok(writable)
}

/// Mounts `source`. Makes the mount point if it is missing.
pub fn mount(source: &str, at: &str, kind: &str, flags: MountFlags, options: Option<&CStr>) -> Result<(), Failed> {
    make_directory(at, 0o755).step(at.to_owned())?;
    rustix::mount::mount(source, at, kind, flags, options).step(format!("mount {source} as {kind} at {at}"))
}

/// Makes a directory. One that exists already is no error.
pub fn make_directory(path: impl AsRef<Path>, mode: u32) -> io::Result<()> {
    match rustix::fs::mkdir(path.as_ref(), Mode::from_raw_mode(mode)) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        // A read-only layer fails with EROFS even if the directory exists.
        Err(Errno::ROFS) if path.as_ref().is_dir() => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

fn open_directory(path: &str) -> rustix::io::Result<OwnedFd> {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

/// Deletes everything in the working directory that is on `device`.
fn empty_working_directory(device: u64) -> io::Result<()> {
    for entry in fs::read_dir(".")? {
        let name = entry?.file_name();
        let stat = rustix::fs::statat(CWD, &name, AtFlags::SYMLINK_NOFOLLOW)?;
        // A directory on another device is a mount point.
        if stat.st_dev != device {
            continue;
        }
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            fs::remove_dir_all(name)?;
        } else {
            fs::remove_file(name)?;
        }
    }
    Ok(())
}

fn set_scheduling(policy: libc::c_int) -> io::Result<()> {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: the kernel reads the structure, which outlives the call; 0 is the calling process.
    if unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
