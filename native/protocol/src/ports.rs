//! Ports of the channel.

/// The port on which the agent serves operations.
pub const OPERATIONS: u32 = 1978;
/// The host's port that the guest calls once its agent can serve.
pub const DOORBELL: u32 = 1979;
/// The shim's port to which the guest reports how it ends, and sends the output of its detached main command.
pub const LIFECYCLE: u32 = 1980;
