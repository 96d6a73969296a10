//! The operation `stats`.

use std::fs;
use std::io;

use rustix::time::{ClockId, clock_gettime};

use super::context::Context;
use crate::reply::{ErrorReply, Memory, Stats};
use crate::system::{cgroup, oom};

/// The current figures of the whole guest.
pub fn stats(context: &Context) -> Result<Stats, ErrorReply> {
    read(context).map_err(|error| ErrorReply::io("stats", &error))
}

fn read(context: &Context) -> io::Result<Stats> {
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    let disk = rustix::fs::fstatvfs(context.lifecycle.disks().writable())?;
    let uptime = clock_gettime(ClockId::Boottime);
    Ok(Stats {
        memory: Memory {
            total_bytes: kibibytes(&meminfo, "MemTotal:") * 1024,
            available_bytes: kibibytes(&meminfo, "MemAvailable:") * 1024,
        },
        uptime_ms: (uptime.tv_sec * 1000 + uptime.tv_nsec / 1_000_000).unsigned_abs(),
        processes: cgroup::processes()?,
        disk_total_bytes: disk.f_blocks * disk.f_frsize,
        disk_free_bytes: disk.f_bavail * disk.f_frsize,
        oom_kills: oom::kills()?,
        lazy_pages_pending: context.lazy.pending(),
        rejuvenation: context.rejuvenated().clone(),
    })
}

fn kibibytes(meminfo: &str, key: &str) -> u64 {
    let value = meminfo.lines().find_map(|line| line.strip_prefix(key));
    value.and_then(|value| value.split_whitespace().next()).and_then(|number| number.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_one_line_of_meminfo() {
        let meminfo = "MemTotal:         240000 kB\nMemFree:  1 kB\nMemAvailable:     200000 kB\n";
        assert_eq!((kibibytes(meminfo, "MemTotal:"), kibibytes(meminfo, "MemAvailable:")), (240_000, 200_000));
        assert_eq!(kibibytes(meminfo, "Nonsense:"), 0);
    }
}
