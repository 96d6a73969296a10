//! Where a dump lies on the guest's disk.

use std::fs;
use std::io;

use tokio::sync::Mutex;
use tokio::task::spawn_blocking;

use crate::agent::disks::Disks;

/// Where the images lie. Of the last dump: another one replaces them.
pub const DIR: &str = "/var/lib/machinen/dump";
/// Memory that is a filesystem: no disk holds it.
pub const SHARED_MEMORY: &str = "/dev/shm";
pub const SHARED_MEMORY_ARCHIVE: &str = "/var/lib/machinen/dump/shm.tar";

/// Held by the operation that writes, reads or removes the images: one at a time.
pub static IMAGES: Mutex<()> = Mutex::const_new(());

/// Where the images of a tree lie, by its number.
pub fn directory(tree: usize) -> String {
    format!("{DIR}/{tree}")
}

/// Removes what lies there, also from the file on the host that is the disk: copies of it would grow with every dump.
pub async fn remove_images(disks: &Disks) -> io::Result<()> {
    let removed = spawn_blocking(|| match fs::remove_dir_all(DIR) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    });
    removed.await.map_err(io::Error::other)??;
    // A disk that knows no holes keeps what it has.
    let _ = disks.trim().await;
    Ok(())
}
