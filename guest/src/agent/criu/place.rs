//! Where a dump lies on the guest's disk.

use std::fs;
use std::io;

use tokio::sync::Mutex;
use tokio::task::spawn_blocking;

use crate::agent::disks::Disks;

/// Holds the images of the last dump; the next dump replaces them.
pub const DIR: &str = "/var/lib/machinen/dump";
/// A file system in memory, which a copy of the disk does not hold; a dump saves it as a file.
pub const SHARED_MEMORY: &str = "/dev/shm";
pub const SHARED_MEMORY_ARCHIVE: &str = "/var/lib/machinen/dump/shm.tar";

/// Held by the operation that writes, reads or removes the images: one at a time.
pub static IMAGES: Mutex<()> = Mutex::const_new(());

/// The directory of the images of tree number `n`.
pub fn directory(tree: usize) -> String {
    format!("{DIR}/{tree}")
}

/// Removes the images, and trims the disk: in the disk's file on the host their blocks would make copies grow with every dump.
pub async fn remove_images(disks: &Disks) -> io::Result<()> {
    let removed = spawn_blocking(|| match fs::remove_dir_all(DIR) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    });
    removed.await.map_err(io::Error::other)??;
    // A disk without discard keeps the blocks.
    let _ = disks.trim().await;
    Ok(())
}
