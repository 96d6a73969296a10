//! The files that identify a machine. They are opened while it is still the original, so that a copy only has to write them. In a copy the
//! first use of every part of the kernel is slow (under TCG it is translated anew): looking up these files there took 50 ms, writing them
//! takes 2 ms.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use rustix::fs::FallocateFlags;
use rustix::mount::MountFlags;

use crate::system::host_name::{self, Names};

/// The file by which a program learns whether it has been copied. It is empty in a machine that is no copy.
const GENERATION: &str = "generation";
const GENERATION_DIR: &str = "run/machinen";
const MACHINE_ID: &str = "etc/machine-id";

const RANDOM: &str = "/dev/urandom";

/// The open files for a copy to write, or for each the error of opening it.
#[derive(Debug)]
pub struct IdentityFiles {
    random: io::Result<File>,
    generation: io::Result<File>,
    machine_id: io::Result<File>,
    names: Names,
}

impl IdentityFiles {
    /// Opens the files below `root`, which is `/` in a machine.
    pub fn prepare(root: &Path) -> Self {
        IdentityFiles {
            random: File::open(RANDOM),
            generation: open_generation(root),
            machine_id: open_machine_id(root),
            names: Names::open(root),
        }
    }

    /// Reads anew those files of which a copy changes only a part, because commands may have written them since they were opened.
    pub fn read(&mut self) {
        self.names.read();
    }

    /// The kernel's random generator.
    pub fn random(&self) -> io::Result<&File> {
        self.random.as_ref().map_err(again)
    }

    /// Gives the machine another name.
    pub fn rename(&self, hostname: &str) -> io::Result<()> {
        host_name::rename(hostname, &self.names)
    }

    pub fn renew_generation(&self, generation: &str) -> io::Result<()> {
        write(&self.generation, generation)
    }

    pub fn renew_machine_id(&self, id: &str) -> io::Result<()> {
        // Capitals are not allowed there (machine-id(5)).
        write(&self.machine_id, &id.to_ascii_lowercase())
    }
}

/// Writes in place. Readers are frozen meanwhile, and the line always has the same length.
fn write(file: &io::Result<File>, line: &str) -> io::Result<()> {
    match file {
        Ok(file) => file.write_all_at(format!("{line}\n").as_bytes(), 0),
        Err(error) => Err(again(error)),
    }
}

/// A copy of the error.
fn again(error: &io::Error) -> io::Error {
    error.raw_os_error().map_or_else(|| io::Error::new(error.kind(), error.to_string()), io::Error::from_raw_os_error)
}

/// Makes the file in memory instead of on a disk, because writing is quicker there and the file need not be kept.
fn open_generation(root: &Path) -> io::Result<File> {
    let dir = root.join(GENERATION_DIR);
    fs::create_dir_all(&dir)?;
    let path = dir.join(GENERATION);
    // Nothing is mounted in the root of a test.
    if root == Path::new("/") && !path.exists() {
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        rustix::mount::mount("tmpfs", &dir, "tmpfs", flags, c"mode=755,size=64k")?;
    }
    let file = OpenOptions::new().write(true).create(true).truncate(false).custom_flags(libc::O_NOFOLLOW).open(path)?;
    file.set_permissions(Permissions::from_mode(0o444))?;
    // Allocates the page now, so that a copy need not. A failure only costs time.
    let _ = rustix::fs::fallocate(&file, FallocateFlags::KEEP_SIZE, 0, 64);
    Ok(file)
}

/// Opens the machine id for writing, which copies it to the machine's own layer. An image without one gets none.
fn open_machine_id(root: &Path) -> io::Result<File> {
    let path = root.join(MACHINE_ID);
    if !fs::symlink_metadata(&path)?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let file = OpenOptions::new().write(true).custom_flags(libc::O_NOFOLLOW).open(path)?;
    if host_name::is_the_hosts(&file) { Err(io::Error::other("a file of the host's")) } else { Ok(file) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0123456789abcdef0123456789ABCDEF";

    #[test]
    fn a_machine_id_keeps_its_mode() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join(MACHINE_ID);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, "").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o444)).unwrap();
        IdentityFiles::prepare(root.path()).renew_machine_id(ID).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{}\n", ID.to_lowercase()));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o444);
    }

    #[test]
    fn only_a_file_can_be_a_machine_id() {
        let root = tempfile::tempdir().unwrap();
        let identity = IdentityFiles::prepare(root.path());
        assert_eq!(identity.renew_machine_id(ID).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(!root.path().join(MACHINE_ID).exists());
        fs::create_dir_all(root.path().join(MACHINE_ID)).unwrap();
        assert!(IdentityFiles::prepare(root.path()).renew_machine_id(ID).is_err());
    }

    #[test]
    fn a_generation_follows_another() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join(GENERATION_DIR).join(GENERATION);
        for generation in ["one", "two"] {
            let identity = IdentityFiles::prepare(root.path());
            identity.renew_generation(generation).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), format!("{generation}\n"));
        }
    }
}
