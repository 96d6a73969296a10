//! How much each end of a session may ask of the other.

/// How many streams the host may have open at once, not counting urgent ones. Further streams are refused.
pub const MAX_STREAMS: usize = 512;
/// How many streams the guest may have open at once, not counting urgent ones.
pub const MAX_GUEST_STREAMS: usize = 64;
/// How many bytes either end of a stream may send before the other has read: all that an end keeps of a stream that is not read.
pub const WINDOW: usize = 256 * 1024;
/// The window of a stream whose reader has kept up with the peer. With a small window 500 MB took 1.2 to 1.3 times as long (measured).
pub const LARGE_WINDOW: usize = 4 * WINDOW;
/// How many streams of a session may have a large window at once.
pub const MAX_LARGE: usize = 32;
