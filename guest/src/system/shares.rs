//! Live mounts: directories of the host on one 9p file system, whose parts are mounted where the boot configuration says.

use std::{fs, io};

use rustix::mount::{MountFlags, UnmountFlags};

use super::mounts::make_mount_point;
use super::root;
use super::step::{Failed, Step};
use crate::config::Share;

/// The tag of the machine's 9p device.
const TAG: &str = "machinen-shares";
/// Where the whole file system is mounted while its parts are being mounted.
const ALL: &str = "/dev/machinen-shares";

/// `cache=none`: the next look sees what the host has changed. `access=user`: files belong to the user who makes them. `msize`: the most
/// that the transport takes, 125 pages (net/9p/trans_virtio.c).
const OPTIONS: &std::ffi::CStr = c"trans=virtio,version=9p2000.L,msize=512000,cache=none,access=user";

/// Mounts all shares.
pub fn mount(shares: &[Share]) -> Result<(), Failed> {
    if shares.is_empty() {
        return Ok(());
    }
    root::mount(TAG, ALL, "9p", MountFlags::empty(), Some(OPTIONS))?;
    let mounted = mount_parts(shares);
    rustix::mount::unmount(ALL, UnmountFlags::DETACH).step(format!("detach {ALL}"))?;
    fs::remove_dir(ALL).step(ALL)?;
    mounted
}

/// Mounts all parts or none.
fn mount_parts(shares: &[Share]) -> Result<(), Failed> {
    for (n, Share { guest, tag }) in shares.iter().enumerate() {
        let mounted = make_mount_point(guest)
            .and_then(|()| rustix::mount::mount_bind(format!("{ALL}/{tag}"), guest).step(format!("mount {guest}")));
        if mounted.is_err() {
            for Share { guest, .. } in shares[..n].iter().rev() {
                // A part that stays mounted is no worse than the failure that is reported.
                let _ = rustix::mount::unmount(guest, UnmountFlags::DETACH);
            }
            return mounted;
        }
    }
    Ok(())
}

/// Unmounts all shares, also where processes hold files, which get EIO from then on. For a copy, whose host does not know the open files.
pub fn abandon(shares: &[Share]) -> io::Result<()> {
    for Share { guest, .. } in shares {
        match rustix::mount::unmount(guest, UnmountFlags::FORCE | UnmountFlags::DETACH) {
            // A program in the guest has unmounted the share or removed its mount point.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
            done => done?,
        }
    }
    Ok(())
}
