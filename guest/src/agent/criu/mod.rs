//! Process trees to files and back, by the image's own `criu`: the operations `dump` and `revive`.
//!
//! The files stay on the guest's disk, in `DIR`: the host copies that disk while everything stands still, and a machine made from the
//! copy finds them there, together with every file the processes had open (CRIU restores none whose size has changed).

mod dump;
pub mod hook;
mod images;
mod kdat;
pub mod lazy;
mod place;
mod process_trees;
mod program;
pub mod record;
mod revive;
mod vfork;

pub use dump::dump;
pub use revive::revive;
