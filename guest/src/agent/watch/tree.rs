//! The watched tree. It has a thread of its own.
//!
//! A watch is made by path and belongs to an inode, and an event tells of the past: when it is read, its directory may have moved, and
//! another may be in its place. So every event that says where a directory is makes the thread look at that place. Once all events have
//! been read, every directory is watched and known by its present path.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::mem::{self, MaybeUninit};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{self, CreateFlags, Event, ReadFlags, Reader, WatchFlags};
use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};
use rustix::io::{Errno, retry_on_intr};

use super::changes::{Change, Lines};
use super::directories::Directories;
use crate::agent::stream::Abort;
use crate::errno;
use crate::reply::{Code, ErrorReply};
use crate::request::Watch;

/// How many bytes of events are read at a time. Unread events wait in the kernel, which keeps a limited number and reports when it has lost
/// some.
const BUFFER: usize = 16 * 1024;
/// How long to wait for the second half of a rename. The kernel makes both in one system call, one after the other.
const OTHER_HALF: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
const WATCHED: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::CLOSE_WRITE)
    .union(WatchFlags::ATTRIB)
    .union(WatchFlags::DELETE)
    .union(WatchFlags::MOVE)
    .union(WatchFlags::ONLYDIR)
    .union(WatchFlags::DONT_FOLLOW)
    .union(WatchFlags::EXCL_UNLINK);

/// The first half of a rename, whose second half may follow.
struct Moving {
    cookie: u32,
    from: PathBuf,
    is_directory: bool,
}

/// A directory, with those below it if they are watched too.
pub struct Tree {
    inotify: Arc<OwnedFd>,
    root: PathBuf,
    recursive: bool,
    /// The root's watch. Events come as long as it is among `directories`.
    top: i32,
    directories: Directories,
    moving: Option<Moving>,
}

