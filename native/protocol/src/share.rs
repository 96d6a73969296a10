//! The port of shared directories. It carries the messages of the FUSE protocol (include/uapi/linux/fuse.h), back to back: requests from the
//! guest's kernel to the host's file server, answers and notifications in the other direction. Each begins with its length in bytes, a u32 in the
//! byte order of the machine, which includes itself.

/// The most data that one `WRITE` carries or one `READ` asks for, in bytes.
pub const MAX_DATA: usize = 1 << 20;
/// The longest message: data, and a header, a structure and names before it.
pub const MAX_MESSAGE: usize = MAX_DATA + 8192;
/// The length of a request's header (`fuse_in_header`).
pub const REQUEST_HEADER: usize = 40;
/// The length of an answer's header (`fuse_out_header`).
pub const ANSWER_HEADER: usize = 16;

/// A request of the guest's agent, not of its kernel, with this opcode and nothing but a header: which locks are held? The answer's body is a
/// list of `pid (u32), length of the path (u32), path`. It is given once everything before it has been answered.
pub const LOCKS: u32 = 0x6d6e_0001;
/// The `unique` of that request. The kernel counts its own up from 0.
pub const LOCKS_UNIQUE: u64 = 1 << 63;

/// A request of the agent, as `LOCKS`: has the kernel been told of everything that changed on the host before this? The answer, without a body,
/// says so.
pub const SETTLE: u32 = 0x6d6e_0002;
/// The `unique`s of these requests begin above this one, and are even, as the kernel's own are.
pub const SETTLE_UNIQUE: u64 = LOCKS_UNIQUE;

/// Notifications (answers with the `unique` 0) must not fill the guest's memory. So after at most this many the server sends a `SYNC` and waits
/// for it to come back. It also sends one at the beginning of a stream.
pub const NOTIFICATIONS: usize = 64;
/// The `error` of a message of the server, not for the kernel, whose `unique` is 0 and whose body is a number (u64).
pub const SYNC: i32 = 0x5359;
/// A bit of that number: a copy has not been told everything yet that changed since the original was frozen.
pub const SYNC_MORE: u64 = 1 << 63;
/// The opcode of the agent's message that everything before a `SYNC` has been given to the kernel. It has nothing but a header, whose `nodeid` is
/// the number, and gets no answer. Linux sends this opcode (`FUSE_NOTIFY_REPLY`) only after notifications that the server does not send.
pub const SYNCED: u32 = 41;
