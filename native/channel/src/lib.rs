//! The channel between shim and guest: many streams over one virtio-serial port (docs/protocol.md, section 1).
//!
//! ```text
//! Stream, Opener, Incoming     what users hold                          stream.rs
//! Mux                          the streams of a session, bounded        mux/, output.rs
//! Link                         frames in, frames out, hellos            link.rs
//! Frame                        as bytes, pure functions                 frame.rs
//! the port                     any AsyncRead + AsyncWrite
//! ```
//!
//! A restored guest is in the middle of a session with a host that is gone. Therefore a new host can cut in anywhere, and both ends agree
//! on the byte where the new session begins.

#![warn(clippy::missing_errors_doc)]

mod frame;
mod guest;
mod host;
mod limits;
mod link;
mod mux;
mod output;
mod stream;

pub use guest::serve_guest;
pub use host::{HostSession, connect_host};
pub use limits::{LARGE_WINDOW, MAX_GUEST_STREAMS, MAX_LARGE, MAX_STREAMS, WINDOW};
pub use stream::{Incoming, Opener, Stream};
