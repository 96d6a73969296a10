//! Serves directories of this host to a guest, by the FUSE protocol: real descriptors stand behind what the guest has open, so that an open file
//! is that file whatever happens to its name.

pub mod abi;
mod attributes;
pub mod confinement;
pub mod control;
mod coverage;
mod data;
mod devices;
mod directories;
mod directory;
mod entries;
mod handle;
mod init;
mod limits;
pub mod lock;
mod locks;
mod node;
mod nodes;
mod notice;
mod open;
pub mod outlet;
mod owner;
pub mod plan;
mod privilege;
mod ranges;
mod reply;
pub mod request;
mod root;
pub mod server;
pub mod share;
pub mod state;
pub mod stream;
mod trust;
mod waiting;
mod watch;
mod watcher;
mod xattr;
