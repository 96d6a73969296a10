//! An operation's end of its stream.

use machinen_channel::Opener;

use super::stream::{FrameReader, FrameWriter};

/// The two halves of an operation's stream, and its session.
pub struct Exchange<R, W> {
    pub input: FrameReader<R>,
    pub output: FrameWriter<W>,
    /// The stream's session.
    pub session: Opener,
}

impl<R, W> Exchange<R, W> {
    /// Whether the whole session has ended, and the stream with it. Then the host has not cancelled this operation; another host will come.
    pub fn session_is_over(&self) -> bool {
        !self.session.is_connected()
    }
}
