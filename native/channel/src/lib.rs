//! The channel between shim and guest: many streams over one virtio-serial port (docs/protocol.md, section 1).
//!
//! ```text
//! Stream, Opener, Incoming     what users hold                          stream.rs
//! Mux                          the streams of a session, bounded        mux.rs, output.rs
//! Link                         frames in, frames out, hellos            link.rs
//! Frame                        as bytes, pure functions                 frame.rs
//! the port                     any AsyncRead + AsyncWrite
//! ```
//!
//! A restored guest is in the middle of a session with a host that is gone. Therefore a new host can cut in anywhere, and both ends agree
//! on the byte where the new session begins.

mod frame;
mod guest;
mod host;
mod link;
mod mux;
mod output;
mod stream;

pub use guest::serve_guest;
pub use host::{HostSession, connect_host};
pub use stream::{Incoming, Opener, Stream};

/// Streams the host may have open at once, urgent ones apart. Further ones are refused.
pub const MAX_STREAMS: usize = 512;
/// Streams the guest may have open at once, likewise.
pub const MAX_GUEST_STREAMS: usize = 64;
/// What either end of a stream may send before the other has read: all that an end keeps of a stream nobody reads.
pub const WINDOW: usize = 256 * 1024;
/// The same, once its reader has kept up with the peer: with a small window 500 MB took 1.2 to 1.3 times as long (measured).
pub const LARGE_WINDOW: usize = 4 * WINDOW;
/// Streams of a session that may have a large window at once.
pub const MAX_LARGE: usize = 32;
