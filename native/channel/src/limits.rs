//! How much each end of a session may ask of the other.

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
