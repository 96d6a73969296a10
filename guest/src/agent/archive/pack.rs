//! From a tree to an archive. The tree may change meanwhile: what vanishes is left out, what grows is cut at the size it had, what
//! shrinks is filled with zeros.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::fs::{self, File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags};
use tar::{Builder, EntryType, Header, HeaderMode};

use crate::reply::ErrorReply;

/// Filesystems the kernel makes up: their files have no end or no meaning elsewhere. Magic numbers of proc, sysfs, cgroup2 and devpts.
const MADE_UP: [u64; 4] = [0x9fa0, 0x6265_6572, 0x6367_7270, 0x1cd1];

/// What is to be packed.
pub struct Source {
    path: PathBuf,
    metadata: Metadata,
    excludes: Vec<CString>,
}

impl Source {
    /// Looks at `path`, following it if it is a symbolic link.
    pub fn open(path: &str, excludes: &[String]) -> io::Result<Self> {
        let excludes = excludes.iter().map(|pattern| CString::new(pattern.as_str())).collect::<Result<_, _>>()?;
        Ok(Self { path: path.into(), metadata: fs::metadata(path)?, excludes })
    }

    /// Writes the archive. Returns the number of its entries.
    pub fn pack(&self, output: impl Write) -> Result<u64, ErrorReply> {
        let failed = |path: &Path, error: io::Error| ErrorReply::io(&path.to_string_lossy(), &error);
        let mut archive = Archive { builder: Builder::new(output), entries: 0, links: HashMap::new() };
        if self.metadata.is_dir() {
            let mut pending = self.children(Path::new("")).map_err(|error| failed(&self.path, error))?;
            while let Some(relative) = pending.pop() {
                let path = self.path.join(&relative);
                let directory = match archive.add(&path, &relative) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                    added => added.map_err(|error| failed(&path, error))?,
                };
                if directory && !made_up(&path) {
                    match self.children(&relative) {
                        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                        children => pending.extend(children.map_err(|error| failed(&path, error))?),
                    }
                }
            }
        } else {
            let name = self.path.file_name().unwrap_or(self.path.as_os_str());
            archive.append(&self.path, Path::new(name), &self.metadata).map_err(|error| failed(&self.path, error))?;
        }
        let flushed = archive.builder.into_inner().and_then(|mut output| output.flush());
        flushed.map_err(|error| failed(&self.path, error))?;
        Ok(archive.entries)
    }

    /// What is in a directory and not excluded, last name first.
    fn children(&self, relative: &Path) -> io::Result<Vec<PathBuf>> {
        let mut children = Vec::new();
        for entry in fs::read_dir(self.path.join(relative))? {
            let child = relative.join(entry?.file_name());
            if !self.excluded(&child)? {
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

fn made_up(directory: &Path) -> bool {
    rustix::fs::statfs(directory).is_ok_and(|found| MADE_UP.contains(&found.f_type.cast_unsigned()))
}

struct Archive<W: Write> {
    builder: Builder<W>,
    entries: u64,
    /// Where files with several names were put: their other names become hard links to that.
    links: HashMap<(u64, u64), PathBuf>,
}

impl<W: Write> Archive<W> {
    /// Appends what is at `path`; says whether it is a directory.
    fn add(&mut self, path: &Path, name: &Path) -> io::Result<bool> {
        let metadata = fs::symlink_metadata(path)?;
        self.append(path, name, &metadata)?;
        Ok(metadata.is_dir())
    }

    fn append(&mut self, path: &Path, name: &Path, metadata: &Metadata) -> io::Result<()> {
        let kind = metadata.file_type();
        if kind.is_socket() {
            // Nothing but the process that made it can use it.
            return Ok(());
        }
        let mut header = Header::new_gnu();
        header.set_metadata_in_mode(metadata, HeaderMode::Complete);
        header.set_mtime(metadata.mtime().max(0).unsigned_abs());
        if kind.is_file() {
            self.append_file(path, name, metadata, header)?;
        } else if kind.is_symlink() {
            let target = fs::read_link(path)?;
            header.set_size(0);
            self.builder.append_link(&mut header, name, target)?;
        } else {
            if kind.is_char_device() || kind.is_block_device() {
                header.set_device_major(rustix::fs::major(metadata.rdev()))?;
                header.set_device_minor(rustix::fs::minor(metadata.rdev()))?;
            }
            header.set_size(0);
            self.builder.append_data(&mut header, name, io::empty())?;
        }
        self.entries += 1;
        Ok(())
    }

    fn append_file(&mut self, path: &Path, name: &Path, metadata: &Metadata, mut header: Header) -> io::Result<()> {
        let identity = (metadata.dev(), metadata.ino());
        if let Some(first) = self.links.get(&identity) {
            header.set_entry_type(EntryType::Link);
            header.set_size(0);
            return self.builder.append_link(&mut header, name, first);
        }
        // Should it have become a fifo meanwhile, this does not wait for a writer.
        let file = rustix::fs::openat(CWD, path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?;
        let content = File::from(file).chain(io::repeat(0)).take(metadata.len());
        self.builder.append_data(&mut header, name, content)?;
        if metadata.nlink() > 1 {
            self.links.insert(identity, name.to_owned());
        }
        Ok(())
    }
}
