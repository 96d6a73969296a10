//! Directories of the host's that this guest shares: one 9p filesystem, of which parts are mounted where the boot says.

use std::{fs, io};

use rustix::mount::{MountFlags, UnmountFlags};

use super::mounts::make_mount_point;
use super::root;
use super::step::{Failed, Step};
use crate::config::Share;

/// The tag of the machine's 9p device.
const TAG: &str = "machinen-shares";
/// Where the whole of it is for as long as it takes to mount its parts.
const ALL: &str = "/dev/machinen-shares";

/// No cache: what the host changes is seen by the next look. `access=user`: files belong to the user who makes them. `msize`: what the
/// transport takes at most, 125 pages (net/9p/trans_virtio.c).
const OPTIONS: &std::ffi::CStr = c"trans=virtio,version=9p2000.L,msize=512000,cache=none,access=user";

/// Mounts all of them by FUSE; nothing answers yet.
pub fn mount_fuse(shares: &[Share]) -> Result<Vec<(String, std::os::fd::OwnedFd)>, Failed> {
    use std::os::fd::AsRawFd as _;
    let one = |Share { guest, tag }: &Share| {
        make_mount_point(guest)?;
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC;
        let device = rustix::fs::open("/dev/fuse", flags, rustix::fs::Mode::empty()).map_err(io::Error::from).step("/dev/fuse")?;
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions,max_read=1048576",
            device.as_raw_fd()
        );
        let options = std::ffi::CString::new(options).map_err(io::Error::from).step("mount")?;
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        rustix::mount::mount("share", guest, "fuse", flags, Some(options.as_c_str())).map_err(io::Error::from).step(format!("mount {guest}"))?;
        Ok((tag.clone(), device))
    };
    shares.iter().map(one).collect()
}

/// Mounts all of them.
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

/// All of them or none.
fn mount_parts(shares: &[Share]) -> Result<(), Failed> {
    for (n, Share { guest, tag }) in shares.iter().enumerate() {
        let mounted = make_mount_point(guest)
            .and_then(|()| rustix::mount::mount_bind(format!("{ALL}/{tag}"), guest).step(format!("mount {guest}")));
        if mounted.is_err() {
            for Share { guest, .. } in shares[..n].iter().rev() {
                // What is left mounted would be no worse than the failure that is reported.
                let _ = rustix::mount::unmount(guest, UnmountFlags::DETACH);
            }
            return mounted;
        }
    }
    Ok(())
}

/// Takes them away from under whoever holds files there: those get EIO from then on. For a machine whose host knows nothing of them.
pub fn abandon(shares: &[Share]) -> io::Result<()> {
    for Share { guest, .. } in shares {
        match rustix::mount::unmount(guest, UnmountFlags::FORCE | UnmountFlags::DETACH) {
            // The guest has unmounted it itself, or removed the place.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
            done => done?,
        }
    }
    Ok(())
}
