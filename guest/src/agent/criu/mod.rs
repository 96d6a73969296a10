//! Process trees to files and back, by the image's own `criu`: the operations `dump` and `revive`.
//!
//! The files stay on the guest's disk, in `DIR`: the host copies that disk while everything stands still, and a machine made from the
//! copy finds them there, together with every file the processes had open (CRIU restores none whose size has changed).

mod dump;
pub mod hook;
mod images;
mod kdat;
mod lazy;
mod program;
mod record;
mod revive;
mod trees;

pub use dump::dump;
pub use lazy::LazyPages;
pub use record::MainCommand;
pub use revive::revive;

/// Where the images lie. Of the last dump: another one replaces them.
const DIR: &str = "/var/lib/machinen/dump";
/// The tree's number below `DIR`.
fn directory(tree: usize) -> String {
    format!("{DIR}/{tree}")
}
/// Memory that is a filesystem: no disk holds it.
const SHARED_MEMORY: &str = "/dev/shm";
const SHARED_MEMORY_ARCHIVE: &str = "/var/lib/machinen/dump/shm.tar";
