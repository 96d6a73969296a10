//! How a command ended, as an `end` frame says it.

use serde::{Deserialize, Serialize};

/// The longest payload of an `end` frame that the shim reads, in bytes: it holds the payload in memory.
pub const MAX_EXIT: usize = 4 * 1024;

/// The payload of an `end` frame. On the lifecycle port it is `{}` if the guest powers off without a main command.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ExitReport {
    /// 128 and the signal's number if a signal ended the command.
    pub code: Option<i32>,
    pub signal: Option<i32>,
    /// Only with a signal: whether the kernel killed the command, or another process meanwhile, for want of memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oom_killed: Option<bool>,
}
