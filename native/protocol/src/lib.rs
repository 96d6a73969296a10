//! Ports, frames, errno names and strings of what host and guest say to each other over the streams of the channel (docs/protocol.md,
//! sections 2 and 3), defined once for shim and agent, with the JSON messages that both read or write. The other messages are in the
//! guest's request/ and reply.rs. `test/golden/agent-frames.json` holds this crate and the TypeScript side to the same bytes.

#![warn(clippy::missing_errors_doc)]

pub mod doorbell;
pub mod errno;
pub mod exit;
pub mod frame;
pub mod names;
pub mod ports;
pub mod share;
