//! Tests of the watched tree.

use std::collections::BTreeSet;
use std::thread::{self, JoinHandle};

use serde_json::{Value, json};
use tempfile::TempDir;

use rustix::pipe::{PipeFlags, pipe_with};
use tokio::sync::mpsc;

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
        let thread = thread::spawn(move || tree.follow(&gone, &mut Lines::new(pieces)));
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
            self.told.extend(piece.split(|&byte| byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()));
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
    let bound: usize = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap().trim().parse().unwrap();
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
        watched.told.extend(piece.split(|&byte| byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()));
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
        let thread = thread::spawn(move || tree.follow(&gone, &mut Lines::new(pieces)));
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
fn refuses_what_is_no_directory() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("file"), "").unwrap();
    for (name, code, errno) in [("file", Code::Io, "ENOTDIR"), ("none", Code::NotFound, "ENOENT")] {
        let Err(Abort::Reply(refused)) = open(&directory.path().join(name), false) else { panic!("{name}") };
        assert_eq!((refused.code, refused.errno.as_deref()), (code, Some(errno)));
    }
    for (errno, limit) in [(libc::ENOSPC, "max_user_watches"), (libc::EMFILE, "max_user_instances")] {
        let Abort::Reply(refused) = failed(directory.path(), &io::Error::from_raw_os_error(errno)) else { panic!() };
        assert!(refused.code == Code::WatchLimit && refused.message.contains(limit), "{}", refused.message);
    }
}
