//! Packs a tree into an archive. The tree may change meanwhile. What vanishes is left out, a file that grows is cut at the size it had, and
//! a file that becomes shorter is packed a second time under the same name, which replaces the first.

use std::collections::HashMap;
use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use machinen_protocol::names::GUEST_CONFIG;
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;
use tar::{Builder, EntryType, Header};

use crate::chunk_writer::ChunkWriter;
use crate::error::Error;
use crate::sparse::{self, Parts};
use crate::times;

/// File systems that the kernel generates: their files have no end, or no meaning elsewhere. Magic numbers of proc, sysfs, cgroup2 and
/// devpts.
const MADE_UP: [u64; 4] = [0x9fa0, 0x6265_6572, 0x6367_7270, 0x1cd1];

/// The size of a tar's block in bytes.
const BLOCK: u64 = 512;
/// The longest attribute, and the longest list of their names, in bytes (XATTR_SIZE_MAX and XATTR_LIST_MAX, linux/limits.h).
const ATTRIBUTE: usize = 64 * 1024;
/// A file whose stated size is below this is read to its end before its header is written, because files of /proc and /sys do not know
/// their size.
const FIRST: usize = 64 * 1024;
/// The longest file, in bytes, whose size only a read can tell; it is held in memory.
const MAX_UNKNOWN: u64 = 16 << 20;
const CHANGES: &str = "it keeps changing while it is copied";
/// How often a name is looked up, or a file read, before a change to it counts as an error.
const TRIES: usize = 5;

/// The tree or file to be packed.
pub struct Source {
    path: PathBuf,
    held: Held,
    excludes: Vec<CString>,
    whole: Option<Whole>,
    name: Option<PathBuf>,
}

