//! Files that appear whole.

use std::ffi::OsStr;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;

/// A file that gets its name only when it is whole. Until then it has no name, so that nothing of it is left even if this process is
/// killed. On a file system without such files it has a temporary name, which is removed with the draft.
pub struct Draft<'a> {
    parent: BorrowedFd<'a>,
    pub file: OwnedFd,
    name: Option<String>,
}

static DRAFTS: AtomicU64 = AtomicU64::new(0);

impl<'a> Draft<'a> {
    pub fn begin(parent: BorrowedFd<'a>) -> rustix::io::Result<Self> {
        let (flags, mode) = (OFlags::WRONLY | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR);
        match rustix::fs::openat(parent, ".", flags | OFlags::TMPFILE, mode) {
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL | Errno::NOENT) => {}
            file => return Ok(Self { parent, file: file?, name: None }),
        }
        loop {
            let name = format!(".machinen-{}-{}", std::process::id(), DRAFTS.fetch_add(1, Ordering::Relaxed));
            let flags = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
            match rustix::fs::openat(parent, &name, flags, mode) {
                Err(Errno::EXIST) => {}
                file => return Ok(Self { parent, file: file?, name: Some(name) }),
            }
        }
    }

    /// Gives the draft its name and replaces what has that name. Writing into an old file would change its other names too.
    pub fn place(mut self, last: &OsStr) -> rustix::io::Result<()> {
        if let Some(name) = &self.name {
            rustix::fs::renameat(self.parent, name, self.parent, last)?;
            self.name = None;
            return Ok(());
        }
        let link = || {
            let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            rustix::fs::linkat(CWD, path, self.parent, last, AtFlags::SYMLINK_FOLLOW)
        };
        match link() {
            Err(Errno::EXIST) => {
                remove(self.parent, last.as_ref())?;
                link()
            }
            linked => linked,
        }
    }
}

impl Drop for Draft<'_> {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            // The earlier failure is reported, not one of this removal.
            let _ = rustix::fs::unlinkat(self.parent, name, AtFlags::empty());
        }
    }
}

/// Removes the old file of this name. It is not written into, because it may have other names.
pub fn remove(parent: BorrowedFd, name: &Path) -> rustix::io::Result<()> {
    match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
        Err(Errno::NOENT) => Ok(()),
        done => done,
    }
}
