//! Directories and files of the host that this guest shares. All are entries of one FUSE file system, each mounted by a bind mount.

use std::ffi::CString;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::{fs, io};

use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags};
use rustix::mount::{MountFlags, UnmountFlags};

use super::root;
use super::step::{Failed, Step};
use crate::config::Share;

/// Where the file system is mounted while its entries are.
const ALL: &str = "/dev/machinen-shares";
/// Where the kernel's control files of FUSE are mounted for a moment.
const CONTROL: &str = "/dev/machinen-fuse";
/// The host's programs and devices mean nothing here.
const RESTRICTED: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);

/// Mounts the file system where nothing else looks. Returns /dev/fuse, whose requests must be answered before anything is looked up, and the
/// kernel's number of the connection.
pub fn mount_all() -> Result<(OwnedFd, u32), Failed> {
    let device = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).step("/dev/fuse")?;
    // The kernel decides by the files' modes and owners who may do what, for all users of the guest.
    let fd = device.as_raw_fd();
    let options = format!("fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions");
    let options = CString::new(options).map_err(io::Error::from).step("mount")?;
    root::mount("machinen", ALL, "fuse", RESTRICTED, Some(&options))?;
    // Asks for nothing that the kernel does not know, because nothing answers yet.
    let found = rustix::fs::statx(rustix::fs::CWD, ALL, AtFlags::STATX_DONT_SYNC, StatxFlags::empty()).step(ALL)?;
    Ok((device, found.stx_dev_minor))
}

/// Mounts the entries, outer places before those within.
pub fn mount_each(shares: &[Share]) -> Result<(), Failed> {
    let mut sorted: Vec<&Share> = shares.iter().collect();
    sorted.sort_by_key(|share| Path::new(&share.guest).components().count());
    sorted.into_iter().try_for_each(mount)?;
    rustix::mount::unmount(ALL, UnmountFlags::DETACH).step(format!("detach {ALL}"))?;
    fs::remove_dir(ALL).step(ALL)
}

fn mount(Share { guest, tag, read_only }: &Share) -> Result<(), Failed> {
    let step = || format!("mount {guest}");
    let entry = format!("{ALL}/{tag}");
    let is_directory = fs::metadata(&entry).step(step())?.is_dir();
    make_mount_point(Path::new(guest), is_directory).step(step())?;
    rustix::mount::mount_bind(&entry, guest).step(step())?;
    if *read_only {
        set_read_only(guest, true).step(step())?;
    }
    Ok(())
}

/// Makes a mount read-only or writable. Whatever it says, the host's file server lets nothing be written that it may not.
pub fn set_read_only(guest: &str, read_only: bool) -> io::Result<()> {
    let mode = if read_only { MountFlags::RDONLY } else { MountFlags::empty() };
    Ok(rustix::mount::mount_remount(guest, MountFlags::BIND | RESTRICTED | mode, c"")?)
}

/// Makes the directory or the file to mount on, unless there is one.
fn make_mount_point(at: &Path, is_directory: bool) -> io::Result<()> {
    if is_directory {
        return fs::create_dir_all(at);
    }
    if let Some(parent) = at.parent() {
        fs::create_dir_all(parent)?;
    }
    match fs::OpenOptions::new().write(true).create_new(true).open(at) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        done => done.map(drop),
    }
}

/// Ends a connection: whoever waits for the host, or looks at a share from now on, gets ENOTCONN.
pub fn abort(connection: u32) -> Result<(), Failed> {
    root::mount("fusectl", CONTROL, "fusectl", MountFlags::empty(), None)?;
    let aborted = fs::write(format!("{CONTROL}/{connection}/abort"), "1").step("abort");
    rustix::mount::unmount(CONTROL, UnmountFlags::DETACH).step(format!("detach {CONTROL}"))?;
    fs::remove_dir(CONTROL).step(CONTROL)?;
    aborted
}
