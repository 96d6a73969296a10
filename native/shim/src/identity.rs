//! The identity of a process: its pid and its start time, because pids are reused.

use serde::Serialize;
use std::io;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Identity {
    pub pid: u32,
    /// In clock ticks since the host's boot.
    start_time: u64,
}

impl Identity {
    /// The identity of a process that exists. The caller must keep it from being reaped meanwhile.
    pub fn of(pid: u32) -> io::Result<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let start_time = start_time(&stat).ok_or_else(|| io::Error::other("unreadable /proc/<pid>/stat"))?;
        Ok(Identity { pid, start_time })
    }
}

/// Field 22 of proc_pid_stat(5). Field 2 is the command's name in parentheses and may hold anything, parentheses and spaces
/// included; field 3 follows the last one.
fn start_time(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_fake_the_start_time() {
        let fields = (3..=52).map(|n| n.to_string()).collect::<Vec<_>>().join(" ");
        assert_eq!(start_time(&format!("7 (a) 1 2 (b c) {fields}\n")), Some(22));
        assert_eq!(start_time("7 (a) 1 2"), None);
    }

    #[test]
    fn ours_is_readable() {
        assert!(Identity::of(std::process::id()).unwrap().start_time > 0);
    }
}
