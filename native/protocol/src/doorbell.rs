//! The two lines of JSON that are said over the doorbell's port.

use serde::{Deserialize, Serialize};

/// The version of the ring.
pub const VERSION: u32 = 1;
/// The longest ring that a host reads, in bytes.
pub const MAX_RING: usize = 4096;
/// The longest answer that a guest reads, in bytes. An answer holds one number.
pub const MAX_ANSWER: usize = 1024;

/// The guest's line: its agent can serve.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Ring<'a> {
    pub version: u32,
    /// The agent's version.
    pub agent: &'a str,
}

/// The host's line.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Answer {
    /// The host's clock, in milliseconds since 1970.
    pub now_ms: u64,
}