/// Options of a file system that is packed as a whole.
struct Whole {
    /// Directories on another device are mount points, whose content is not of this file system.
    device: u64,
    newest: Option<u64>,
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
        let whole = self.whole.as_ref();
        let mut archive = Archive {
            builder: Builder::new(writer),
            entries: 0,
            links: HashMap::new(),
            whole,
            buffer: vec![0; ATTRIBUTE],
            first: vec![0; FIRST],
        };
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
        let flushed = archive.builder.into_inner().and_then(|mut writer| writer.flush());
        flushed.map_err(|error| failed(&self.path, error))?;
        Ok(archive.entries)
    }

    /// Appends an entry. For a directory that is entered, returns the names in it.
    fn add(&self, archive: &mut Archive, directories: &mut Directories, relative: &Path) -> io::Result<Vec<PathBuf>> {
        let (parent, name) = (relative.parent().unwrap_or(Path::new("")), relative.file_name().unwrap_or_default());
        let held = Held::look(directories.open(parent)?, name, false)?;
        archive.append(&held, relative)?;
        let entered = match &self.whole {
            None => !made_up(&held.fd),
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

fn made_up(directory: impl AsFd) -> bool {
    rustix::fs::fstatfs(directory).is_ok_and(|found| MADE_UP.contains(&found.f_type.cast_unsigned()))
}

/// A file, held open since its name was looked up. Whatever happens to the name later, all that is packed is of this file.
struct Held {
    /// Open for reading if it is a regular file; otherwise only held (O_PATH), because opening a device or a fifo can have effects.
    fd: OwnedFd,
    stat: Stat,
}

impl Held {
    fn look(parent: BorrowedFd, name: &OsStr, follow: bool) -> io::Result<Self> {
        let (at, open) =
            if follow { (AtFlags::empty(), OFlags::empty()) } else { (AtFlags::SYMLINK_NOFOLLOW, OFlags::NOFOLLOW) };
        for _ in 0..TRIES {
            let seen = rustix::fs::statat(parent, name, at)?;
            let access = match kind(&seen) {
                // With NONBLOCK, which does not wait for a writer if the name is a fifo by now.
                FileType::RegularFile => OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY,
                _ => OFlags::PATH,
            };
            let fd = match rustix::fs::openat(parent, name, access | open | OFlags::CLOEXEC, Mode::empty()) {
                // The name is a link or a socket by now.
                Err(Errno::LOOP | Errno::NXIO) => continue,
                fd => fd?,
            };
            let stat = rustix::fs::fstat(&fd)?;
            if (stat.st_dev, stat.st_ino, kind(&stat)) == (seen.st_dev, seen.st_ino, kind(&seen)) {
                return Ok(Self { fd, stat });
            }
        }
        Err(io::Error::other(CHANGES))
    }

    fn is_directory(&self) -> bool {
        kind(&self.stat) == FileType::Directory
    }
}

fn kind(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

/// Directories below one that is held. The kernel follows no symbolic link on the way to them (openat2).
struct Directories {
    root: OwnedFd,
    /// The directory that was opened last, because its files come next.
    last: Option<(PathBuf, OwnedFd)>,
}

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

impl Directories {
    fn below(held: &Held) -> io::Result<Self> {
        Ok(Self { root: rustix::fs::openat(&held.fd, ".", DIRECTORY, Mode::empty())?, last: None })
    }

    fn open(&mut self, relative: &Path) -> io::Result<BorrowedFd<'_>> {
        if relative.as_os_str().is_empty() {
            return Ok(self.root.as_fd());
        }
        let fd = match self.last.take().filter(|(path, _)| path == relative) {
            Some((_, fd)) => fd,
            None => {
                let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
                match rustix::fs::openat2(&self.root, relative, DIRECTORY, Mode::empty(), resolve) {
                    // Something else has taken its name, or a name above it.
                    Err(Errno::LOOP | Errno::NOTDIR) => return Err(Errno::NOENT.into()),
                    fd => fd?,
                }
            }
        };
        Ok(self.last.insert((relative.to_owned(), fd)).1.as_fd())
    }
}

struct Archive<'a, 'p> {
    builder: Builder<ChunkWriter<'p>>,
    entries: u64,
    /// The first entry of each file with several names; its other names become hard links to that entry.
    links: HashMap<(u64, u64), PathBuf>,
    whole: Option<&'a Whole>,
    /// A buffer for extended attributes.
    buffer: Vec<u8>,
    /// A buffer for the beginning of a file.
    first: Vec<u8>,
}

/// The extended headers of an entry.
type Records = Vec<(String, Vec<u8>)>;

impl Archive<'_, '_> {
    /// Appends an entry. Everything that can fail is done before the first header is written, because a header left behind would describe
    /// the next entry.
    fn append(&mut self, held: &Held, name: &Path) -> io::Result<()> {
        let Held { fd, stat } = held;
        let identity = (stat.st_dev, stat.st_ino);
        match kind(stat) {
            // A socket is useless without the process that made it.
            FileType::Socket => return Ok(()),
            FileType::RegularFile => {
                if let Some(first) = self.links.get(&identity) {
                    let mut header = self.described(Header::new_gnu(), stat, EntryType::Link);
                    self.builder.append_link(&mut header, name, first)?;
                    self.entries += 1;
                    return Ok(());
                }
                self.append_file(File::from(fd.try_clone()?), name, *stat)?;
                if stat.st_nlink > 1 {
                    self.links.insert(identity, name.to_owned());
                }
            }
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(fd, "", Vec::new())?;
                let mut header = self.begin(held, EntryType::Symlink)?;
                self.builder.append_link(&mut header, name, OsStr::from_bytes(target.as_bytes()))?;
            }
            other => {
                let entry_type = match other {
                    FileType::Directory => EntryType::Directory,
                    FileType::Fifo => EntryType::Fifo,
                    FileType::CharacterDevice => EntryType::Char,
                    _ => EntryType::Block,
                };
                let mut header = self.begin(held, entry_type)?;
                if matches!(entry_type, EntryType::Char | EntryType::Block) {
                    header.set_device_major(rustix::fs::major(stat.st_rdev))?;
                    header.set_device_minor(rustix::fs::minor(stat.st_rdev))?;
                }
                self.builder.append_data(&mut header, name, io::empty())?;
            }
        }
        self.entries += 1;
        Ok(())
    }

    /// Writes the extended headers of an entry without content, and returns its header.
    fn begin(&mut self, held: &Held, entry_type: EntryType) -> io::Result<Header> {
        let records = self.records(&held.fd, &held.stat)?;
        write_records(&mut self.builder, &records)?;
        Ok(self.described(Header::new_gnu(), &held.stat, entry_type))
    }

    fn described(&self, mut header: Header, stat: &Stat, entry_type: EntryType) -> Header {
        header.set_entry_type(entry_type);
        header.set_mode(stat.st_mode & 0o7777);
        header.set_uid(stat.st_uid.into());
        header.set_gid(stat.st_gid.into());
        header.set_mtime(times::header_seconds(self.seconds(stat)));
        header.set_size(0);
        header
    }

    fn seconds(&self, stat: &Stat) -> i64 {
        let newest = self.whole.and_then(|whole| whole.newest).and_then(|newest| i64::try_from(newest).ok());
        newest.map_or(stat.st_mtime, |newest| stat.st_mtime.min(newest))
    }

    /// The extended headers for what a plain header has no room for. An image has whole seconds, so that the same tree gives the same
    /// bytes.
    fn records(&mut self, fd: impl AsFd, stat: &Stat) -> io::Result<Records> {
        let (mut records, nanoseconds) = match self.whole {
            Some(_) => (attributes(fd, &mut self.buffer)?, 0),
            None => (Vec::new(), stat.st_mtime_nsec),
        };
        let seconds = self.seconds(stat);
        if nanoseconds != 0 || i64::try_from(times::header_seconds(seconds)) != Ok(seconds) {
            records.push((times::KEY.into(), times::write(seconds, nanoseconds).into_bytes()));
        }
        Ok(records)
    }

    fn append_file(&mut self, mut file: File, name: &Path, mut stat: Stat) -> io::Result<()> {
        for _ in 0..TRIES {
            if self.append_content(&file, name, &stat)? == 0 {
                return Ok(());
            }
            let now = rustix::fs::fstat(&file)?;
            if now.st_size >= stat.st_size {
                return Err(io::Error::other("it ends before the size that the kernel tells of it"));
            }
            stat = now;
            file.rewind()?;
        }
        Err(io::Error::other(CHANGES))
    }

    /// Appends a file of this size. Returns with how many zeros its entry was filled up because the file had become shorter.
    fn append_content(&mut self, mut file: &File, name: &Path, stat: &Stat) -> io::Result<u64> {
        let size = stat.st_size.unsigned_abs();
        let mut records = self.records(file, stat)?;
        // A file with fewer blocks than its length may have holes. Images are read by other programs, which may not know the sparse form.
        if self.whole.is_none() && stat.st_blocks.unsigned_abs() < size / BLOCK {
            let parts = sparse::parts(file, size)?;
            // Searching for data has moved the file's position.
            file.rewind()?;
            if !sparse::is_solid(&parts, size) {
                let (map, data) = (sparse::write_map(&parts), parts.iter().map(|part| part.length).sum::<u64>());
                records.extend([
                    (sparse::MAJOR.into(), b"1".to_vec()),
                    (sparse::MINOR.into(), b"0".to_vec()),
                    (sparse::NAME.into(), name.as_os_str().as_bytes().to_vec()),
                    (sparse::SIZE.into(), size.to_string().into_bytes()),
                ]);
                let stored = map.len() as u64 + data;
                // A ustar header, because other programs read the extended headers only before this format.
                let header = self.described(Header::new_ustar(), stat, EntryType::Regular);
                return self.write_entry(
                    &records,
                    header,
                    name,
                    stored,
                    map.as_slice().chain(Parts::new(file, &parts)),
                );
            }
        }
        let header = self.described(Header::new_gnu(), stat, EntryType::Regular);
        if size >= FIRST as u64 {
            return self.write_entry(&records, header, name, size, file);
        }
        let mut first = std::mem::take(&mut self.first);
        let missing = self.append_read(file, &records, header, name, &mut first);
        self.first = first;
        missing
    }

    /// Appends what can be read, whatever size the kernel states.
    fn append_read(
        &mut self,
        file: &File,
        records: &Records,
        header: Header,
        name: &Path,
        first: &mut [u8],
    ) -> io::Result<u64> {
        let n = fill(file, first)?;
        if n < first.len() {
            return self.write_entry(records, header, name, n as u64, &first[..n]);
        }
        let grown = rustix::fs::fstat(file)?.st_size.unsigned_abs();
        if grown > n as u64 {
            return self.write_entry(records, header, name, grown, (&*first).chain(file));
        }
        let mut all = first.to_vec();
        file.take(MAX_UNKNOWN).read_to_end(&mut all)?;
        if all.len() as u64 > MAX_UNKNOWN {
            return Err(Errno::FBIG.into());
        }
        self.write_entry(records, header, name, all.len() as u64, all.as_slice())
    }

    /// Writes headers and `size` bytes of content. Returns how many of them are zeros because the content was shorter. The builder's own
    /// method reads 8 KiB at a time, and in an emulated machine the number of system calls decides the speed.
    fn write_entry(
        &mut self,
        records: &Records,
        mut header: Header,
        name: &Path,
        size: u64,
        mut content: impl Read,
    ) -> io::Result<u64> {
        write_records(&mut self.builder, records)?;
        header.set_size(size);
        self.builder.append_data(&mut header, name, io::empty())?;
        let writer = self.builder.get_mut();
        let mut left = size;
        while left > 0 {
            let spare = writer.spare()?;
            let length = spare.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            match content.read(&mut spare[..length]) {
                Ok(0) => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                n => {
                    let n = n?;
                    writer.advance(n);
                    left -= n as u64;
                }
            }
        }
        io::copy(&mut io::repeat(0).take(left + size.next_multiple_of(BLOCK) - size), writer)?;
        Ok(left)
    }
}

/// Fills the buffer, as far as the file goes.
fn fill(mut file: &File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            n => filled += n?,
        }
    }
    Ok(filled)
}

