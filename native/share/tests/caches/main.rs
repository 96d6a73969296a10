//! What the host, or another VM's server, changes is seen by the guest, which believes what it knows until then.

#![allow(clippy::unwrap_used, reason = "a test ends where something fails")]

mod guest;
mod other;

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use machinen_share::abi::opcode;

use guest::{Guest, MEMORY, directory, missing};
use other::Other;

const USERS: [u32; 2] = [0, 1000];

const OPEN: usize = opcode::OPEN as usize;
const STATFS: usize = opcode::STATFS as usize;
const RELEASE: usize = opcode::RELEASE as usize;
const FLUSH: usize = opcode::FLUSH as usize;

/// Each test is for the server of root and of an ordinary user, in a thread of its own, which has a mount namespace.
fn with_guests(test: fn(&Guest)) {
    with_guests_in(&std::env::temp_dir(), test);
}

fn with_guests_in(within: &Path, test: fn(&Guest)) {
    if let Some(why) = missing() {
        println!("skipped: {why}");
        return;
    }
    for user in USERS {
        let dir = directory(within);
        let guest = move || test(&Guest::new(dir.path(), user));
        std::thread::spawn(guest).join().unwrap_or_else(|_| panic!("as user {user}"));
    }
}

#[test]
fn bytes_sizes_and_modes() {
    with_guests(|guest| {
        guest.on_host("echo before > file; chmod 644 file; mkdir dir; echo one > dir/deep");
        let file = guest.share.join("file");
        assert_eq!(fs::read_to_string(&file).unwrap(), "before\n");
        let open = fs::File::open(&file).unwrap();
        guest.on_host("printf 'bEfore\n' | dd of=file conv=notrunc status=none");
        guest.sees("bytes", || fs::read_to_string(&file).unwrap() == "bEfore\n");
        guest.sees("bytes of an open file", || {
            let mut bytes = [0; 7];
            open.read_exact_at(&mut bytes, 0).unwrap();
            bytes == *b"bEfore\n"
        });
        guest.on_host("echo more >> file");
        guest.sees("a size", || fs::metadata(&file).unwrap().len() == 12);
        guest.on_host("chmod 600 file");
        guest.sees("a mode", || fs::metadata(&file).unwrap().permissions().mode() & 0o777 == 0o600);
        guest.on_host("chmod 700 dir");
        guest.sees("a directory's mode", || {
            fs::metadata(guest.share.join("dir")).unwrap().permissions().mode() & 0o777 == 0o700
        });
    });
}

#[test]
fn names() {
    with_guests(|guest| {
        guest.on_host("echo one > one; echo two > two; mkdir -p from/deep to; echo x > from/deep/x");
        let path = |name: &str| guest.share.join(name);
        let is_absent = |name: &str| fs::metadata(path(name)).is_err_and(|error| error.kind() == ErrorKind::NotFound);
        let names = || {
            let mut names: Vec<_> =
                fs::read_dir(&guest.share).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            names
        };
        assert!(is_absent("new"));
        assert_eq!(names(), ["from", "one", "to", "two"]);
        assert_eq!(fs::read_to_string(path("one")).unwrap(), "one\n");
        guest.on_host("echo new > new");
        guest.sees("a new file that was looked for before", || {
            fs::read_to_string(path("new")).is_ok_and(|text| text == "new\n")
        });
        guest.sees("a new file in a list", || names().len() == 5);
        guest.on_host("mv one renamed");
        guest.sees("a renamed file", || is_absent("one") && fs::read_to_string(path("renamed")).is_ok());
        guest.on_host("mv two renamed");
        guest.sees("a replaced file", || fs::read_to_string(path("renamed")).unwrap() == "two\n" && is_absent("two"));
        guest.on_host("rm renamed");
        guest.sees("a removed file", || is_absent("renamed"));
        assert_eq!(fs::read_to_string(path("from/deep/x")).unwrap(), "x\n");
        guest.on_host("mv from to/moved");
        guest.sees("a moved directory", || {
            is_absent("from/deep/x") && fs::read_to_string(path("to/moved/deep/x")).is_ok()
        });
        guest.on_host("echo y > to/moved/deep/x");
        guest.sees("a file in a moved directory", || fs::read_to_string(path("to/moved/deep/x")).unwrap() == "y\n");
    });
}

