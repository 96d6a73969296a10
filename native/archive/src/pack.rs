//! Packs a tree into an archive. The tree may change meanwhile: what vanishes is left out, and `entries.rs` writes files that grow or become
//! shorter.

use std::ffi::{CStr, CString, OsStr};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use machinen_protocol::names::GUEST_CONFIG;
use rustix::fs::{CWD, Dir};

use crate::chunk_writer::ChunkWriter;
use crate::entries::{Archive, Whole};
use crate::error::Error;
use crate::held::{Directories, Held};

/// File systems that the kernel generates: their files have no end, or no meaning elsewhere. Magic numbers of proc, sysfs, cgroup2 and
/// devpts.
const GENERATED: [u64; 4] = [0x9fa0, 0x6265_6572, 0x6367_7270, 0x1cd1];

/// The tree or file to be packed.
pub struct Source {
    path: PathBuf,
    held: Held,
    excludes: Vec<CString>,
    whole: Option<Whole>,
    name: Option<PathBuf>,
}

impl Source {
    /// Opens the source at `path`. With `follow`, a symbolic link stands for its target.
    ///
    /// # Errors
    /// When nothing is there, or it cannot be opened; `InvalidInput` when a pattern of `excludes` holds a NUL byte.
    pub fn open(path: impl AsRef<Path>, excludes: &[String], follow: bool) -> io::Result<Self> {
        let path = path.as_ref().to_owned();
        let excludes = excludes.iter().map(|pattern| CString::new(pattern.as_str())).collect::<Result<_, _>>()?;
        let held = Held::look(CWD, path.as_os_str(), follow)?;
        Ok(Self { path, held, excludes, whole: None, name: None })
    }

    /// Sets the name of a single file in the archive, in place of its own.
    pub fn named(self, name: &str) -> Self {
        Self { name: Some(name.into()), ..self }
    }

    /// The file system mounted at `path`, with everything a file has, also extended attributes (with them capabilities and ACLs).
    /// Modification times later than `newest`, in seconds since 1970, are set to it.
    ///
    /// # Errors
    /// Those of [`Source::open`].
    pub fn filesystem(path: impl AsRef<Path>, newest: Option<u64>) -> io::Result<Self> {
        let source = Self::open(path, &[], true)?;
        let whole = Some(Whole { device: source.held.stat.st_dev, newest });
        Ok(Self { whole, ..source })
    }

    /// Writes the archive. Returns the number of its entries.
    ///
    /// # Errors
    /// `Io` with the path of the first file that cannot be read, or keeps changing while it is read; with the source's own path when
    /// `writer` takes no more.
    pub fn pack(&self, writer: ChunkWriter) -> Result<u64, Error> {
        let failed = |path: &Path, error: io::Error| Error::Io { path: path.to_string_lossy().into_owned(), error };
        let mut archive = Archive::new(writer, self.whole.as_ref());
        if self.held.is_directory() {
            let mut directories = Directories::below(&self.held).map_err(|error| failed(&self.path, error))?;
            let top = directories.open(Path::new("")).and_then(|top| self.children(top, Path::new("")));
            let mut pending = top.map_err(|error| failed(&self.path, error))?;
            while let Some(relative) = pending.pop() {
                match self.add(&mut archive, &mut directories, &relative) {
                    // What has vanished is left out.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    added => pending.extend(added.map_err(|error| failed(&self.path.join(&relative), error))?),
                }
            }
        } else {
            let own = || Path::new(self.path.file_name().unwrap_or(self.path.as_os_str()));
            let name = self.name.as_deref().unwrap_or_else(own);
            archive.append(&self.held, name).map_err(|error| failed(&self.path, error))?;
        }
        archive.finish().map_err(|error| failed(&self.path, error))
    }

    /// Appends an entry. For a directory that is entered, returns the names in it.
    fn add(&self, archive: &mut Archive, directories: &mut Directories, relative: &Path) -> io::Result<Vec<PathBuf>> {
        let (parent, name) = (relative.parent().unwrap_or(Path::new("")), relative.file_name().unwrap_or_default());
        let held = Held::look(directories.open(parent)?, name, false)?;
        archive.append(&held, relative)?;
        let entered = match &self.whole {
            None => !is_generated(&held.fd),
            Some(Whole { device, .. }) => held.stat.st_dev == *device,
        };
        if held.is_directory() && entered {
            self.children(directories.open(relative)?, relative)
        } else {
            Ok(Vec::new())
        }
    }

    /// The names in a directory that are not excluded, in descending order.
    fn children(&self, directory: BorrowedFd, relative: &Path) -> io::Result<Vec<PathBuf>> {
        let mut children = Vec::new();
        for entry in Dir::read_from(directory)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name == b"." || name == b".." {
                continue;
            }
            let child = relative.join(OsStr::from_bytes(name));
            // The image to come gets a configuration of its own from the host.
            let config = self.whole.is_some() && child == Path::new(GUEST_CONFIG);
            if !config && !self.excluded(&child)? {
                children.push(child);
            }
        }
        children.sort_unstable_by(|a, b| b.cmp(a));
        Ok(children)
    }

    /// Whether a pattern matches the path below the source, or, for a pattern without a slash, the name alone.
    fn excluded(&self, relative: &Path) -> io::Result<bool> {
        let path = CString::new(relative.as_os_str().as_encoded_bytes())?;
        let name = CString::new(relative.file_name().unwrap_or_default().as_encoded_bytes())?;
        let matches = |pattern: &CString| {
            fnmatch(pattern, &path) || (!pattern.as_bytes().contains(&b'/') && fnmatch(pattern, &name))
        };
        Ok(self.excludes.iter().any(matches))
    }
}

fn fnmatch(pattern: &CStr, text: &CStr) -> bool {
    // SAFETY: both strings end with NUL and outlive the call, which only reads them.
    unsafe { libc::fnmatch(pattern.as_ptr(), text.as_ptr(), 0) == 0 }
}

fn is_generated(directory: impl AsFd) -> bool {
    rustix::fs::fstatfs(directory).is_ok_and(|found| GENERATED.contains(&found.f_type.cast_unsigned()))
}
