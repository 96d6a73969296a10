//! Tests of the guest's memory and of the copies of a stopped VM.

// Clippy exempts test functions only, not what they call.
#![allow(clippy::unwrap_used)]

mod common;

use common::{PATIENCE, Shim, line, rest, start_with};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};
use tempfile::TempDir;

const PAGE: usize = 4096;
const PAGES: usize = 3000;

/// The directory in which a snapshot is made.
struct Making {
    home: TempDir,
}

impl Making {
    fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        std::fs::create_dir(home.path().join("snapshot")).unwrap();
        Making { home }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.home.path().join("snapshot").join(name)
    }

    fn is_there(&self) -> bool {
        self.path("").exists()
    }

    /// A request for memory and one file, to be undone by saying two lines and removing it all.
    fn request(&self) -> Value {
        std::fs::write(self.home.path().join("disk"), b"disk").unwrap();
        json!({
            "op": "capture", "memory": self.path("memory"),
            "files": [{"from": self.home.path().join("disk"), "to": self.path("disk")}],
            "undo": {"remove": [self.path("")], "socket": self.home.path().join("qmp.sock"), "lines": ["one", "two"]},
        })
    }

    fn listen(&self) -> UnixListener {
        UnixListener::bind(self.home.path().join("qmp.sock")).unwrap()
    }
}

/// A guest with new memory.
fn start_shared() -> Shim {
    let shim = start_with(&["serve", "--memory", "shared"], |plan| {
        plan["memory"] = json!({"fd": 5, "sizeBytes": PAGES * PAGE});
    });
    ready(shim)
}

/// A guest whose memory began as a file.
fn start_private(base: &Path) -> Shim {
    ready(start_with(&["serve", "--memory", "private"], |plan| plan["memory"] = json!({"fd": 5, "from": base})))
}

fn ready(shim: Shim) -> Shim {
    assert_eq!(shim.event()["event"], "started");
    shim.until(|shim| shim.status()["ready"] == true);
    shim
}

fn fill(shim: &Shim, pages: &[(u32, u8)]) {
    let mut memory = shim.dial(11);
    for (page, byte) in pages {
        memory.write_all(&[&page.to_be_bytes()[..], &[*byte]].concat()).unwrap();
        let mut answer = [0];
        memory.read_exact(&mut answer).unwrap();
        assert_eq!(answer, [*byte]);
    }
}

fn step(maker: &mut BufReader<UnixStream>, step: &str) -> Value {
    maker.get_mut().write_all(format!("{{\"step\":\"{step}\"}}\n").as_bytes()).unwrap();
    line(maker)
}

fn ok() -> Value {
    json!({"ok": true})
}

/// Plays a VMM's QMP to the shim: a greeting, and after each line an event and an answer. Returns what it was told.
fn qmp(listener: &UnixListener) -> Vec<String> {
    qmp_after(listener, "")
}

/// As `qmp`, with `stale` before the first answer.
fn qmp_after(listener: &UnixListener, stale: &str) -> Vec<String> {
    let (mut peer, _) = listener.accept().unwrap();
    peer.set_read_timeout(Some(PATIENCE)).unwrap();
    peer.write_all(b"{\"QMP\":{}}\n").unwrap();
    peer.write_all(stale.as_bytes()).unwrap();
    let mut told = Vec::new();
    for line in BufReader::new(peer.try_clone().unwrap()).lines() {
        told.push(line.unwrap());
        // The shim may not wait for the last answer.
        let _ = peer.write_all(b"{\"event\":\"RESUME\"}\n{\"return\":{}}\n");
    }
    told
}

