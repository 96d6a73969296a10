//! Two control groups, the agent's and the commands', so that commands can be frozen, killed, counted and limited together. Groups that
//! commands make beside them and move into, as container engines do, count as the commands' too.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use super::root::make_directory;

const ROOT: &str = "/sys/fs/cgroup";
/// The agent's group.
const SYSTEM: &str = "/sys/fs/cgroup/system";
/// The commands' group.
pub const WORKLOAD: &str = "/sys/fs/cgroup/workload";

/// Makes both groups and puts this process into `system`. No controller is turned on: freezing, killing and counting processes need
/// none, and each costs every boot some milliseconds. A program in the guest that wants limits turns on the controllers it needs.
pub fn set_up() -> io::Result<()> {
    make_directory(SYSTEM, 0o755)?;
    make_directory(WORKLOAD, 0o755)?;
    fs::write(format!("{SYSTEM}/cgroup.procs"), "0")
}

/// How many processes the commands are, those in groups they made themselves included.
pub fn processes() -> io::Result<u64> {
    Ok(workload_pids()?.len() as u64)
}

/// The pids of all commands, also of those in groups they made themselves.
pub fn workload_pids() -> io::Result<Vec<i32>> {
    let mut pids = Vec::new();
    let mut groups = workload_groups()?;
    while let Some(group) = groups.pop() {
        let Some(listed) = if_exists(fs::read_to_string(group.join("cgroup.procs")))? else { continue };
        pids.extend(listed.lines().filter_map(|pid| pid.parse::<i32>().ok()));
        groups.extend(groups_in(&group)?);
    }
    Ok(pids)
}

/// Whether `/proc/PID/cgroup` names the commands' own group, or one below it.
pub fn is_below_workload(group: &str) -> bool {
    let below = group.trim_end().strip_prefix("0::/workload");
    below.is_some_and(|below| below.is_empty() || below.starts_with('/'))
}

/// The topmost groups of the commands: `workload`, and the groups they made beside it.
fn workload_groups() -> io::Result<Vec<PathBuf>> {
    Ok(groups_in(Path::new(ROOT))?.into_iter().filter(|group| group != Path::new(SYSTEM)).collect())
}

fn groups_in(group: &Path) -> io::Result<Vec<PathBuf>> {
    let mut groups = Vec::new();
    for entry in if_exists(fs::read_dir(group))?.into_iter().flatten() {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            groups.push(entry.path());
        }
    }
    Ok(groups)
}

/// `None` for a group that has been removed meanwhile: no process is in it.
fn if_exists<T>(found: io::Result<T>) -> io::Result<Option<T>> {
    match found {
        Err(error) if error.kind() == ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
        found => found.map(Some),
    }
}

/// Moves commands back that have moved themselves into the root group, as programs do that are about to remove their own: the root group
/// can neither be frozen nor killed.
fn gather_workload() -> io::Result<()> {
    for pid in fs::read_to_string(format!("{ROOT}/cgroup.procs"))?.lines() {
        // A kernel thread has no program; pid 1 is init.
        if pid == "1" || fs::read_link(format!("/proc/{pid}/exe")).is_err() {
            continue;
        }
        match fs::write(format!("{WORKLOAD}/cgroup.procs"), pid) {
            // The process has ended meanwhile.
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
            moved => moved?,
        }
    }
    Ok(())
}

/// The `cgroup.freeze` of each frozen group. These files stay open from the freeze on, because looking up a path is slow in a machine that
/// has just been restored.
static FROZEN: Mutex<Vec<File>> = Mutex::new(Vec::new());

/// Begins to freeze every command. Returns the `cgroup.events` of each group, whose content `is_frozen` reads. A change is an exceptional
/// condition (`POLLPRI`) of the file.
pub fn freeze_workload() -> io::Result<Vec<File>> {
    gather_workload()?;
    let mut frozen = FROZEN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut events = Vec::new();
    for group in workload_groups()? {
        let Some(event) = if_exists(File::open(group.join("cgroup.events")))? else { continue };
        let Some(freeze) = if_exists(OpenOptions::new().write(true).open(group.join("cgroup.freeze")))? else {
            continue;
        };
        if if_exists(freeze.write_all_at(b"1", 0))?.is_some() {
            frozen.push(freeze);
            events.push(event);
        }
    }
    Ok(events)
}

/// Thaws the commands. A group that cannot be thawed does not keep the others frozen; the next thaw tries it again.
pub fn thaw_workload() -> io::Result<()> {
    let mut frozen = FROZEN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut failed = Ok(());
    frozen.retain(|freeze| match if_exists(freeze.write_all_at(b"0", 0)) {
        Ok(_) => false,
        Err(error) => {
            failed = Err(error);
            true
        }
    });
    failed
}

/// Whether the content of `cgroup.events` says that the whole group is frozen.
pub fn is_frozen(events: &[u8]) -> bool {
    events.split(|byte| *byte == b'\n').any(|line| line == b"frozen 1")
}

/// Kills every command with everything it has started.
pub fn kill_workload() -> io::Result<()> {
    let gathered = gather_workload();
    for group in workload_groups()? {
        if_exists(fs::write(group.join("cgroup.kill"), "1"))?;
    }
    gathered
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_commands_groups_are_their_own_and_those_below() {
        assert!(is_below_workload("0::/workload\n"));
        assert!(is_below_workload("0::/workload/web\n"));
        assert!(!is_below_workload("0::/workloads\n"));
        assert!(!is_below_workload("0::/docker/74d8\n"));
    }

    #[test]
    fn frozen_is_a_line_of_its_own() {
        assert!(is_frozen(b"populated 1\nfrozen 1\n"));
        assert!(!is_frozen(b"populated 1\nfrozen 0\n"));
        assert!(!is_frozen(b"unfrozen 1\n"));
    }
}
