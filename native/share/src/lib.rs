//! Serves directories of this host to a guest, by the FUSE protocol: real descriptors stand behind what the guest has open, so that an open file
//! is that file whatever happens to its name.

pub mod abi;
mod directory;
mod handle;
mod lock;
mod node;
pub mod notice;
pub mod owner;
mod privilege;
pub mod request;
pub mod server;
pub mod stream;
pub mod watch;
