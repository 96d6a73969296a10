//! Tests of the start: from the plan to `started`, or to `failed` with nothing left.

// Clippy exempts test functions only, not what they call.
#![allow(clippy::unwrap_used)]

mod common;

use common::{PATIENCE, fake_vmm, plan, spawn, start, start_with};
use rustix::process::Signal;
use serde_json::json;
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};

#[test]
fn an_owner_that_goes_before_the_plan_is_complete_changes_nothing() {
    for sent in ["", "{\"version\":1"] {
        let mut shim = spawn(tempfile::tempdir().unwrap());
        shim.send(sent);
        shim.stdin = None;
        assert!(shim.ended().success());
    }
}

#[test]
fn hostile_plans_are_refused() {
    let deep = "[".repeat(100_000);
    let long = " ".repeat(5 << 20);
    for text in ["\n", "null\n", "{}\n", "\u{0}\n", &format!("{deep}\n"), &long] {
        let mut shim = spawn(tempfile::tempdir().unwrap());
        shim.send(text);
        assert_eq!(shim.failed()["step"], "plan");
    }
}

#[test]
fn paths_that_could_remove_too_much_are_refused() {
    for dir in ["/", "/tmp/../", "vm", ""] {
        let mut shim = start_with(&["serve"], |plan| plan["dir"] = json!(dir));
        assert_eq!(shim.failed()["step"], "plan");
        assert!(shim.path("").exists());
    }
}

#[test]
fn identities_and_entry() {
    let shim = start_with(&["serve", "--quiet"], |_| ());
    let started = shim.event();
    assert_eq!(started["shim"]["pid"], shim.child.id());
    assert!(started["vmm"]["startTime"].as_u64() >= started["shim"]["startTime"].as_u64());
    let entry = shim.entry();
    assert_eq!((&entry["shim"], &entry["vmm"]), (&started["shim"], &started["vmm"]));
    assert_eq!((&entry["state"], &entry["id"]), (&json!("booting"), &json!("test")));
    assert_eq!(shim.path("control.sock").metadata().unwrap().permissions().mode() & 0o077, 0);
}

#[test]
fn a_vmm_that_is_not_there() {
    let mut shim = start_with(&[], |plan| plan["vmm"]["argv"] = json!(["machinen-no-such-vmm"]));
    let failed = shim.failed();
    assert_eq!((&failed["step"], &failed["code"]), (&json!("vmm"), &json!("ENOENT")));
    shim.assert_nothing_left();
}

#[test]
fn a_vmm_that_may_not_be_run() {
    let mut shim = start_with(&[], |plan| plan["vmm"]["argv"] = json!(["/etc/passwd"]));
    let failed = shim.failed();
    assert_eq!((&failed["step"], &failed["code"]), (&json!("vmm"), &json!("EACCES")));
    shim.assert_nothing_left();
}

#[test]
fn an_entry_that_cannot_be_written() {
    let mut shim = start_with(&["serve"], |plan| plan["entryPath"] = json!("/proc/nowhere/entry.json"));
    let failed = shim.failed();
    assert_eq!((&failed["step"], &failed["code"]), (&json!("registry"), &json!("ENOENT")));
    shim.assert_nothing_left();
}

#[test]
fn a_socket_path_that_is_too_long() {
    let mut shim = start_with(&["serve"], |plan| plan["controlPath"] = json!(format!("/tmp/{}", "x".repeat(200))));
    assert_eq!(shim.failed()["step"], "registry");
    shim.assert_nothing_left();
}

#[test]
fn the_vmm_gets_its_descriptors_and_no_others() {
    // Numbers that the shim uses itself, and that clash with each other's sources.
    for (channel, console) in [(3, 4), (4, 3), (9, 3), (7, 8), (200, 100)] {
        let mut shim = start_with(&["inspect", &console.to_string()], |plan| {
            plan["channel"]["fd"] = json!(channel);
            plan["console"]["fd"] = json!(console);
        });
        assert_eq!(shim.event()["event"], "started");
        let exit = shim.exited();
        let seen: serde_json::Value = serde_json::from_str(exit["consoleTail"].as_str().unwrap()).unwrap();
        let mut expected = vec![0, 1, 2, channel, console];
        expected.sort_unstable();
        assert_eq!(seen["fds"], json!(expected));
        assert_eq!(seen["variables"], json!(["FROM_PLAN", "PATH"]));
        assert_eq!(seen["leadsItsGroup"], true);
        assert_eq!((&seen["noNewPrivileges"], &seen["core"]), (&json!("1"), &json!(0)));
        // The shim catches these signals instead of ignoring them, so the VMM inherits no ignored signal.
        let ignored = u64::from_str_radix(seen["ignored"].as_str().unwrap(), 16).unwrap();
        let bit = |signal: Signal| 1 << (signal.as_raw() - 1);
        assert_eq!(ignored & (bit(Signal::HUP) | bit(Signal::INT) | bit(Signal::TERM)), 0);
    }
}

