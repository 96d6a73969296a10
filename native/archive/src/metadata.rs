//! Mode, owner and times that an entry gives its file.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use rustix::fs::{AtFlags, Gid, Mode, Stat, Timespec, Timestamps, Uid};
use rustix::io::Errno;
use tar::Entry;

use crate::error::invalid;
use crate::times;

pub struct Metadata {
    pub mode: Mode,
    uid: Option<Uid>,
    gid: Option<Gid>,
    pub times: Timestamps,
}

impl Metadata {
    pub fn of(entry: &mut Entry<impl Read>, keeps_owners: bool) -> io::Result<Self> {
        let time = time(entry)?;
        let header = entry.header();
        let id =
            |id: u64| u32::try_from(id).ok().filter(|id| *id != u32::MAX).ok_or_else(|| invalid("an impossible owner"));
        Ok(Self {
            mode: Mode::from_raw_mode(header.mode()? & if keeps_owners { 0o7777 } else { 0o1777 }),
            uid: keeps_owners.then(|| id(header.uid()?).map(Uid::from_raw)).transpose()?,
            gid: keeps_owners.then(|| id(header.gid()?).map(Gid::from_raw)).transpose()?,
            times: Timestamps { last_access: time, last_modification: time },
        })
    }

    /// Sets the owner first, because changing it clears set-id bits.
    pub fn set_on(&self, file: impl AsFd) -> rustix::io::Result<()> {
        self.set_owner(&file)?;
        rustix::fs::fchmod(&file, self.mode)
    }

    pub fn set_owner(&self, file: impl AsFd) -> rustix::io::Result<()> {
        if self.uid.is_some() { rustix::fs::fchown(&file, self.uid, self.gid) } else { Ok(()) }
    }

    pub fn set_at(&self, parent: BorrowedFd, name: &Path, has_mode: bool) -> rustix::io::Result<()> {
        if self.uid.is_some() {
            rustix::fs::chownat(parent, name, self.uid, self.gid, AtFlags::SYMLINK_NOFOLLOW)?;
        }
        if has_mode {
            rustix::fs::chmodat(parent, name, self.mode, AtFlags::empty())?;
        }
        rustix::fs::utimensat(parent, name, &self.times, AtFlags::SYMLINK_NOFOLLOW)?;
        self.check_time(&rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?)
    }

    /// Checks the time that the file got, because a file system silently stores the nearest time it can hold. FAT counts in steps of two
    /// seconds.
    pub fn check_time(&self, found: &Stat) -> rustix::io::Result<()> {
        let difference = found.st_mtime.abs_diff(self.times.last_modification.tv_sec);
        if difference <= 2 { Ok(()) } else { Err(Errno::OVERFLOW) }
    }
}

fn time(entry: &mut Entry<impl Read>) -> io::Result<Timespec> {
    let impossible = || invalid("an impossible time");
    for extension in entry.pax_extensions()?.into_iter().flatten() {
        let extension = extension?;
        if extension.key() == Ok(times::KEY) {
            return extension.value().ok().and_then(times::read).ok_or_else(impossible);
        }
    }
    let seconds = i64::try_from(entry.header().mtime()?).map_err(|_| impossible())?;
    Ok(Timespec { tv_sec: seconds, tv_nsec: 0 })
}
