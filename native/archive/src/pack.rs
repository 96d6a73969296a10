//! From a tree to an archive. The tree may change meanwhile: what vanishes is left out, what grows is cut at the size it had, what
//! shrinks is filled with zeros.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::fs::{self, File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use tar::{Builder, EntryType, Header, HeaderMode};

use crate::sparse::{self, Parts};
use crate::{Error, Pieces};

/// Filesystems the kernel makes up: their files have no end or no meaning elsewhere. Magic numbers of proc, sysfs, cgroup2 and devpts.
const MADE_UP: [u64; 4] = [0x9fa0, 0x6265_6572, 0x6367_7270, 0x1cd1];

/// Of a tar.
const BLOCK: usize = 512;
/// An attribute, or the list of their names, has no more (XATTR_SIZE_MAX and XATTR_LIST_MAX, linux/limits.h).
const ATTRIBUTE: usize = 64 * 1024;

/// What is to be packed.
pub struct Source {
    path: PathBuf,
    metadata: Metadata,
    excludes: Vec<CString>,
    whole: Option<Whole>,
    name: Option<PathBuf>,
}

/// Of a filesystem that is packed as a whole.
struct Whole {
    /// Directories on another device are something mounted there: their content is not of this filesystem.
    device: u64,
    newest: Option<u64>,
}

/// Where the host put its configuration into an image; the one to come has its own.
const CONFIG: &str = "machinen-config.json";

impl Source {
    /// Looks at `path`, following it if it is a symbolic link.
    pub fn open(path: &str, excludes: &[String]) -> io::Result<Self> {
        let excludes = excludes.iter().map(|pattern| CString::new(pattern.as_str())).collect::<Result<_, _>>()?;
        Ok(Self { path: path.into(), metadata: fs::metadata(path)?, excludes, whole: None, name: None })
    }

    /// What a single file is called in the archive, if not as it is.
    pub fn named(self, name: &str) -> Self {
        Self { name: Some(name.into()), ..self }
    }

    /// The filesystem mounted at `path`, with everything a file has: also extended attributes, and with them capabilities and ACLs.
    pub fn filesystem(path: impl AsRef<Path>, newest: Option<u64>) -> io::Result<Self> {
        let (path, metadata) = (path.as_ref().to_owned(), fs::metadata(path)?);
        let whole = Some(Whole { device: metadata.dev(), newest });
        Ok(Self { path, metadata, excludes: Vec::new(), whole, name: None })
    }