#[test]
fn files_are_copied_before_the_vmm_starts() {
    let source = tempfile::tempdir().unwrap();
    let template = std::fs::File::create(source.path().join("template")).unwrap();
    template.write_all_at(b"head", 0).unwrap();
    template.write_all_at(b"middle", 500 << 20).unwrap();
    template.set_len(1 << 30).unwrap();
    let shim = start_with(&["serve"], |plan| {
        let to = format!("{}/upper.img", plan["dir"].as_str().unwrap());
        plan["files"] = json!([{"from": source.path().join("template"), "to": to, "size": 4u64 << 30}]);
    });
    assert_eq!(shim.event()["event"], "started");
    let copy = std::fs::File::open(shim.path("upper.img")).unwrap();
    let metadata = copy.metadata().unwrap();
    assert_eq!((metadata.len(), metadata.mode() & 0o777), (4 << 30, 0o600));
    assert!(metadata.blocks() * 512 < 1 << 20);
    let mut read = [0; 6];
    copy.read_exact_at(&mut read, 500 << 20).unwrap();
    assert_eq!(&read, b"middle");
}

/// A filesystem of one megabyte. Needs root, as mounting does.
struct Tiny(tempfile::TempDir);

impl Tiny {
    fn mount() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"])
            .arg(dir.path())
            .status()
            .is_ok_and(|status| status.success());
        mounted.then_some(Tiny(dir))
    }
}

