//! Ports, frames, errno names and strings of what host and guest say to each other over the streams of the channel (docs/protocol.md,
//! sections 2 and 3), defined once for shim and agent. The JSON messages are in the guest's request.rs and reply.rs. `test/golden/agent-frames.json` holds this crate and the TypeScript side to the same bytes.

#![warn(clippy::missing_errors_doc)]

pub mod errno;
pub mod frame;
pub mod names;
pub mod ports;
pub mod share;