#[test]
fn shared_memory_and_files() {
    let (shim, making) = (start_shared(), Making::new());
    fill(&shim, &[(0, 1), (7, 2), (2000, 3)]);
    let mut maker = shim.control(&making.request().to_string());
    assert_eq!(line(&mut maker), ok());
    // Writes of the guest until it is stopped count, and only their pages are written then.
    fill(&shim, &[(7, 9), (2999, 4)]);
    let copied = step(&mut maker, "copy");
    assert_eq!(copied, json!({"ok": true, "bytes": 2 * PAGE + 4}));
    assert_eq!(step(&mut maker, "commit"), ok());
    assert!(rest(&mut maker).is_empty());

    let mut expected = vec![0; PAGES * PAGE];
    for (page, byte) in [(0, 1), (7, 9), (2000, 3), (2999, 4)] {
        expected[page * PAGE..][..PAGE].fill(byte);
    }
    assert!(std::fs::read(making.path("memory")).unwrap() == expected);
    let metadata = making.path("memory").metadata().unwrap();
    assert_eq!(metadata.mode() & 0o777, 0o600);
    assert!(metadata.blocks() * 512 < 1 << 20, "{} blocks", metadata.blocks());
    assert_eq!(std::fs::read(making.path("disk")).unwrap(), b"disk");
    assert_eq!(shim.status()["ok"], true);
}

#[test]
fn private_memory_is_its_file_and_the_pages_over_it() {
    let making = Making::new();
    let base = making.home.path().join("base");
    let mut expected = vec![0; PAGES * PAGE];
    expected[..2500 * PAGE].fill(7);
    let file = File::create(&base).unwrap();
    file.write_all_at(&expected[..2500 * PAGE], 0).unwrap();
    file.set_len((PAGES * PAGE) as u64).unwrap();
    let shim = start_private(&base);

    fill(&shim, &[(1, 1), (2, 2), (2000, 0)]);
    let mut maker = shim.control(&making.request().to_string());
    assert_eq!(line(&mut maker), ok());
    fill(&shim, &[(2, 5), (2999, 6)]);
    assert_eq!(step(&mut maker, "copy"), json!({"ok": true, "bytes": 2 * PAGE + 4}));
    assert_eq!(step(&mut maker, "commit"), ok());

    assert!(std::fs::read(&base).unwrap() == expected, "the base has changed");
    for (page, byte) in [(1, 1), (2, 5), (2000, 0), (2999, 6)] {
        expected[page * PAGE..][..PAGE].fill(byte);
    }
    assert!(std::fs::read(making.path("memory")).unwrap() == expected);
    // As sparse as the base, which on tmpfs has no holes any more where the VMM has read zeros.
    let blocks = |file: &Path| file.metadata().unwrap().blocks() * 512;
    assert!(blocks(&making.path("memory")) < blocks(&base) + 100 * PAGE as u64);
}

#[test]
fn a_vm_without_memory_of_ours() {
    let (shim, making) = (ready(start_with(&["serve"], |_| ())), Making::new());
    let mut request = making.request();
    request["undo"]["socket"] = json!(null);
    let mut maker = shim.control(&request.to_string());
    assert_eq!(line(&mut maker)["code"], "EINVAL");
    assert!(rest(&mut maker).is_empty() && !making.is_there());

    let making = Making::new();
    let mut request = making.request();
    request["memory"] = json!(null);
    let mut maker = shim.control(&request.to_string());
    assert_eq!(line(&mut maker), ok());
    assert_eq!(step(&mut maker, "copy"), json!({"ok": true, "bytes": 4}));
    assert_eq!(step(&mut maker, "commit"), ok());
    assert!(making.path("disk").exists());
}

#[test]
fn a_maker_that_is_gone() {
    for steps in [0, 1] {
        let (shim, making) = (start_shared(), Making::new());
        let listener = making.listen();
        let mut maker = shim.control(&making.request().to_string());
        assert_eq!(line(&mut maker), ok());
        if steps == 1 {
            assert_eq!(step(&mut maker, "copy")["ok"], true);
            assert!(making.path("memory").exists());
        }
        drop(maker);
        assert_eq!(qmp(&listener), ["one", "two"]);
        shim.until(|_| !making.is_there());
    }
}