impl Drop for Tiny {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[test]
fn no_space_for_the_files() {
    let Some(tiny) = Tiny::mount() else {
        eprintln!("skipped: no permission to mount");
        return;
    };
    let source = tempfile::tempdir().unwrap();
    std::fs::write(source.path().join("small"), b"x").unwrap();
    std::fs::write(source.path().join("large"), vec![1; 3 << 20]).unwrap();
    let vm = tiny.0.path().join("vm");
    std::fs::create_dir(&vm).unwrap();
    let mut shim = start_with(&["serve"], |plan| {
        plan["dir"] = json!(vm);
        plan["cleanup"] = json!([plan["outputLogPath"].as_str().unwrap().replace("/output.log", "")]);
        plan["files"] = json!([
            {"from": source.path().join("small"), "to": tiny.0.path().join("outside")},
            {"from": source.path().join("large"), "to": vm.join("large")},
        ]);
    });
    let failed = shim.failed();
    assert_eq!((&failed["step"], &failed["code"]), (&json!("files"), &json!("ENOSPC")));
    assert_eq!(std::fs::read_dir(tiny.0.path()).unwrap().count(), 0);
}

#[test]
fn a_full_disk_does_not_stop_the_guest() {
    let Some(tiny) = Tiny::mount() else {
        eprintln!("skipped: no permission to mount");
        return;
    };
    let log = tiny.0.path().join("console.log");
    let mut shim = start_with(&[], |plan| {
        plan["console"] = json!({"fd": 4, "logPath": log, "maxBytes": 100 << 20});
        plan["vmm"]["argv"] = json!(["sh", "-c", "head -c 20000000 /dev/zero | tr '\\0' x >&4; echo the end >&4"]);
    });
    assert_eq!(shim.event()["event"], "started");
    let exit = shim.exited();
    assert_eq!(exit["vmm"]["code"], 0);
    assert!(exit["consoleTail"].as_str().unwrap().ends_with("xxxthe end\n"));
}

#[test]
fn an_owner_that_goes_during_the_copies() {
    // Large enough that the owner's end is noticed on the way, wherever blocks cannot be shared; both ends are orderly.
    let source = tempfile::tempdir().unwrap();
    std::fs::write(source.path().join("large"), vec![1; 64 << 20]).unwrap();
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut shim = start_with(&["mute"], |plan| {
        plan["cleanup"] = json!([memory.path().join("copy")]);
        plan["files"] = json!([{"from": source.path().join("large"), "to": memory.path().join("copy")}]);
    });
    shim.stdin = None;
    let event = shim.event();
    if event["event"] == "started" {
        assert_eq!(shim.event()["exit"]["reason"], "owner-lost");
    } else {
        assert_eq!(event["code"], "ECANCELED");
    }
    shim.ended();
    shim.assert_nothing_left();
    assert_eq!(std::fs::read_dir(memory.path()).unwrap().count(), 0);
}

#[test]
fn a_reader_that_is_gone_is_no_error() {
    let home = tempfile::tempdir().unwrap();
    let plan = plan(home.path(), &[&fake_vmm(), "serve"]);
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_machinen-shim"))
        .stdin(std::process::Stdio::piped())
        .stdout(writer)
        .spawn()
        .unwrap();
    child.stdin.as_mut().unwrap().write_all(format!("{plan}\n").as_bytes()).unwrap();
    let since = std::time::Instant::now();
    while !home.path().join("entry.json").exists() {
        assert!(since.elapsed() < PATIENCE && child.try_wait().unwrap().is_none());
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());
    assert!(!home.path().join("vm").exists() && home.path().join("exit.json").exists());
}

#[test]
fn it_is_small() {
    let shim = start(&["serve"]);
    let status = std::fs::read_to_string(format!("/proc/{}/status", shim.child.id())).unwrap();
    let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let kib: u64 = rss.trim().trim_end_matches(" kB").parse().unwrap();
    // Debug builds are several times larger.
    assert!(kib < 5 * 1024 * if cfg!(debug_assertions) { 3 } else { 1 }, "{kib} KiB");
}

/// A forwarded port as the plan has it, served by something that is never started.
fn forward(host: &str) -> serde_json::Value {
    json!({"fd": 7, "gvproxy": {"argv": ["machinen-no-such-gvproxy"], "env": {}}, "forwards": [{"host": host, "guestPort": 80}]})
}

#[test]
fn a_forwarded_port_that_is_taken() {
    let holder = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = holder.local_addr().unwrap().to_string();
    let mut shim = start_with(&["serve"], |plan| plan["network"] = forward(&address));
    let failed = shim.failed();
    assert_eq!((&failed["step"], &failed["code"]), (&json!("network"), &json!("EADDRINUSE")));
    assert!(failed["message"].as_str().unwrap().contains(&address));
    shim.assert_nothing_left();
}

#[test]
fn an_address_the_host_does_not_have() {
    let mut shim = start_with(&["serve"], |plan| plan["network"] = forward("203.0.113.1:8080"));
    let failed = shim.failed();
    assert_eq!((&failed["step"], &failed["code"]), (&json!("network"), &json!("EADDRNOTAVAIL")));
    shim.assert_nothing_left();
}

#[test]
fn a_network_whose_program_cannot_be_started_is_reported_as_down() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let shim = start_with(&["serve", "--quiet"], |plan| plan["network"] = forward(&free.to_string()));
    assert_eq!(shim.event()["event"], "started");
    let console = || std::fs::read_to_string(shim.path("console.log")).unwrap();
    assert!(!console().contains("network"), "it is not started before it is needed");
    let mut client = std::net::TcpStream::connect(free).unwrap();
    shim.until(|_| console().contains("The network is down; next try in 250 ms"));
    // A connection that nothing serves is closed.
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    assert!(matches!(client.read(&mut [0]), Ok(0) | Err(_)));
}

/// A plan's network served by a script.
fn served_by(script: &std::path::Path, host: std::net::SocketAddr) -> serde_json::Value {
    json!({"fd": 7, "gvproxy": {"argv": ["sh", script], "env": {}}, "forwards": [{"host": host, "guestPort": 80}]})
}

