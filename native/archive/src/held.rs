//! Files that are held open while they are packed, and the directories in which they are looked up.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

/// Why a file cannot be packed that is another at every look.
pub const CHANGES: &str = "it keeps changing while it is copied";
/// How often a name is looked up, or a file read, before a change to it counts as an error.
pub const TRIES: usize = 5;

/// A file, held open since its name was looked up. Whatever happens to the name later, all that is packed is of this file.
pub struct Held {
    /// Open for reading if it is a regular file; otherwise only held (O_PATH), because opening a device or a fifo can have effects.
    pub fd: OwnedFd,
    pub stat: Stat,
}

impl Held {
    pub fn look(parent: BorrowedFd, name: &OsStr, follow: bool) -> io::Result<Self> {
        let (at, open) =
            if follow { (AtFlags::empty(), OFlags::empty()) } else { (AtFlags::SYMLINK_NOFOLLOW, OFlags::NOFOLLOW) };
        for _ in 0..TRIES {
            let seen = rustix::fs::statat(parent, name, at)?;
            let access = match kind(&seen) {
                // With NONBLOCK, which does not wait for a writer if the name is a fifo by now.
                FileType::RegularFile => OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY,
                _ => OFlags::PATH,
            };
            let fd = match rustix::fs::openat(parent, name, access | open | OFlags::CLOEXEC, Mode::empty()) {
                // The name is a link or a socket by now.
                Err(Errno::LOOP | Errno::NXIO) => continue,
                fd => fd?,
            };
            let stat = rustix::fs::fstat(&fd)?;
            if (stat.st_dev, stat.st_ino, kind(&stat)) == (seen.st_dev, seen.st_ino, kind(&seen)) {
                return Ok(Self { fd, stat });
            }
        }
        Err(io::Error::other(CHANGES))
    }

    pub fn is_directory(&self) -> bool {
        kind(&self.stat) == FileType::Directory
    }
}

pub fn kind(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

/// Directories below one that is held. The kernel follows no symbolic link on the way to them (openat2).
pub struct Directories {
    root: OwnedFd,
    /// The directory that was opened last, because its files come next.
    last: Option<(PathBuf, OwnedFd)>,
}

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

impl Directories {
    pub fn below(held: &Held) -> io::Result<Self> {
        Ok(Self { root: rustix::fs::openat(&held.fd, ".", DIRECTORY, Mode::empty())?, last: None })
    }

    pub fn open(&mut self, relative: &Path) -> io::Result<BorrowedFd<'_>> {
        if relative.as_os_str().is_empty() {
            return Ok(self.root.as_fd());
        }
        let fd = match self.last.take().filter(|(path, _)| path == relative) {
            Some((_, fd)) => fd,
            None => {
                let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
                match rustix::fs::openat2(&self.root, relative, DIRECTORY, Mode::empty(), resolve) {
                    // Something else has taken its name, or a name above it.
                    Err(Errno::LOOP | Errno::NOTDIR) => return Err(Errno::NOENT.into()),
                    fd => fd?,
                }
            }
        };
        Ok(self.last.insert((relative.to_owned(), fd)).1.as_fd())
    }
}
