//! Two control groups: the agent's own and the commands', so that commands can be frozen, killed, counted and limited as one.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::OnceLock;

use super::root::make_directory;

/// The agent.
const SYSTEM: &str = "/sys/fs/cgroup/system";
/// Every command.
pub const WORKLOAD: &str = "/sys/fs/cgroup/workload";
/// What the commands' group says of itself; a change is an exceptional condition (`POLLPRI`) of the file.
pub const EVENTS: &str = "/sys/fs/cgroup/workload/cgroup.events";

/// Makes both groups and puts this process into `system`. No controller is turned on: freezing, killing and counting processes need
/// none, and each costs every boot some milliseconds. Who wants limits turns on what they need.
pub fn set_up() -> io::Result<()> {
    make_directory(SYSTEM, 0o755)?;
    make_directory(WORKLOAD, 0o755)?;
    fs::write(format!("{SYSTEM}/cgroup.procs"), "0")
}

/// Processes killed for want of memory since boot, by the kernel's own count (proc(5), /proc/vmstat).
pub fn oom_kills() -> io::Result<u64> {
    static VMSTAT: OnceLock<File> = OnceLock::new();
    let file = open_once(&VMSTAT, || File::open("/proc/vmstat"))?;
    let (mut text, mut length) = (vec![0; 16 * 1024], 0);
    loop {
        match file.read_at(&mut text[length..], length as u64)? {
            0 => return Ok(oom_kills_in(&String::from_utf8_lossy(&text[..length]))),
            n => length += n,
        }
    }
}

/// Files used for every command and in every copy stay open: in a machine that has just been restored each way into the kernel is slow
/// for the first time, and looking a file up is a long one.
pub fn open_once(once: &'static OnceLock<File>, open: impl FnOnce() -> io::Result<File>) -> io::Result<&'static File> {
    if let Some(file) = once.get() {
        return Ok(file);
    }
    let file = open()?;
    Ok(once.get_or_init(|| file))
}

fn oom_kills_in(vmstat: &str) -> u64 {
    let count = vmstat.lines().find_map(|line| line.strip_prefix("oom_kill "));
    count.and_then(|count| count.trim_end().parse().ok()).unwrap_or(0)
}

/// How many processes the commands are.
pub fn processes() -> io::Result<u64> {
    let pids = fs::read_to_string(format!("{WORKLOAD}/cgroup.procs"))?;
    Ok(pids.lines().count() as u64)
}

/// Pids of all commands, those in groups they made themselves included.
pub fn workload_pids() -> io::Result<Vec<i32>> {
    let mut pids = Vec::new();
    let mut groups = vec![PathBuf::from(WORKLOAD)];
    while let Some(group) = groups.pop() {
        let listed = fs::read_to_string(group.join("cgroup.procs"))?;
        pids.extend(listed.lines().filter_map(|pid| pid.parse::<i32>().ok()));
        for entry in fs::read_dir(&group)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                groups.push(entry.path());
            }
        }
    }
    Ok(pids)
}

/// Begins to freeze every command. `EVENTS` says when that is done.
pub fn freeze_workload() -> io::Result<()> {
    set_frozen(b"1")
}

/// Lets the commands run again.
pub fn thaw_workload() -> io::Result<()> {
    set_frozen(b"0")
}

fn set_frozen(frozen: &[u8]) -> io::Result<()> {
    static FREEZE: OnceLock<File> = OnceLock::new();
    let file = open_once(&FREEZE, || OpenOptions::new().write(true).open(format!("{WORKLOAD}/cgroup.freeze")))?;
    file.write_all_at(frozen, 0)
}

/// Whether the content of `EVENTS` says that all commands are frozen.
pub fn is_frozen(events: &[u8]) -> bool {
    events.split(|byte| *byte == b'\n').any(|line| line == b"frozen 1")
}

/// Kills every command with everything it has started.
pub fn kill_workload() -> io::Result<()> {
    fs::write(format!("{WORKLOAD}/cgroup.kill"), "1")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_count_of_its_own_line_only() {
        assert_eq!(oom_kills_in("drop_slab 0\noom_kill_x 3\noom_kill 2\nnuma_hit 7\n"), 2);
        assert_eq!(oom_kills_in("drop_slab 0\n"), 0);
    }

    #[test]
    fn frozen_is_a_line_of_its_own() {
        assert!(is_frozen(b"populated 1\nfrozen 1\n"));
        assert!(!is_frozen(b"populated 1\nfrozen 0\n"));
        assert!(!is_frozen(b"unfrozen 1\n"));
    }
}
