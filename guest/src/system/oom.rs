//! The kernel's count of the processes it killed for want of memory.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use super::open_once::open_once;

/// How many processes the kernel has killed for want of memory since boot (proc(5), /proc/vmstat).
pub fn kills() -> io::Result<u64> {
    static VMSTAT: OnceLock<File> = OnceLock::new();
    let file = open_once(&VMSTAT, || File::open("/proc/vmstat"))?;
    let (mut text, mut length) = (vec![0; 16 * 1024], 0);
    loop {
        match file.read_at(&mut text[length..], length as u64)? {
            0 => return Ok(kills_in(&String::from_utf8_lossy(&text[..length]))),
            n => length += n,
        }
    }
}

fn kills_in(vmstat: &str) -> u64 {
    let count = vmstat.lines().find_map(|line| line.strip_prefix("oom_kill "));
    count.and_then(|count| count.trim_end().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_count_of_its_own_line_only() {
        assert_eq!(kills_in("drop_slab 0\noom_kill_x 3\noom_kill 2\nnuma_hit 7\n"), 2);
        assert_eq!(kills_in("drop_slab 0\n"), 0);
    }
}
