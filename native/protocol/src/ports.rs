//! The virtio-serial ports, and the ports of the streams in the channel.

/// The virtio-serial port that carries the channel.
pub const CHANNEL: &str = "machinen.channel";
/// The virtio-serial port that carries the requests for shared directories (`share`).
pub const SHARE: &str = "machinen.share";

/// The port on which the agent serves operations.
pub const OPERATIONS: u32 = 1978;
/// The host's port that the guest calls once its agent can serve.
pub const DOORBELL: u32 = 1979;
/// The shim's port to which the guest reports how it ends, and sends the output of its detached main command.
pub const LIFECYCLE: u32 = 1980;