#[test]
fn files_that_lost_their_name_or_have_several() {
    with_guests(|guest| {
        guest.on_host(
            "mkdir known elsewhere; echo 1 > known/moves; echo 1 > known/twice; ln known/twice elsewhere/twice",
        );
        let moves = fs::File::open(guest.share.join("known/moves")).unwrap();
        let twice = guest.share.join("known/twice");
        assert_eq!((moves.metadata().unwrap().len(), fs::metadata(&twice).unwrap().len()), (2, 2));
        guest.on_host("echo 22 > elsewhere/twice");
        guest.sees("a change by another name", || fs::read_to_string(&twice).unwrap() == "22\n");
        guest.on_host("mv known/moves elsewhere/moved");
        guest.sees("a move out of sight", || fs::metadata(guest.share.join("known/moves")).is_err());
        guest.on_host("echo 333 > elsewhere/moved");
        guest.sees("a change after it", || moves.metadata().unwrap().len() == 4);
        guest.on_host("rm elsewhere/twice");
        guest.sees("one name less", || fs::metadata(&twice).unwrap().nlink() == 1);
    });
}

#[test]
fn a_mapping_of_the_host_is_seen_when_it_ends() {
    with_guests(|guest| {
        guest.on_host("printf 0123456789 > file");
        let file = guest.share.join("file");
        assert_eq!(fs::read_to_string(&file).unwrap(), "0123456789");
        guest.on_host(
            "python3 -c 'import mmap; f = open(\"file\", \"r+b\"); m = mmap.mmap(f.fileno(), 0); m[0:3] = b\"abc\"'",
        );
        guest.sees("a mapping", || fs::read_to_string(&file).unwrap() == "abc3456789");
    });
}

#[test]
fn two_machines_with_one_directory() {
    with_guests(|guest| {
        let mut other = Other::new(&guest.host);
        let file = guest.share.join("file");
        assert!(fs::metadata(&file).is_err());
        assert_eq!(other.does("test -e file || echo none"), "none");
        guest.in_guest("echo one > file; mkdir dir");
        guest.sees("a file of the first machine in the other", || {
            other.does("cat file dir/none 2>/dev/null || :") == "one"
        });
        other.does("echo two > file; echo x > dir/new; mv file renamed");
        guest.sees("what the other machine did", || {
            fs::metadata(&file).is_err()
                && fs::read_to_string(guest.share.join("renamed")).is_ok_and(|text| text == "two\n")
                && guest.share.join("dir/new").exists()
        });
    });
}

/// The other machine, whose server must be another process: this test binary again, for this test alone.
#[test]
#[ignore = "only as the other process of two_machines_with_one_directory"]
fn other_machine() {
    let guest = Guest::new(std::env::var_os("DIRECTORY").unwrap().as_ref(), 0);
    for line in std::io::stdin().lines() {
        println!("\nanswer:{}", guest.in_guest(&line.unwrap()).trim());
    }
}

#[test]
fn more_changes_than_events_can_wait() {
    with_guests_in(Path::new(MEMORY), |guest| {
        let most: usize =
            fs::read_to_string("/proc/sys/fs/fanotify/max_queued_events").unwrap().trim().parse().unwrap();
        let count = most + 1000;
        guest.on_host(&format!("mkdir many; cd many; seq {count} | xargs touch"));
        let many = guest.share.join("many");
        let sizes =
            || fs::read_dir(&many).unwrap().map(|entry| entry.unwrap().metadata().map_or(0, |found| found.len()));
        assert_eq!((sizes().count(), sizes().sum()), (count, 0));
        assert!(fs::metadata(many.join("late")).is_err());
        // Not by a list, which brings attributes along.
        let sizes = |n: std::ops::RangeInclusive<usize>| {
            n.filter_map(|n| fs::metadata(many.join(n.to_string())).ok()).map(|found| found.len())
        };
        // Those whose events are lost; the server may have let go of them for others.
        let last = count - 500..=count;
        guest.sees("that the last are known", || {
            guest.requests();
            sizes(last.clone()).count() == 501 && guest.requests().is_empty()
        });
        let held = guest.hold_notices();
        guest.on_host(&format!(
            "cd many; for n in $(seq {count}); do echo x > $n; done; seq 500 | xargs rm; touch late"
        ));
        assert_eq!(sizes(last).sum::<u64>(), 0, "notices were taken");
        drop(held);
        guest.sees("a flood", || sizes(501..=count).all(|size| size == 2) && many.join("late").exists());
        assert_eq!((sizes(1..=500).count(), sizes(501..=count).count()), (0, count - 500));
    });
}

