//! The host's clock.

use std::time::{SystemTime, UNIX_EPOCH};

/// The time, in milliseconds since 1970. A clock before 1970 counts as 1970.
pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| u64::try_from(now.as_millis()).unwrap_or(u64::MAX))
}
