//! Two control groups: the agent's own and the commands', so that commands can be frozen, killed, counted and limited as one.

use std::fs;
use std::io;

use super::root::make_directory;

const ROOT: &str = "/sys/fs/cgroup";
/// The agent.
const SYSTEM: &str = "/sys/fs/cgroup/system";
/// Every command.
pub const WORKLOAD: &str = "/sys/fs/cgroup/workload";

/// Turns all controllers on below the root, makes both groups and puts this process into `system`.
pub fn set_up() -> io::Result<()> {
    let controllers = fs::read_to_string(format!("{ROOT}/cgroup.controllers"))?;
    let enable: Vec<String> = controllers.split_whitespace().map(|name| format!("+{name}")).collect();
    fs::write(format!("{ROOT}/cgroup.subtree_control"), enable.join(" "))?;
    make_directory(SYSTEM, 0o755)?;
    make_directory(WORKLOAD, 0o755)?;
    fs::write(format!("{SYSTEM}/cgroup.procs"), "0")
}

/// Processes of commands killed for want of memory since boot.
pub fn oom_kills() -> io::Result<u64> {
    Ok(oom_kills_in(&fs::read_to_string(format!("{WORKLOAD}/memory.events"))?))
}

fn oom_kills_in(events: &str) -> u64 {
    let count = events.lines().find_map(|line| line.strip_prefix("oom_kill "));
    count.and_then(|count| count.trim_end().parse().ok()).unwrap_or(0)
}

/// How many processes the commands are.
pub fn processes() -> io::Result<u64> {
    let pids = fs::read_to_string(format!("{WORKLOAD}/cgroup.procs"))?;
    Ok(pids.lines().count() as u64)
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
        assert_eq!(oom_kills_in("low 0\noom 3\noom_kill 2\noom_group_kill 7\n"), 2);
        assert_eq!(oom_kills_in("low 0\n"), 0);
    }
}