#[test]
fn what_is_known_costs_no_request() {
    with_guests(|guest| {
        guest.on_host(
            "for d in a b c; do mkdir $d; for f in $(seq 50); do echo $d$f > $d/$f; done; ln -s 1 $d/link; done",
        );
        let all = "find . -ls > /dev/null; cat a/link; ! test -e a/absent; find . -ls";
        let first = guest.in_guest(all);
        guest.in_guest(all);
        guest.requests();
        assert_eq!(guest.in_guest(all).lines().count(), first.lines().count());
        let costs = guest.requests();
        println!("requests by opcode: {costs:?}");
        // The file is opened and closed, and `find` asks for the file system's kind. Nothing is looked up or read.
        assert!(costs.keys().all(|opcode| [OPEN, STATFS, RELEASE, FLUSH].contains(opcode)), "{costs:?}");
        assert_eq!(costs[&OPEN], 1);
    });
}

/// Ends the threads of a test, also of one that fails.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What is under way when something changes must not be believed afterwards.
#[test]
fn changes_are_seen_while_everything_is_being_looked_at() {
    with_guests(|guest| {
        guest.on_host("mkdir dir; echo 0 > dir/written; echo 0 > dir/replaced; echo 0 > dir/moves0");
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let _end = End(&over);
            for _ in 0..3 {
                scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        for entry in fs::read_dir(guest.share.join("dir")).unwrap() {
                            // It may be gone by now.
                            let _ = fs::read(entry.unwrap().path());
                        }
                        let _ = fs::metadata(guest.share.join("dir/moves0"));
                    }
                });
            }
            let change = "echo $n > dir/written; echo $n > dir/new; mv dir/new dir/replaced; mv dir/moves* dir/moves$n";
            for n in 1..=100 {
                guest.on_host(&format!("n={n}; {change}"));
                let text = format!("{n}\n");
                let dir = guest.share.join("dir");
                guest.sees(&format!("change {n}"), || {
                    ["written", "replaced"].iter().all(|name| fs::read(dir.join(name)).unwrap() == text.as_bytes())
                        && dir.join(format!("moves{n}")).exists()
                        && !dir.join(format!("moves{}", n - 1)).exists()
                        && !dir.join("new").exists()
                        && fs::read_dir(&dir).unwrap().count() == 3
                });
            }
        });
    });
}

#[test]
#[ignore = "prints figures"]
fn figures() {
    let dir = directory(Path::new(MEMORY));
    let make = "for d in $(seq 40); do mkdir $d; for f in $(seq 25); do head -c 5000 /dev/zero > $d/$f; done; done;
        git init -q .; git -c user.name=x -c user.email=x add .; git -c user.name=x -c user.email=x commit -qm x";
    let operations = [
        ("find", "find . -path ./.git -prune -o -ls > /dev/null"),
        ("git status", "git -c safe.directory='*' status --short"),
        ("tar", "tar cf /dev/zero --exclude .git ."),
        ("read all", "cat */* > /dev/null"),
    ];
    Command::new("sh").args(["-ec", make]).current_dir(dir.path()).status().unwrap();
    for valid in [Duration::ZERO, Duration::from_secs(3600)] {
        let path = dir.path().to_owned();
        let measure = move || {
            let guest = Guest::valid_for(&path, 0, valid);
            for (name, command) in operations {
                for turn in ["first", "second", "third"] {
                    guest.requests();
                    let start = Instant::now();
                    guest.in_guest(command);
                    let (took, costs) = (start.elapsed(), guest.requests());
                    println!("{valid:?} {name} {turn}: {} requests, {took:?}: {costs:?}", costs.values().sum::<u64>());
                }
            }
        };
        std::thread::spawn(measure).join().unwrap();
    }
}
