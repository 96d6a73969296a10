//! The guest side of machinen: one static binary, which is pid 1 from the initramfs (`init`) and then the agent that serves the host's
//! operations (`agent`). `system` has what both need of the machine. docs/protocol.md, sections 1 to 4, describes the wire formats.
//!
//! This is a library only so that the tests beside it can read requests as the agent does.

pub mod agent;
pub mod config;
pub mod errno;
pub mod file_names;
pub mod init;
pub mod reply;
pub mod request;
pub mod system;
