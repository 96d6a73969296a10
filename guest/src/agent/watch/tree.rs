//! The operation `watch`: reports changes below a directory, by inotify(7). It reads directories, which may block, so it has a thread of
//! its own.
//!
//! A watch is made by path and belongs to an inode, and an event tells of the past: when it is read, its directory may have moved, and
//! another may be in its place. So every event that says where a directory is makes the thread look at that place. Once all events have
//! been read, every directory is watched and known by its present path.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::mem::{self, MaybeUninit};
use std::ops::Bound;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use machinen_protocol::frame::Kind;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{self, CreateFlags, Event, ReadFlags, Reader, WatchFlags};
use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};
use rustix::io::{Errno, retry_on_intr};
use rustix::pipe::{PipeFlags, pipe_with};
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;

use crate::agent::exchange::Exchange;
use crate::agent::stream::{Abort, CHUNK};
use crate::agent::threads::{self, WATCHES};
use crate::errno;
use crate::file_names;
use crate::reply::{Code, Done, ErrorReply};
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

/// Sends changes until the directory is gone.
pub async fn watch<R, W>(request: Watch, exchange: &mut Exchange<R, W>) -> Result<Done, Abort>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let Exchange { input, output, .. } = exchange;
    let tree = WATCHES.run(input, move || Tree::open(&request)).await??;
    output.send_json(Kind::Started, &Done {}).await?;
    let (pieces, mut leaving) = mpsc::channel(1);
    // Dropping this end of the pipe wakes the thread.
    let (gone, _wanted) = pipe_with(PipeFlags::CLOEXEC).map_err(|errno| Abort::io("watch", &errno.into()))?;
    let watching = WATCHES.start(move || tree.follow(&gone, &mut Lines { pieces, piece: Vec::new() })).await?;
    let carrying = async {
        while let Some(piece) = leaving.recv().await {
            output.send(Kind::Data, &piece).await?;
        }
        Ok::<_, Abort>(())
    };
    tokio::select! {
        () = input.closed() => return Err(Abort::Gone),
        carried = carrying => carried?,
    }
    threads::finished(watching).await??;
    output.send(Kind::Eof, &[]).await?;
    Ok(Done {})
}

/// A line of JSON. Paths are relative to the watched directory.
#[derive(Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
enum Change<'a> {
    Created {
        #[serde(serialize_with = "file_names::serialize")]
        path: &'a Path,
    },
    /// A process that could write to it has closed it, or its attributes have changed.
    Modified {
        #[serde(serialize_with = "file_names::serialize")]
        path: &'a Path,
    },
    Removed {
        #[serde(serialize_with = "file_names::serialize")]
        path: &'a Path,
    },
    Moved {
        #[serde(serialize_with = "file_names::serialize")]
        from: &'a Path,
        #[serde(serialize_with = "file_names::serialize")]
        path: &'a Path,
    },
    /// The kernel could not keep all events.
    Lost,
}

/// Collects lines and sends them to the stream in pieces.
struct Lines {
    pieces: mpsc::Sender<Vec<u8>>,
    piece: Vec<u8>,
}

impl Lines {
    fn push(&mut self, change: &Change) -> Result<(), Abort> {
        serde_json::to_writer(&mut self.piece, change).map_err(|error| Abort::io("change", &error.into()))?;
        self.piece.push(b'\n');
        if self.piece.len() < CHUNK { Ok(()) } else { self.flush() }
    }

    fn flush(&mut self) -> Result<(), Abort> {
        if self.piece.is_empty() {
            return Ok(());
        }
        self.pieces.blocking_send(mem::take(&mut self.piece)).map_err(|_| Abort::Gone)
    }
}

/// The first half of a rename, whose second half may follow.
struct Moving {
    cookie: u32,
    from: PathBuf,
    is_directory: bool,
}

/// The watched directories, by their watch and by their path below the root. Both keys are unique.
#[derive(Default)]
struct Directories {
    paths: HashMap<i32, PathBuf>,
    watches: BTreeMap<PathBuf, i32>,
}

impl Directories {
    /// Returns the watch of the directory that had this path until now.
    fn insert(&mut self, watch: i32, path: PathBuf) -> Option<i32> {
        self.remove(watch);
        let other = self.watches.insert(path.clone(), watch);
        other.map(|other| self.paths.remove(&other));
        self.paths.insert(watch, path);
        other
    }

    fn remove(&mut self, watch: i32) {
        self.paths.remove(&watch).map(|path| self.watches.remove(&path));
    }