/// A machine's clock stands still with the machine, and only the shim is left to set it.
#[test]
fn a_guest_whose_maker_is_gone_is_given_the_time() {
    let (shim, making) = (start_shared(), Making::new());
    let listener = making.listen();
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis();
    let mut maker = shim.control(&making.request().to_string());
    assert_eq!(line(&mut maker), ok());
    drop(maker);
    assert_eq!(qmp(&listener), ["one", "two"]);
    shim.until(|_| !making.is_there());
    // A thread of the shim writes the log, so the line may come later than the guest's answer.
    let told = || {
        let printed = std::fs::read_to_string(shim.path("vmm.log")).unwrap();
        printed
            .split_inclusive('\n')
            .find_map(|line| Some(line.strip_prefix("clock: ")?.strip_suffix('\n')?.to_owned()))
    };
    shim.until(|_| told().is_some());
    let now_ms = serde_json::from_str::<Value>(&told().unwrap()).unwrap()["nowMs"].as_u64().unwrap();
    assert!(u128::from(now_ms) >= since);
}

/// QEMU may send the shim the answer to an earlier client's command, of any length.
#[test]
fn a_long_answer_to_another_client_does_not_leave_the_vm_stopped() {
    let (shim, making) = (start_shared(), Making::new());
    let listener = making.listen();
    let mut maker = shim.control(&making.request().to_string());
    assert_eq!(line(&mut maker), ok());
    drop(maker);
    assert_eq!(qmp_after(&listener, &format!("{}\n", "x".repeat(1 << 20))), ["one", "two"]);
    shim.until(|_| !making.is_there());
}

#[test]
fn a_maker_that_only_stops_talking() {
    let (shim, making) = (start_shared(), Making::new());
    let mut request = making.request();
    request["undo"]["lines"] = json!([]);
    let mut maker = shim.control(&request.to_string());
    assert_eq!(line(&mut maker), ok());
    maker.get_ref().shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(line(&mut maker)["ok"], false);
    // The connection ends when everything is undone.
    assert!(rest(&mut maker).is_empty() && !making.is_there());
}

#[test]
fn lines_that_are_not_answered() {
    let (shim, making) = (start_shared(), Making::new());
    let _listener = making.listen();
    let mut maker = shim.control(&making.request().to_string());
    assert_eq!(line(&mut maker), ok());
    let since = std::time::Instant::now();
    assert_eq!(step(&mut maker, "commit")["code"], "EINVAL");
    assert!(rest(&mut maker).is_empty() && !making.is_there());
    assert!(since.elapsed() < PATIENCE / 2);
}

#[test]
fn copies_that_cannot_be_made() {
    let shim = start_shared();
    let missing = |making: &Making| json!(making.path("missing/file"));
    let exists = |making: &Making| {
        std::fs::write(making.path("exists"), b"x").unwrap();
        json!(making.path("exists"))
    };
    // The copy of memory fails before the VM is stopped, that of files afterwards.
    for (prepared, code, to) in [
        (false, "ENOENT", &missing as &dyn Fn(&Making) -> Value),
        (false, "EEXIST", &exists),
        (true, "ENOENT", &missing),
        (true, "EEXIST", &exists),
    ] {
        let making = Making::new();
        let listener = making.listen();
        let mut request = making.request();
        let field = if prepared { &mut request["files"][0]["to"] } else { &mut request["memory"] };
        *field = to(&making);
        let mut maker = shim.control(&request.to_string());
        let mut answer = line(&mut maker);
        if prepared {
            assert_eq!(answer, ok());
            answer = step(&mut maker, "copy");
        }
        assert_eq!((&answer["ok"], &answer["code"]), (&json!(false), &json!(code)), "{answer}");
        assert_eq!(qmp(&listener), ["one", "two"]);
        assert!(rest(&mut maker).is_empty() && !making.is_there());
    }
}

