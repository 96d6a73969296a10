//! Mounts copies of host directories below /mnt. This is done before the doorbell, so a mount that fails is a boot that fails.

use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::{fs, io};

use rustix::mount::{MountFlags, UnmountFlags};

use super::step::{Failed, Step};
use super::{disks, root};

/// The places, on a file system in memory, where the layers are mounted until the overlay is made of them.
const LOWER: &str = "/dev/machinen-lower";
const UPPER: &str = "/dev/machinen-upper";

/// Mounts the copy of a host directory: a squashfs image below and a writable layer above. Returns a descriptor of the file system that
/// takes the writes, to which no path leads any more.
pub fn mount_copy(at: &str) -> Result<OwnedFd, Failed> {
    let [lower, upper] = disks::find(["mountlower", "mountupper"])?;
    root::mount(&lower.node(), LOWER, "squashfs", MountFlags::RDONLY, None)?;
    let writable = root::mount_writable(&upper, UPPER)?;
    let [changes, work] = ["upper", "work"].map(|name| format!("{UPPER}/{name}"));
    for directory in [&changes, &work] {
        root::make_directory(directory, 0o755).step(directory.clone())?;
    }
    // The overlay's top shows the attributes of the upper's directory, so they are copied from the lower's.
    copy_attributes(LOWER, &changes).step(changes.clone())?;
    let options = format!("lowerdir={LOWER},upperdir={changes},workdir={work},{}", root::OVERLAY_FEATURES);
    let options = CString::new(options).map_err(io::Error::from).step("mount")?;
    make_mount_point(at)?;
    root::mount("overlay", at, "overlay", MountFlags::empty(), Some(&options))?;
    for layer in [LOWER, UPPER] {
        rustix::mount::unmount(layer, UnmountFlags::DETACH).step(format!("detach {layer}"))?;
        fs::remove_dir(layer).step(layer)?;
    }
    Ok(writable)
}

/// Makes the directory to mount on.
pub fn make_mount_point(at: &str) -> Result<(), Failed> {
    fs::create_dir_all(at).step(at.to_owned())
}

fn copy_attributes(from: &str, to: &str) -> io::Result<()> {
    let found = rustix::fs::stat(from)?;
    rustix::fs::chmod(to, rustix::fs::Mode::from_raw_mode(found.st_mode))?;
    std::os::unix::fs::chown(to, Some(found.st_uid), Some(found.st_gid))
}
