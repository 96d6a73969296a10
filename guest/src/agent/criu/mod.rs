//! The operations `dump` and `revive`: the image's own `criu` saves process trees to files and restores them.
//!
//! The files stay on the guest's disk, in `DIR`. The host copies that disk while everything stands still, and a machine made from the copy
//! finds them there, together with every file the processes had open (CRIU does not restore a process whose open file has changed in size).

mod dump;
mod freeze_outside_vfork;
pub mod hook;
mod images;
mod kdat;
pub mod lazy;
mod place;
mod process_trees;
mod program;
pub mod record;
mod revive;

pub use dump::dump;
pub use revive::revive;