#[test]
fn a_network_that_could_not_be_started_is_once_it_can() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (script, marker) = (dir.path().join("gvproxy"), dir.path().join("served"));
    let shim = start_with(&["serve", "--quiet"], |plan| {
        plan["network"] = served_by(&script, free);
        plan["network"]["gvproxy"]["argv"] = json!([script]);
    });
    assert_eq!(shim.event()["event"], "started");
    let console = || std::fs::read_to_string(shim.path("console.log")).unwrap();
    shim.until(|_| {
        let _ = std::net::TcpStream::connect(free);
        console().contains("next try in 500 ms")
    });
    let text = format!("#!/bin/sh\necho x > {}\nexec cat <&3\n", marker.display());
    std::fs::write(dir.path().join("new"), text).unwrap();
    std::fs::set_permissions(dir.path().join("new"), std::fs::Permissions::from_mode(0o700)).unwrap();
    std::fs::rename(dir.path().join("new"), &script).unwrap();
    shim.until(|_| {
        let _ = std::net::TcpStream::connect(free);
        marker.exists()
    });
}

#[test]
fn a_network_that_ends_again_and_again_is_started_ever_more_seldom() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("gvproxy");
    std::fs::write(&script, format!("echo x >> {}/runs; echo 'no good' >&2; exit 7\n", dir.path().display())).unwrap();
    let mut shim = start_with(&["serve", "--quiet"], |plan| plan["network"] = served_by(&script, free));
    assert_eq!(shim.event()["event"], "started");
    let console = || std::fs::read_to_string(shim.path("console.log")).unwrap();
    let since = std::time::Instant::now();
    shim.until(|_| {
        let _ = std::net::TcpStream::connect(free);
        console().contains("next try in 2000 ms")
    });
    assert!(since.elapsed() >= std::time::Duration::from_millis(1500));
    // One run at the start, one that replaced it at once, and one after each pause.
    assert_eq!(std::fs::read_to_string(dir.path().join("runs")).unwrap().lines().count(), 4);
    assert!(
        console()
            .contains("gvproxy ended with code 7: connections through it are lost, new ones are served by another")
    );
    shim.stdin = None;
    assert_eq!(shim.exited()["vmmLogTail"].as_str().unwrap().matches("no good").count(), 4);
}

#[test]
fn what_a_vmm_prints_is_limited() {
    let mut shim = start_with(&[], |plan| {
        plan["console"]["maxBytes"] = json!(100_000);
        plan["vmm"]["argv"] =
            json!(["sh", "-c", "yes | head -c 900000 >&2; echo the end >&2; echo printed >&4; sleep 1000"]);
    });
    assert_eq!(shim.event()["event"], "started");
    shim.until(|shim| std::fs::read_to_string(shim.path("console.log")).unwrap() == "printed\n");
    shim.until(|shim| std::fs::read_to_string(shim.path("vmm.log")).is_ok_and(|text| text.ends_with("the end\n")));
    for name in ["vmm.log", "vmm.log.1"] {
        assert!(std::fs::metadata(shim.path(name)).unwrap().len() <= 100_000);
    }
    shim.signal(Signal::TERM);
    assert!(shim.exited()["vmmLogTail"].as_str().unwrap().ends_with("y\nthe end\n"));
}

#[test]
fn a_disk_that_takes_no_logs_holds_up_no_client() {
    // A fifo whose reader does not read.
    let mut shim = start_with(&[], |plan| {
        let log = plan["console"]["logPath"].as_str().unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, log, rustix::fs::Mode::RWXU).unwrap();
        plan["console"]["maxBytes"] = json!(1_u64 << 40);
        let vmm = format!("yes | head -c 4000000 >&4; exec {} serve", fake_vmm());
        plan["vmm"]["argv"] = json!(["sh", "-c", vmm]);
    });
    assert_eq!(shim.event()["event"], "started");
    shim.until(|shim| shim.status()["ready"] == true);
    let mut guest = shim.dial(7);
    guest.write_all(b"hello").unwrap();
    let mut echo = [0; 5];
    guest.read_exact(&mut echo).unwrap();
    assert_eq!(&echo, b"hello");
    // The disk goes on: all that waited for it is written before the end.
    let mut log = std::fs::File::open(shim.path("console.log")).unwrap();
    let written = std::thread::spawn(move || {
        let mut text = Vec::new();
        log.read_to_end(&mut text).unwrap();
        String::from_utf8_lossy(&text).into_owned()
    });
    shim.signal(Signal::TERM);
    shim.exited();
    assert!(written.join().unwrap().contains("bytes are missing here: the disk was too slow for them"));
}
