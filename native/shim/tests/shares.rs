//! Tests of what a VMM sees of the host's directories. They run in a mount namespace of their own, so that the host's stays as it is.

// Clippy exempts test functions only, not what they call.
#![allow(clippy::unwrap_used)]

mod common;

use common::{SHIM, Shim, start_as};
use serde_json::json;
use std::path::Path;
use std::process::Command;

/// A shim in a namespace whose mounts are shared, as those of a host with systemd are. `None`: this needs root.
fn start_apart(shared: &Path, read_only: bool, vmm: &str) -> Option<Shim> {
    let mut apart = Command::new("unshare");
    let early =
        "mount --make-rshared / && cd \"$1\" && mount -t tmpfs early early && mknod early/null c 1 3 && exec \"$0\"";
    apart.args(["--mount", "--propagation", "private", "sh", "-c", early, SHIM]).arg(shared);
    let can = Command::new("unshare").args(["--mount", "--propagation", "private", "true"]).status();
    if !can.is_ok_and(|status| status.success()) {
        eprintln!("skipped: no permission to make a mount namespace");
        return None;
    }
    let shim = start_as(apart, &[], |plan| {
        let root = format!("{}/shares", plan["dir"].as_str().unwrap());
        let vmm = format!("cd {root}/share; {vmm}");
        plan["shares"] = json!({"root": root, "parts": [{"name": "share", "path": shared, "readOnly": read_only}]});
        plan["vmm"]["argv"] = json!(["sh", "-c", vmm]);
    });
    Some(shim)
}

/// Runs a command in the shim's mount namespace.
fn on_the_host(shim: &Shim, what: &str) {
    let target = shim.child.id().to_string();
    let done =
        Command::new("nsenter").args(["--mount", "--root", "--target", &target, "sh", "-ec", what]).status().unwrap();
    assert!(done.success(), "{what}");
}

/// What a VMM does once the test has written to `go.fifo`, with what the host has mounted at `late` by then. `early` was mounted before.
const TRY: &str = "read go < go.fifo
    for place in . late early; do
        (echo x > $place/written) 2>/dev/null && echo wrote $place >&4
        [ -c $place/null ] && (echo x > $place/null) 2>/dev/null && echo used the device in $place >&4
    done
    ls late >&4; echo done >&4";

fn tried(read_only: bool) -> Option<Vec<String>> {
    let host = tempfile::tempdir().unwrap();
    let path = |name: &str| host.path().join(name);
    for name in ["late", "early"] {
        std::fs::create_dir(path(name)).unwrap();
    }
    rustix::fs::mkfifoat(rustix::fs::CWD, path("go.fifo"), rustix::fs::Mode::RWXU).unwrap();
    let mut shim = start_apart(host.path(), read_only, TRY)?;
    assert_eq!(shim.event()["event"], "started");
    let late = path("late").display().to_string();
    on_the_host(&shim, &format!("mount -t tmpfs late {late}; mknod {late}/null c 1 3; echo secret > {late}/secret"));
    std::fs::write(path("go.fifo"), "go\n").unwrap();
    let exit = shim.exited();
    Some(exit["consoleTail"].as_str().unwrap().lines().map(str::to_owned).collect())
}

#[test]
fn what_the_host_mounts_later_is_not_writable_through_a_read_only_share() {
    // Nor is anything of it there: the directory below it is.
    let Some(seen) = tried(true) else { return };
    assert_eq!(seen, ["done"]);
}

#[test]
fn no_device_works_that_the_host_mounts_later() {
    let Some(seen) = tried(false) else { return };
    // What is written below `late` goes to the directory that was there before.
    assert_eq!(seen, ["wrote .", "wrote late", "wrote early", "written", "done"]);
}