impl Tree {
    pub fn open(request: &Watch) -> Result<Self, Abort> {
        let failed = |error: io::Error| failed(&request.path, &error);
        let inotify =
            inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).map_err(|errno| failed(errno.into()))?;
        let root = fs::canonicalize(&request.path).map_err(failed)?;
        let (recursive, inotify) = (request.recursive, Arc::new(inotify));
        let mut tree = Self { inotify, root, recursive, top: 0, directories: Directories::default(), moving: None };
        tree.top = tree.add(Path::new("")).map_err(failed)?;
        tree.enter(PathBuf::new(), None)?;
        Ok(tree)
    }

    /// Watches the directory at this path. Returns its watch, which it may have had already.
    fn add(&self, directory: &Path) -> io::Result<i32> {
        let is_root = directory.as_os_str().is_empty();
        let flags = if is_root { WATCHED | WatchFlags::MOVE_SELF } else { WATCHED };
        Ok(inotify::add_watch(&self.inotify, self.root.join(directory), flags)?)
    }

    /// Records where a directory is. Another directory that had this path is no longer there, as another event says or will say.
    fn place(&mut self, watch: i32, path: PathBuf) {
        if let Some(other) = self.directories.insert(watch, path) {
            self.unwatch(other);
        }
    }

    fn unwatch(&self, watch: i32) {
        // A watch that is gone already is no error.
        let _ = inotify::remove_watch(&self.inotify, watch);
    }

    /// Watches a directory and those below it. With `lines`, the content of directories that were not known by their path is reported as
    /// new.
    fn enter(&mut self, directory: PathBuf, mut lines: Option<&mut Lines>) -> Result<(), Abort> {
        let mut unseen = vec![directory];
        while let Some(directory) = unseen.pop() {
            let path = self.root.join(&directory);
            let Some(watch) = unless_gone(&path, self.add(&directory))? else {
                self.check_root();
                continue;
            };
            let known = self.directories.paths.get(&watch) == Some(&directory);
            self.place(watch, directory.clone());
            if !self.recursive {
                return Ok(());
            }
            let Some(entries) = unless_gone(&path, fs::read_dir(&path))? else { continue };
            for entry in entries {
                let Some(entry) = unless_gone(&path, entry)? else { break };
                let below = directory.join(entry.file_name());
                if let Some(lines) = lines.as_mut().filter(|_| !known) {
                    lines.push(&Change::Created { path: &below })?;
                }
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) && !is_mount(&entry.path()) {
                    unseen.push(below);
                }
            }
        }
        Ok(())
    }

    /// Checks that the root can still be reached by its path: a directory above it may have been renamed, and then nothing below it can be
    /// found.
    fn check_root(&mut self) {
        if self.add(Path::new("")).ok() != Some(self.top) {
            self.directories.remove(self.top);
        }
    }

    /// Reports changes until the root or the host is gone.
    pub fn follow(mut self, gone: &OwnedFd, lines: &mut Lines) -> Result<(), Abort> {
        let failed = |errno: Errno| Abort::io("inotify", &errno.into());
        let inotify = Arc::clone(&self.inotify);
        let mut buffer = [MaybeUninit::uninit(); BUFFER];
        let mut reader = Reader::new(&inotify, &mut buffer);
        while self.directories.paths.contains_key(&self.top) {
            let moving = self.moving.as_ref().map(|moving| moving.cookie);
            let mut ready =
                [PollFd::new(&inotify, PollFlags::IN), PollFd::from_borrowed_fd(gone.as_fd(), PollFlags::empty())];
            retry_on_intr(|| poll(&mut ready, moving.map(|_| &OTHER_HALF))).map_err(failed)?;
            if !ready[1].revents().is_empty() {
                return Err(Abort::Gone);
            }
            if !ready[0].revents().is_empty() {
                loop {
                    self.take(&reader.next().map_err(failed)?, lines)?;
                    if reader.is_buffer_empty() {
                        break;
                    }
                }
            }
            if moving.is_some() && self.moving.as_ref().map(|moving| moving.cookie) == moving {
                self.settle(lines)?;
            }
            lines.flush()?;
        }
        self.settle(lines)?;
        lines.flush()
    }

    fn take(&mut self, event: &Event<'_>, lines: &mut Lines) -> Result<(), Abort> {
        let events = event.events();
        if events.contains(ReadFlags::QUEUE_OVERFLOW) {
            return self.look_again(lines);
        }
        // Events of a directory that was moved out of the tree may still arrive; they are dropped.
        let Some(directory) = self.directories.paths.get(&event.wd()) else { return Ok(()) };
        let Some(name) = event.file_name() else {
            // Only the root's watch asks for events of its own move.
            if events.intersects(ReadFlags::IGNORED | ReadFlags::MOVE_SELF) {
                self.directories.remove(event.wd());
            }
            return Ok(());
        };
        let below = directory.join(OsStr::from_bytes(name.to_bytes()));
        let path = below.as_path();
        let is_directory = events.contains(ReadFlags::ISDIR);
        if events.contains(ReadFlags::MOVED_TO)
            && let Some(moving) = self.moving.take_if(|moving| moving.cookie == event.cookie())
        {
            if self.is_the_same(&moving, &below) {
                lines.push(&Change::Moved { from: &moving.from, path })?;
                return if is_directory { self.rename(&moving.from, below, lines) } else { Ok(()) };
            }
            self.leave(&moving.from, is_directory, lines)?;
        }
        // While the kernel makes the two halves of a rename, no other names change in the two directories. So at most one rename is waited
        // for at a time.
        let of_names = ReadFlags::CREATE | ReadFlags::DELETE | ReadFlags::MOVED_FROM | ReadFlags::MOVED_TO;
        if events.intersects(of_names)
            && self
                .moving
                .as_ref()
                .is_some_and(|moving| events.contains(ReadFlags::MOVED_FROM) || moving.from.parent() == below.parent())
        {
            self.settle(lines)?;
        }
        if events.contains(ReadFlags::MOVED_FROM) {
            self.moving = Some(Moving { cookie: event.cookie(), from: below, is_directory });
        } else if events.intersects(ReadFlags::CREATE | ReadFlags::MOVED_TO) {
            lines.push(&Change::Created { path })?;
            if is_directory && self.recursive {
                self.enter(below, Some(lines))?;
            }
        } else if events.contains(ReadFlags::DELETE) {
            self.leave(&below, is_directory, lines)?;
        } else {
            lines.push(&Change::Modified { path })?;
        }
        Ok(())
    }

    /// Whether the directory at `to`, if there is one, is the one that was known by the path it was moved from.
    fn is_the_same(&self, moving: &Moving, to: &Path) -> bool {
        !(moving.is_directory && self.recursive)
            || self.add(to).map_or(true, |watch| self.directories.paths.get(&watch) == Some(&moving.from))
    }

    fn rename(&mut self, from: &Path, to: PathBuf, lines: &mut Lines) -> Result<(), Abort> {
        if !self.recursive {
            return Ok(());
        }
        for (watch, path) in self.directories.take(from) {
            let rest = path.strip_prefix(from).unwrap_or(&path);
            self.place(watch, to.join(rest));
        }
        self.enter(to, Some(lines))
    }

    /// Reports that what was moved away has left the tree, because no second half has come.
    fn settle(&mut self, lines: &mut Lines) -> Result<(), Abort> {
        self.moving.take().map_or(Ok(()), |moving| self.leave(&moving.from, moving.is_directory, lines))
    }

    /// Reports that what had this path is gone, with everything below it.
    fn leave(&mut self, from: &Path, is_directory: bool, lines: &mut Lines) -> Result<(), Abort> {
        if is_directory {
            for (watch, _) in self.directories.take(from) {
                self.unwatch(watch);
            }
        }
        lines.push(&Change::Removed { path: from })
    }

    /// Watches the whole tree anew, because after lost events directories may be anywhere. The host is told last, so that what it then
    /// looks at is watched.
    fn look_again(&mut self, lines: &mut Lines) -> Result<(), Abort> {
        self.settle(lines)?;
        let before = mem::take(&mut self.directories);
        self.enter(PathBuf::new(), None)?;
        for watch in before.paths.into_keys().filter(|watch| !self.directories.paths.contains_key(watch)) {
            self.unwatch(watch);
        }
        lines.push(&Change::Lost)
    }
}

/// `None`: the path has vanished, of which there is an event.
fn unless_gone<T>(path: &Path, found: io::Result<T>) -> Result<Option<T>, Abort> {
    match found {
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
        found => found.map(Some).map_err(|error| failed(path, &error)),
    }
}

/// Whether a file system is mounted at this directory.
fn is_mount(directory: &Path) -> bool {
    statx(CWD, directory, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::TYPE)
        .is_ok_and(|found| found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

fn failed(path: &Path, error: &io::Error) -> Abort {
    let path = path.to_string_lossy();
    let limit = match errno::number(error) {
        Some(libc::ENOSPC) => "max_user_watches",
        Some(libc::EMFILE) => "max_user_instances",
        _ => return Abort::io(path.as_ref(), error),
    };
    let message = format!("{path}: the machine has no more watches to give (fs.inotify.{limit})");
    Abort::Reply(ErrorReply { errno: errno::of(error), ..ErrorReply::new(Code::WatchLimit, message) })
}

#[cfg(test)]
#[path = "tree_tests.rs"]
mod tests;