#[test]
fn no_space_for_the_copies() {
    // In the first case memory alone is too large, while the VM still runs; in the second the disk is, once the VM is stopped.
    for (pages, disk, stopped) in [(1000, 4, false), (100, 2 << 20, true)] {
        let (shim, making) = (start_shared(), Making::new());
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"])
            .arg(making.path(""))
            .status()
            .is_ok_and(|status| status.success());
        if !mounted {
            eprintln!("skipped: no permission to mount");
            return;
        }
        fill(&shim, &(0..pages).map(|page| (page, 1)).collect::<Vec<_>>());
        let mut request = making.request();
        std::fs::write(request["files"][0]["from"].as_str().unwrap(), vec![1; disk]).unwrap();
        request["undo"] = json!({"remove": [making.path("memory"), making.path("disk")], "socket": null, "lines": []});
        let mut maker = shim.control(&request.to_string());
        let mut answer = line(&mut maker);
        if stopped {
            assert_eq!(answer, ok());
            answer = step(&mut maker, "copy");
        }
        let ended = rest(&mut maker).is_empty();
        let left = std::fs::read_dir(making.path("")).unwrap().count();
        std::process::Command::new("umount").arg("-l").arg(making.path("")).status().unwrap();
        assert_eq!((&answer["code"], ended, left), (&json!("ENOSPC"), true, 0));
    }
}

#[test]
fn one_at_a_time() {
    let (shim, first, second) = (start_shared(), Making::new(), Making::new());
    let mut maker = shim.control(&first.request().to_string());
    assert_eq!(line(&mut maker), ok());
    let mut refused = shim.control(&second.request().to_string());
    assert_eq!(line(&mut refused)["code"], "EBUSY");
    // A second capture undoes nothing, because the VM is stopped for the first.
    assert!(rest(&mut refused).is_empty() && second.is_there());
    assert_eq!(step(&mut maker, "copy")["ok"], true);
    assert_eq!(step(&mut maker, "commit"), ok());
    assert!(rest(&mut maker).is_empty());
    assert_eq!(line(&mut shim.control(&second.request().to_string())), ok());
}

#[test]
fn the_vm_ends_meanwhile() {
    for copied in [false, true] {
        let (mut shim, making) = (start_shared(), Making::new());
        let mut maker = shim.control(&making.request().to_string());
        assert_eq!(line(&mut maker), ok());
        if copied {
            assert_eq!(step(&mut maker, "copy")["ok"], true);
        }
        let mut killing = shim.control(r#"{"op":"kill"}"#);
        assert_eq!(line(&mut killing), ok());
        let event = shim.event();
        assert!(!making.is_there(), "exited means that nothing is left");
        assert_eq!(event["event"], "exited");
        assert_eq!(line(&mut maker)["code"], "ESRCH");
        shim.ended();
    }
}

#[test]
fn hostile_captures() {
    let (shim, making) = (start_shared(), Making::new());
    for change in [
        (|request| request["memory"] = json!("memory")) as fn(&mut Value),
        |request| request["undo"]["remove"] = json!(["/"]),
        |request| request["undo"]["remove"] = json!(["/tmp/../etc"]),
        |request| request["undo"]["lines"] = json!(["a\nb"]),
        |request| request["undo"] = json!(null),
        |request| request["files"] = json!([{"from": "/etc/passwd", "to": "x"}]),
    ] {
        let mut request = making.request();
        change(&mut request);
        let mut maker = shim.control(&request.to_string());
        assert_eq!(line(&mut maker)["ok"], false, "{request}");
        assert!(rest(&mut maker).is_empty() && making.is_there());
    }
    // A step that never ends.
    let mut maker = shim.control(&making.request().to_string());
    assert_eq!(line(&mut maker), ok());
    while maker.get_mut().write_all(&[b' '; 4096]).is_ok() {}
    shim.until(|_| !making.is_there());
}

#[test]
fn a_guest_that_was_running_is_running() {
    let shim = start_with(&["serve", "--quiet"], |plan| plan["channel"]["resume"] = json!(true));
    assert_eq!(shim.event()["event"], "started");
    assert_eq!((&shim.entry()["state"], &shim.status()["ready"]), (&json!("running"), &json!(true)));
}
