//! Ports of the channel.

/// The agent serves operations there.
pub const OPERATIONS: u32 = 1978;
/// The guest calls the host there once its agent can serve.
pub const DOORBELL: u32 = 1979;
/// The guest tells the shim there how it ends, and what its detached main command prints.
pub const LIFECYCLE: u32 = 1980;