fn write_records(builder: &mut Builder<ChunkWriter>, records: &Records) -> io::Result<()> {
    let texts = records.iter().map(|(key, value)| (key.as_str(), value.as_slice()));
    if records.is_empty() { Ok(()) } else { builder.append_pax_extensions(texts) }
}

/// The extended attributes of the file, as GNU tar and libarchive write them, in order. A file system without extended attributes gives
/// none.
fn attributes(held: impl AsFd, buffer: &mut [u8]) -> io::Result<Records> {
    // The only path that leads to a link or a device that is held without being open.
    let path = format!("/proc/self/fd/{}", held.as_fd().as_raw_fd());
    let length = match rustix::fs::listxattr(&path, &mut *buffer) {
        Err(Errno::OPNOTSUPP) => 0,
        length => length?,
    };
    let names = buffer[..length].to_vec();
    let mut found = Vec::new();
    // Each name ends with NUL.
    for name in names.split_inclusive(|byte| *byte == 0).filter_map(|name| CStr::from_bytes_with_nul(name).ok()) {
        let Ok(key) = name.to_str() else { continue };
        match rustix::fs::getxattr(&path, name, &mut *buffer) {
            // The attribute was removed meanwhile.
            Err(Errno::NODATA) => {}
            length => found.push((format!("SCHILY.xattr.{key}"), buffer[..length?].to_vec())),
        }
    }
    found.sort_unstable();
    Ok(found)
}
