//! Process trees to files and back, by the image's own `criu`: the operations `dump` and `revive`.
//!
//! The files stay on the guest's disk, in `DIR`: the host copies that disk while everything stands still, and a machine made from the
//! copy finds them there, together with every file the processes had open (CRIU restores none whose size has changed).

mod dump;
pub mod hook;
mod images;
mod kdat;
mod lazy;
mod process_trees;
mod program;
mod record;
mod revive;
mod vfork;

use std::fs;
use std::io;

use tokio::sync::Mutex;
use tokio::task::spawn_blocking;

use super::lifecycle::Lifecycle;

pub use dump::dump;
pub use lazy::LazyPages;
pub use record::MainCommand;
pub use revive::revive;

/// Where the images lie. Of the last dump: another one replaces them.
const DIR: &str = "/var/lib/machinen/dump";
/// Memory that is a filesystem: no disk holds it.
const SHARED_MEMORY: &str = "/dev/shm";
const SHARED_MEMORY_ARCHIVE: &str = "/var/lib/machinen/dump/shm.tar";

/// Who has to do with what lies there, one at a time.
static IMAGES: Mutex<()> = Mutex::const_new(());

/// Where the images of a tree lie, by its number.
fn directory(tree: usize) -> String {
    format!("{DIR}/{tree}")
}

/// Removes what lies there, also from the file on the host that is the disk: copies of it would grow with every dump.
async fn remove_images(lifecycle: &Lifecycle) -> io::Result<()> {
    let removed = spawn_blocking(|| match fs::remove_dir_all(DIR) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    });
    removed.await.map_err(io::Error::other)??;
    // A disk that knows no holes keeps what it has.
    let _ = lifecycle.trim_disk().await;
    Ok(())
}
