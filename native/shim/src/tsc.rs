//! Measures the rate of the time stamp counter. A guest under TCG reads the host's counter, and need not measure the rate if it is told.

use rustix::time::{ClockId, clock_gettime};
use std::time::Duration;

/// The time between the two readings. It makes the error some parts in a million.
const BASE: Duration = Duration::from_millis(100);
/// How many readings are taken at each end. The one that was disturbed least counts.
const READINGS: usize = 32;

/// One reading of both clocks.
struct Reading {
    tsc: u64,
    nanoseconds: i64,
}

fn tsc() -> u64 {
    // SAFETY: rdtsc has no preconditions; a host that forbids it to user space runs no VMM that needs it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

fn monotonic_raw() -> i64 {
    // This cannot fail, because the clock exists since Linux 2.6.28.
    let now = clock_gettime(ClockId::MonotonicRaw);
    now.tv_sec * 1_000_000_000 + now.tv_nsec
}

/// The reading that took the least time; the others were interrupted.
fn read() -> Reading {
    let mut best = (u64::MAX, Reading { tsc: 0, nanoseconds: 0 });
    for _ in 0..READINGS {
        let before = tsc();
        let nanoseconds = monotonic_raw();
        let width = tsc().wrapping_sub(before);
        if width < best.0 {
            best = (width, Reading { tsc: before + width / 2, nanoseconds });
        }
    }
    best.1
}

/// Measures the rate in kHz.
pub fn khz() -> u64 {
    let first = read();
    std::thread::sleep(BASE);
    let last = read();
    let nanoseconds = u128::from((last.nanoseconds - first.nanoseconds).max(1).unsigned_abs());
    let ticks = u128::from(last.tsc.wrapping_sub(first.tsc));
    u64::try_from((ticks * 1_000_000 + nanoseconds / 2) / nanoseconds).unwrap_or(u64::MAX)
}