    /// Writes the archive. Returns the number of its entries.
    pub fn pack(&self, pieces: Pieces) -> Result<u64, Error> {
        let failed = |path: &Path, error: io::Error| Error::Io { path: path.to_string_lossy().into_owned(), error };
        let whole = self.whole.as_ref();
        let buffer = vec![0; ATTRIBUTE];
        let mut archive = Archive { builder: Builder::new(pieces), entries: 0, links: HashMap::new(), whole, buffer };
        if self.metadata.is_dir() {
            let mut pending = self.children(Path::new("")).map_err(|error| failed(&self.path, error))?;
            while let Some(relative) = pending.pop() {
                let path = self.path.join(&relative);
                let directory = match archive.add(&path, &relative) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                    added => added.map_err(|error| failed(&path, error))?,
                };
                if directory && self.is_entered(&path) {
                    match self.children(&relative) {
                        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                        children => pending.extend(children.map_err(|error| failed(&path, error))?),
                    }
                }
            }
        } else {
            let own = || Path::new(self.path.file_name().unwrap_or(self.path.as_os_str()));
            let name = self.name.as_deref().unwrap_or_else(own);
            archive.append(&self.path, name, &self.metadata).map_err(|error| failed(&self.path, error))?;
        }
        let flushed = archive.builder.into_inner().and_then(|mut pieces| pieces.flush());
        flushed.map_err(|error| failed(&self.path, error))?;
        Ok(archive.entries)
    }

    /// Whether what is in a directory is packed too. One that has vanished is found out by who opens it.
    fn is_entered(&self, directory: &Path) -> bool {
        match &self.whole {
            None => !made_up(directory),
            Some(Whole { device, .. }) => fs::symlink_metadata(directory).is_ok_and(|found| found.dev() == *device),
        }
    }

    /// What is in a directory and not excluded, last name first.
    fn children(&self, relative: &Path) -> io::Result<Vec<PathBuf>> {
        let mut children = Vec::new();
        for entry in fs::read_dir(self.path.join(relative))? {
            let child = relative.join(entry?.file_name());
            let config = self.whole.is_some() && child == Path::new(CONFIG);
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

fn made_up(directory: &Path) -> bool {
    rustix::fs::statfs(directory).is_ok_and(|found| MADE_UP.contains(&found.f_type.cast_unsigned()))
}

fn described_by(metadata: &Metadata, mut header: Header) -> Header {
    header.set_metadata_in_mode(metadata, HeaderMode::Complete);
    header.set_mtime(metadata.mtime().max(0).unsigned_abs());
    header
}

struct Archive<'a, 'p> {
    builder: Builder<Pieces<'p>>,
    entries: u64,
    /// Where files with several names were put: their other names become hard links to that.
    links: HashMap<(u64, u64), PathBuf>,
    whole: Option<&'a Whole>,
    /// For extended attributes.
    buffer: Vec<u8>,
}

impl Archive<'_, '_> {
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
        let mut header = described_by(metadata, Header::new_gnu());
        if let Some(newest) = self.whole.and_then(|whole| whole.newest) {
            header.set_mtime(metadata.mtime().max(0).unsigned_abs().min(newest));
        }
        let second_name = self.links.contains_key(&(metadata.dev(), metadata.ino()));
        if self.whole.is_some() && !second_name {
            self.append_attributes(path)?;
        }
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

    /// Extended attributes, for the entry that comes next, the way GNU tar and libarchive write them.
    fn append_attributes(&mut self, path: &Path) -> io::Result<()> {
        let attributes = attributes(path, &mut self.buffer)?;
        let records = attributes.iter().map(|(name, value)| (name.as_str(), value.as_slice()));
        if attributes.is_empty() { Ok(()) } else { self.builder.append_pax_extensions(records) }
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
        let (file, size) = (File::from(file), metadata.len());
        // Fewer blocks than it is long: it has holes. Images are read by others, who may not know that form.
        let parts = if self.whole.is_none() && metadata.blocks() < size / 512 {
            Some(sparse::parts(&file, size)?)
        } else {
            None
        };
        if let Some(parts) = parts {
            let (map, data) = (sparse::write_map(&parts), parts.iter().map(|part| part.length).sum::<u64>());
            let digits = size.to_string();
            let described = [
                (sparse::MAJOR, b"1".as_slice()),
                (sparse::MINOR, b"0"),
                (sparse::NAME, name.as_os_str().as_encoded_bytes()),
                (sparse::SIZE, digits.as_bytes()),
            ];
            self.builder.append_pax_extensions(described)?;
            // What other programs read of the extended headers depends on the format of this one.
            let mut header = described_by(metadata, Header::new_ustar());
            header.set_size(map.len() as u64 + data);
            self.append_content(&mut header, name, map.as_slice().chain(Parts::new(&file, &parts)))?;
        } else {
            self.append_content(&mut header, name, file.chain(io::repeat(0)).take(size))?;
        }
        if metadata.nlink() > 1 {
            self.links.insert(identity, name.to_owned());
        }
        Ok(())
    }

    /// The builder's own way reads 8 KiB at a time, and in an emulated machine it is the number of system calls that counts.
    fn append_content(&mut self, header: &mut Header, name: &Path, mut content: impl Read) -> io::Result<()> {
        self.builder.append_data(header, name, io::empty())?;
        let pieces = self.builder.get_mut();
        let mut written = 0;
        loop {
            let n = match content.read(pieces.spare()?) {
                Ok(0) => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                n => n?,
            };
            pieces.advance(n);
            written += n;
        }
        pieces.write_all(&[0; BLOCK][..written.next_multiple_of(BLOCK) - written])
    }
}

/// The extended attributes of what is at `path` as records of a pax header, in order. A filesystem that has none of them has none.
fn attributes(path: &Path, buffer: &mut [u8]) -> io::Result<Vec<(String, Vec<u8>)>> {
    let length = match rustix::fs::llistxattr(path, &mut *buffer) {
        Err(Errno::OPNOTSUPP) => 0,
        length => length?,
    };
    let names = buffer[..length].to_vec();
    let mut found = Vec::new();
    // Each name ends with NUL.
    for name in names.split_inclusive(|byte| *byte == 0).filter_map(|name| CStr::from_bytes_with_nul(name).ok()) {
        let Ok(key) = name.to_str() else { continue };
        match rustix::fs::lgetxattr(path, name, &mut *buffer) {
            // Removed meanwhile.
            Err(Errno::NODATA) => {}
            length => found.push((format!("SCHILY.xattr.{key}"), buffer[..length?].to_vec())),
        }
    }
    found.sort_unstable();
    Ok(found)
}
