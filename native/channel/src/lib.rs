//! The channel between shim and guest: many streams over one virtio-serial port (docs/protocol.md, section 1).
//!
//! ```text
//! Stream, Opener, Incoming     what users hold                          stream.rs, session.rs
//! yamux                        many streams, one window each            crate yamux
//! Link                         chunks in, chunks out, buffered          link.rs
//! chunk                        hello | data | pad, pure functions       chunk.rs
//! the port                     any AsyncRead + AsyncWrite
//! ```
//!
//! Yamux alone would do on a socket. The chunks exist because a restored guest is in the middle of a session with a host that is
//! gone: they let a new host cut in anywhere, and let both ends agree on the byte where the new session begins.

mod chunk;
mod guest;
mod host;
mod link;
mod session;
mod stream;

pub use guest::serve_guest;
pub use host::{HostSession, connect_host};
pub use session::{Incoming, Opener};
pub use stream::Stream;

/// Streams open at once, both directions together. Further ones are refused.
pub const MAX_STREAMS: usize = 512;
