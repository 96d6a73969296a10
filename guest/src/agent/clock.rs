//! The wall clock, as the host tells it.

use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, Timespec, clock_settime};

/// The guest's own time, in milliseconds since 1970.
pub fn now_ms() -> u64 {
    // A clock before 1970 is wrong anyhow, so it reads as 1970.
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| u64::try_from(now.as_millis()).unwrap_or(u64::MAX))
}

/// Sets the clock. Returns by how many milliseconds that moved it.
pub fn set(to_ms: u64) -> io::Result<i64> {
    let seconds = i64::try_from(to_ms / 1000).map_err(io::Error::other)?;
    let nanoseconds = i64::try_from(to_ms % 1000 * 1_000_000).map_err(io::Error::other)?;
    let from_ms = now_ms();
    clock_settime(ClockId::Realtime, Timespec { tv_sec: seconds, tv_nsec: nanoseconds })?;
    Ok(to_ms.wrapping_sub(from_ms).cast_signed())
}
