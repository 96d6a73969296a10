//! An operation's end of its stream.

use machinen_channel::Opener;

use super::stream::{FrameReader, FrameWriter};

/// What an operation has of its stream.
pub struct Exchange<R, W> {
    pub input: FrameReader<R>,
    pub output: FrameWriter<W>,
    /// The stream's session.
    pub session: Opener,
}

impl<R, W> Exchange<R, W> {
    /// Whether the whole session has ended, and with it the stream: the host did not leave this operation, another host comes.
    pub fn session_is_over(&self) -> bool {
        !self.session.is_connected()
    }
}