    /// Removes and returns the directory with this path and all below it.
    fn take(&mut self, path: &Path) -> Vec<(i32, PathBuf)> {
        let from = self.watches.range::<Path, _>((Bound::Included(path), Bound::Unbounded));
        let below = from.take_while(|(below, _)| below.starts_with(path));
        let taken: Vec<_> = below.map(|(path, &watch)| (watch, path.clone())).collect();
        for &(watch, _) in &taken {
            self.remove(watch);
        }
        taken
    }
}

struct Tree {
    inotify: Arc<OwnedFd>,
    root: PathBuf,
    recursive: bool,
    /// The root's watch. Events come as long as it is among `directories`.
    top: i32,
    directories: Directories,
    moving: Option<Moving>,
}

impl Tree {
    fn open(request: &Watch) -> Result<Self, Abort> {
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
    fn follow(mut self, gone: &OwnedFd, lines: &mut Lines) -> Result<(), Abort> {
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
mod tests {
    use std::collections::BTreeSet;
    use std::thread::{self, JoinHandle};

    use serde_json::{Value, json};
    use tempfile::TempDir;

    use super::*;

    /// A watched directory and the changes that are reported to the host.
    struct Watched {
        directory: TempDir,
        pieces: mpsc::Receiver<Vec<u8>>,
        told: Vec<Value>,
        host: Option<OwnedFd>,
        thread: JoinHandle<Result<(), Abort>>,
    }

    impl Watched {
        fn new(recursive: bool, prepare: impl FnOnce(&Path)) -> Self {
            let directory = tempfile::tempdir().unwrap();
            prepare(directory.path());
            let tree = open(directory.path(), recursive).unwrap();
            let (pieces, leaving) = mpsc::channel(1);
            let (gone, host) = pipe_with(PipeFlags::CLOEXEC).unwrap();
            let thread = thread::spawn(move || tree.follow(&gone, &mut Lines { pieces, piece: Vec::new() }));
            Self { directory, pieces: leaving, told: Vec::new(), host: Some(host), thread }
        }

        fn at(&self, path: &str) -> PathBuf {
            self.directory.path().join(path)
        }

        /// All changes reported up to the creation of this file.
        fn until(&mut self, marker: &str) -> Vec<Value> {
            fs::write(self.at(marker), "").unwrap();
            let last = created(marker);
            while !self.told.contains(&last) {
                let piece = self.pieces.blocking_recv().unwrap();
                assert!(piece.len() < machinen_protocol::frame::MAX_PAYLOAD);
                self.told
                    .extend(piece.split(|&byte| byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()));
            }
            let end = self.told.iter().position(|change| *change == last).unwrap();
            self.told.drain(..=end).filter(|change| *change != last).collect()
        }
    }

    fn open(path: &Path, recursive: bool) -> Result<Tree, Abort> {
        Tree::open(&Watch { path: path.to_owned(), recursive })
    }

    fn created(path: &str) -> Value {
        json!({"kind": "created", "path": path})
    }

    fn modified(path: &str) -> Value {
        json!({"kind": "modified", "path": path})
    }

    fn removed(path: &str) -> Value {
        json!({"kind": "removed", "path": path})
    }

    fn moved(from: &str, path: &str) -> Value {
        json!({"kind": "moved", "from": from, "path": path})
    }

    /// The paths of everything below `directory`.
    fn found(directory: &Path, below: &Path, all: &mut BTreeSet<PathBuf>) {
        for entry in fs::read_dir(directory.join(below)).unwrap() {
            let entry = entry.unwrap();
            let path = below.join(entry.file_name());
            if entry.file_type().unwrap().is_dir() {
                found(directory, &path, all);
            }
            all.insert(path);
        }
    }

    /// Applies the reported changes, so that `all` is the tree as a host would know it.
    fn apply(all: &mut BTreeSet<PathBuf>, changes: &[Value]) {
        let take = |all: &mut BTreeSet<PathBuf>, from: &Path| {
            let (taken, rest) = mem::take(all).into_iter().partition::<BTreeSet<_>, _>(|path| path.starts_with(from));
            *all = rest;
            taken
        };
        for change in changes {
            let path = Path::new(change["path"].as_str().unwrap());
            match change["kind"].as_str().unwrap() {
                "created" => drop(all.insert(path.to_owned())),
                "removed" => drop(take(all, path)),
                "moved" => {
                    let from = Path::new(change["from"].as_str().unwrap());
                    let taken = take(all, from);
                    take(all, path);
                    all.extend(taken.iter().map(|old| match old.strip_prefix(from).unwrap() {
                        rest if rest.as_os_str().is_empty() => path.to_owned(),
                        rest => path.join(rest),
                    }));
                    all.insert(path.to_owned());
                }
                "modified" => {}
                other => panic!("{other}"),
            }
        }
    }

    #[test]
    fn tells_of_every_kind_of_change() {
        let mut watched = Watched::new(false, |root| fs::create_dir(root.join("sub")).unwrap());
        fs::write(watched.at("a"), "1").unwrap();
        fs::rename(watched.at("a"), watched.at("ä \n")).unwrap();
        fs::write(watched.at("sub/hidden"), "").unwrap();
        fs::remove_dir_all(watched.at("sub")).unwrap();
        fs::hard_link(watched.at("ä \n"), watched.at("b")).unwrap();
        fs::remove_file(watched.at("b")).unwrap();
        let other = tempfile::tempdir_in(watched.directory.path().parent().unwrap()).unwrap();
        fs::rename(watched.at("ä \n"), other.path().join("out")).unwrap();
        fs::rename(other.path().join("out"), watched.at("in")).unwrap();
        let told = watched.until("end");
        let expected = [
            created("a"),
            modified("a"),
            moved("a", "ä \n"),
            removed("sub"),
            created("b"),
            removed("b"),
            removed("ä \n"),
            created("in"),
        ];
        assert_eq!(told, expected);
    }

    #[test]
    fn follows_directories_where_they_go() {
        let mut watched = Watched::new(true, |root| fs::create_dir_all(root.join("a/b")).unwrap());
        fs::write(watched.at("a/b/1"), "").unwrap();
        fs::rename(watched.at("a"), watched.at("c")).unwrap();
        assert!(watched.until("m1").contains(&moved("a", "c")));
        fs::write(watched.at("c/b/2"), "").unwrap();
        assert!(watched.until("m2").contains(&created("c/b/2")));
        let other = tempfile::tempdir_in(watched.directory.path().parent().unwrap()).unwrap();
        fs::rename(watched.at("c"), other.path().join("c")).unwrap();
        assert_eq!(watched.until("m3").last(), Some(&removed("c")));
        fs::write(other.path().join("c/b/3"), "").unwrap();
        fs::rename(other.path().join("c"), watched.at("d")).unwrap();
        let told = watched.until("m4");
        let all = [created("d"), created("d/b"), created("d/b/1"), created("d/b/2"), created("d/b/3")];
        assert!(all.iter().all(|change| told.contains(change)), "{told:?}");
        assert!(!told.contains(&created("c/b/3")), "{told:?}");
    }

    #[test]
    fn events_describe_the_tree_whatever_happens_to_it() {
        let mut watched = Watched::new(true, |_| {});
        let workers: Vec<_> = (0..3_u64)
            .map(|seed| {
                let root = watched.directory.path().to_owned();
                thread::spawn(move || {
                    let mut random = 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(seed + 1);
                    let mut choose = |n: u64| {
                        random ^= random << 13;
                        random ^= random >> 7;
                        random ^= random << 17;
                        random % n
                    };
                    // So few that the kernel keeps all their events.
                    for _ in 0..1200 {
                        let place = |depth: u64, choose: &mut dyn FnMut(u64) -> u64| {
                            (0..=depth).fold(root.clone(), |path, _| path.join(format!("d{}", choose(3))))
                        };
                        let depth = choose(4);
                        let path = place(depth, &mut choose);
                        // Many of these operations fail, which does not matter.
                        let _ = match choose(6) {
                            0 | 1 => fs::create_dir_all(path),
                            2 | 3 => fs::write(path.join("file"), ""),
                            4 => fs::rename(path, place(choose(3), &mut choose)),
                            _ => fs::remove_dir_all(path),
                        };
                    }
                })
            })
            .collect();
        let mut all = BTreeSet::new();
        let mut turn = 0;
        while !workers.iter().all(JoinHandle::is_finished) {
            turn += 1;
            apply(&mut all, &watched.until(&format!("m{turn}")));
        }
        // The marker comes last, so every change before it has been reported.
        apply(&mut all, &watched.until("end"));
        let mut there = BTreeSet::new();
        found(watched.directory.path(), Path::new(""), &mut there);
        there.retain(|path| path.starts_with("d0") || path.starts_with("d1") || path.starts_with("d2"));
        all.retain(|path| path.starts_with("d0") || path.starts_with("d1") || path.starts_with("d2"));
        assert_eq!(all, there);
        // Every directory must be watched.
        for path in there.iter().filter(|path| !path.ends_with("file")) {
            watched.until(path.join("last").to_str().unwrap());
        }
    }

    #[test]
    fn says_what_it_did_not_see_and_sees_what_comes_then() {
        let bound: usize =
            fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap().trim().parse().unwrap();
        let mut watched = Watched::new(true, |root| fs::create_dir(root.join("old")).unwrap());
        for n in 0..bound + 5000 {
            fs::write(watched.at(&format!("old/{n}")), "").unwrap();
        }
        fs::create_dir_all(watched.at("new/deep")).unwrap();
        fs::rename(watched.at("old"), watched.at("new/old")).unwrap();
        // Reading begins only here.
        let lost = json!({"kind": "lost"});
        while !watched.told.contains(&lost) {
            let piece = watched.pieces.blocking_recv().unwrap();
            watched
                .told
                .extend(piece.split(|&byte| byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()));
        }
        for path in ["new/deep/file", "new/old/file", "new/file"] {
            watched.until(path);
        }
    }

    #[test]
    fn ends_with_its_directory() {
        type Ending = fn(&Path);
        let removed: Ending = |root| fs::remove_dir_all(root.join("a")).unwrap();
        let renamed: Ending = |root| fs::rename(root.join("a"), root.join("b")).unwrap();
        for ending in [removed, renamed] {
            let watched = tempfile::tempdir().unwrap();
            fs::create_dir_all(watched.path().join("a/sub")).unwrap();
            let tree = open(&watched.path().join("a"), true).unwrap();
            let (pieces, mut told) = mpsc::channel(8);
            let (gone, _host) = pipe_with(PipeFlags::CLOEXEC).unwrap();
            let thread = thread::spawn(move || tree.follow(&gone, &mut Lines { pieces, piece: Vec::new() }));
            ending(watched.path());
            while told.blocking_recv().is_some() {}
            assert!(thread.join().unwrap().is_ok());
        }
    }

    #[test]
    fn ends_with_its_host() {
        for stalled in [false, true] {
            let mut watched = Watched::new(true, |_| {});
            for n in 0..if stalled { 20_000 } else { 0 } {
                fs::write(watched.at(&n.to_string()), "").unwrap();
            }
            drop(watched.host.take());
            watched.pieces.close();
            assert!(matches!(watched.thread.join().unwrap(), Err(Abort::Gone)));
        }
    }

    #[test]
    fn changes_are_written_as_the_host_reads_them() {
        let golden: Value = serde_json::from_str(include_str!("../../../../test/golden/agent-frames.json")).unwrap();
        let frames = golden["valid"].as_array().unwrap();
        let wanted = frames.iter().find(|frame| frame["name"] == "data, changes").unwrap()["bytes"].as_str().unwrap();
        let (pieces, mut written) = mpsc::channel(1);
        let mut lines = Lines { pieces, piece: Vec::new() };
        for change in [
            Change::Created { path: Path::new("a/ä") },
            Change::Modified { path: Path::new("a/ä") },
            Change::Moved { from: Path::new("a"), path: Path::new("b") },
            Change::Removed { path: Path::new(OsStr::from_bytes(b"b/\xff\"")) },
            Change::Lost,
        ] {
            lines.push(&change).unwrap();
        }
        lines.flush().unwrap();
        let bytes = written.try_recv().unwrap();
        assert_eq!(bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>(), wanted);
    }

    #[test]
    fn refuses_what_is_no_directory() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("file"), "").unwrap();
        for (name, code, errno) in [("file", Code::Io, "ENOTDIR"), ("none", Code::NotFound, "ENOENT")] {
            let Err(Abort::Reply(refused)) = open(&directory.path().join(name), false) else { panic!("{name}") };
            assert_eq!((refused.code, refused.errno.as_deref()), (code, Some(errno)));
        }
        for (errno, limit) in [(libc::ENOSPC, "max_user_watches"), (libc::EMFILE, "max_user_instances")] {
            let Abort::Reply(refused) = failed(directory.path(), &io::Error::from_raw_os_error(errno)) else {
                panic!()
            };
            assert!(refused.code == Code::WatchLimit && refused.message.contains(limit), "{}", refused.message);
        }
    }
}
