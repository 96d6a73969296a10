//! Unpacks an archive into a tree. The archive is not trusted: no name in it, and no symbolic link that it makes or meets, leads out of the
//! target. The kernel enforces that (`openat2`), so no race can get round it.

use std::cell::Cell;
use std::ffi::OsString;
use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::rc::Rc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use tar::{Entry, EntryType};

use crate::content::{copy, copy_parts, sparse_size};
use crate::draft::{Draft, remove};
use crate::error::{Error, errno, invalid};
use crate::metadata::Metadata;

/// How many bytes are written at once. In an emulated machine the number of system calls decides the speed.
const CHUNK: usize = 256 * 1024;

/// The limit of the headers of one entry in bytes, because long names and extended attributes are read into memory as a whole.
const MAX_HEADERS: u64 = 1 << 20;

/// The directory that is unpacked into, or one file in it.
pub struct Target {
    root: OwnedFd,
    resolve: ResolveFlags,
    keeps_owners: bool,
    /// The name, if the target is one file.
    name: Option<OsString>,
}

impl Target {
    /// Opens the directory, making it if it is missing.
    ///
    /// # Errors
    /// When it cannot be made or opened, or something else is there.
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        let path = path.as_ref();
        fs::create_dir_all(path)?;
        let root = rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        // Nothing leads out of the root directory, so absolute symbolic links are allowed there.
        let whole = path.components().eq([Component::RootDir]);
        let confined = if whole { ResolveFlags::IN_ROOT } else { ResolveFlags::BENEATH };
        Ok(Self { root, resolve: confined | ResolveFlags::NO_MAGICLINKS, keeps_owners: true, name: None })
    }

    /// The target for one file, link or fifo, which gets this path whatever its name in the archive. A symbolic link that is there stands
    /// for its target; a file is replaced.
    ///
    /// # Errors
    /// When its directory cannot be made or opened, or a directory, device, fifo or socket is there.
    pub fn file(path: impl AsRef<Path>) -> io::Result<Self> {
        let path = path.as_ref();
        let place = if path.is_symlink() { fs::canonicalize(path)? } else { path.to_owned() };
        let (Some(parent), Some(name)) = (place.parent(), place.file_name()) else {
            return Err(io::ErrorKind::IsADirectory.into());
        };
        let target = Self::open(if parent.as_os_str().is_empty() { Path::new(".") } else { parent })?;
        match rustix::fs::statat(&target.root, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => {}
            found => match FileType::from_raw_mode(found?.st_mode) {
                FileType::RegularFile | FileType::Symlink => {}
                FileType::Directory => return Err(Errno::ISDIR.into()),
                _ => return Err(io::Error::other("a device, fifo or socket is there, which no file replaces")),
            },
        }
        Ok(Self { name: Some(name.to_owned()), ..target })
    }

    /// Gives everything to the caller: set-id bits, which would pass on the caller's rights, are removed, and devices are not made.
    pub fn for_caller(self) -> Self {
        Self { keeps_owners: false, ..self }
    }

    /// Unpacks the archive and reads `source` to its end. Returns the number of entries. What was unpacked before a failure stays.
    ///
    /// # Errors
    /// `Refused` when the archive is malformed or cannot be read, leads out of the target, or has no entry where one file is wanted. `Io`
    /// with the name in the archive when the kernel refuses something.
    pub fn unpack(&self, source: impl Read) -> Result<u64, Error> {
        let left = Rc::new(Cell::new(0));
        let mut archive = tar::Archive::new(Limited { source, left: Rc::clone(&left) });
        let mut entries = archive.entries().map_err(|error| malformed(&error))?;
        let mut directories = Directories { target: self, open: Vec::new() };
        let mut buffer = vec![0; CHUNK];
        let mut count = 0;
        loop {
            left.set(MAX_HEADERS);
            let Some(entry) = entries.next() else { break };
            let mut entry = entry.map_err(|error| malformed(&error))?;
            left.set(u64::MAX);
            let shown = String::from_utf8_lossy(&entry.path_bytes()).chars().take(256).collect::<String>();
            let name = match &self.name {
                Some(name) => PathBuf::from(name),
                None => {
                    inside(&entry.path().map_err(|error| malformed(&error))?).map_err(|error| failed(&shown, error))?
                }
            };
            directories.leave(&name);
            self.add(&mut entry, &name, &mut directories, &mut buffer).map_err(|error| failed(&shown, error))?;
            // Reads the rest of the entry's data, so that the next turn begins with a header.
            io::copy(&mut entry, &mut io::sink()).map_err(|error| malformed(&error))?;
            count += 1;
        }
        if count == 0 && self.name.is_some() {
            return Err(Error::Refused("there is no file in it".into()));
        }
        directories.leave(Path::new(""));
        left.set(u64::MAX);
        io::copy(&mut archive.into_inner(), &mut io::sink()).map_err(|error| malformed(&error))?;
        Ok(count)
    }

    fn add(
        &self,
        entry: &mut Entry<impl Read>,
        name: &Path,
        directories: &mut Directories,
        buffer: &mut [u8],
    ) -> io::Result<()> {
        let metadata = Metadata::of(entry, self.keeps_owners)?;
        let kind = entry.header().entry_type();
        if self.name.is_some() {
            match kind {
                EntryType::Directory => return Err(Errno::ISDIR.into()),
                EntryType::Char | EntryType::Block if !self.keeps_owners => return Err(invalid("a device")),
                EntryType::Link => return Err(invalid("a hard link to another file")),
                _ => {}
            }
        }
        let Some(last) = name.file_name() else {
            // The target itself keeps its attributes, whatever the archive says.
            return if kind.is_dir() { Ok(()) } else { Err(io::ErrorKind::IsADirectory.into()) };
        };
        if kind.is_dir() {
            let directory = self.make_directory(name)?;
            // Only the owner is set here; mode and time are set when everything in the directory has been made.
            metadata.set_owner(&directory)?;
            rustix::fs::fchmod(&directory, metadata.mode | Mode::RWXU)?;
            directories.open.push((name.to_owned(), metadata));
            return Ok(());
        }
        let parent = self.make_directory(name.parent().unwrap_or(Path::new("")))?;
        let parent = parent.as_fd();
        match kind {
            // The older form of GNU tar is refused, because no peer of ours sends it and 512 bytes of it can stand for any number of zeros.
            EntryType::GNUSparse => return Err(invalid("a file with holes in another form than PAX 1.0")),
            EntryType::Regular | EntryType::Continuous => {
                let draft = Draft::begin(parent)?;
                match sparse_size(entry)? {
                    Some(size) => copy_parts(entry, &draft.file, size, buffer)?,
                    None => copy(entry, &draft.file, buffer)?,
                }
                metadata.set_on(&draft.file)?;
                rustix::fs::futimens(&draft.file, &metadata.times)?;
                metadata.check_time(&rustix::fs::fstat(&draft.file)?)?;
                draft.place(last)?;
            }
            EntryType::Link => self.link(entry, name, parent)?,
            EntryType::Symlink => {
                let to = entry.link_name()?.ok_or_else(|| invalid("a symbolic link to nothing"))?;
                remove(parent, last.as_ref())?;
                rustix::fs::symlinkat(to.as_ref(), parent, last)?;
                metadata.set_at(parent, last.as_ref(), false)?;
            }
            EntryType::Char | EntryType::Block if !self.keeps_owners => {}
            EntryType::Fifo | EntryType::Char | EntryType::Block => {
                remove(parent, last.as_ref())?;
                let (node, device) = node(entry)?;
                rustix::fs::mknodat(parent, last, node, metadata.mode, device)?;
                metadata.set_at(parent, last.as_ref(), true)?;
            }
            EntryType::XGlobalHeader => {}
            other => return Err(invalid(&format!("an entry of type {other:?}"))),
        }
        Ok(())
    }

    fn link(&self, entry: &Entry<impl Read>, name: &Path, parent: BorrowedFd) -> io::Result<()> {
        let to = inside(&entry.link_name()?.ok_or_else(|| invalid("a hard link to nothing"))?)?;
        let (Some(to_name), Some(name_last)) = (to.file_name(), name.file_name()) else {
            return Err(invalid("a hard link to the target itself"));
        };
        if to == name {
            return Ok(());
        }
        let from = self.open_directory(to.parent().unwrap_or(Path::new("")))?;
        remove(parent, name_last.as_ref())?;
        rustix::fs::linkat(&from, to_name, parent, name_last, AtFlags::empty())?;
        Ok(())
    }

    fn open_directory(&self, name: &Path) -> rustix::io::Result<OwnedFd> {
        let name = if name.as_os_str().is_empty() { Path::new(".") } else { name };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::openat2(&self.root, name, flags, Mode::empty(), self.resolve)
    }

    /// Opens a directory below the target, and makes missing ones on the way. It does not recurse, because the peer decides how deep names
    /// are.
    fn make_directory(&self, name: &Path) -> rustix::io::Result<OwnedFd> {
        match self.open_directory(name) {
            Err(Errno::NOENT) => {}
            opened => return opened,
        }
        let mut directory = self.open_directory(Path::new(""))?;
        let mut walked = PathBuf::new();
        for component in name {
            walked.push(component);
            directory = match self.open_directory(&walked) {
                Err(Errno::NOENT) => {
                    rustix::fs::mkdirat(&directory, component, Mode::from_raw_mode(0o755))?;
                    self.open_directory(&walked)?
                }
                opened => opened?,
            };
        }
        Ok(directory)
    }
}

/// Sets mode and time of directories when everything in them has been made. Only the directories on one path from the root are remembered,
/// so a hostile archive fills no memory; an archive that comes back to a directory later changes its time.
struct Directories<'a> {
    target: &'a Target,
    open: Vec<(PathBuf, Metadata)>,
}

impl Directories<'_> {
    /// Finishes the directories in which the next entry, `name`, is not.
    fn leave(&mut self, name: &Path) {
        while let Some((directory, metadata)) = self.open.pop_if(|(directory, _)| !is_below(name, directory)) {
            // A directory that another process has renamed since is left as it is.
            if let Ok(directory) = self.target.open_directory(&directory) {
                let _ = rustix::fs::fchmod(&directory, metadata.mode);
                let _ = rustix::fs::futimens(directory, &metadata.times);
            }
        }
    }
}

fn is_below(name: &Path, directory: &Path) -> bool {
    name != directory && name.starts_with(directory)
}

fn node(entry: &Entry<impl Read>) -> io::Result<(FileType, u64)> {
    let header = entry.header();
    let kind = match header.entry_type() {
        EntryType::Fifo => return Ok((FileType::Fifo, 0)),
        EntryType::Char => FileType::CharacterDevice,
        _ => FileType::BlockDevice,
    };
    let (major, minor) = (header.device_major()?.unwrap_or(0), header.device_minor()?.unwrap_or(0));
    Ok((kind, rustix::fs::makedev(major, minor)))
}

/// The path without `.` components. Fails if it could lead out of the target.
fn inside(path: &Path) -> io::Result<PathBuf> {
    let mut inside = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => inside.push(name),
            Component::CurDir => {}
            _ => return Err(invalid("leads out of the target")),
        }
    }
    Ok(inside)
}

/// The error for bytes that are no archive.
fn malformed(error: &io::Error) -> Error {
    Error::Refused(error.to_string())
}

/// The error of an entry that could not be unpacked: the kernel's reason, or what is wrong with the archive.
fn failed(name: &str, error: io::Error) -> Error {
    match errno(&error) {
        // The kernel's error for a symbolic link that leads out of the target.
        Some(libc::EXDEV) => Error::Refused(format!("{name:?}: leads out of the target")),
        Some(_) => Error::Io { path: name.to_owned(), error },
        None => Error::Refused(format!("{name:?}: {error}")),
    }
}

/// A reader that fails after `left` bytes.
struct Limited<R> {
    source: R,
    left: Rc<Cell<u64>>,
}

impl<R: Read> Read for Limited<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.left.get()).unwrap_or(usize::MAX);
        if left == 0 {
            return Err(invalid("headers too long"));
        }
        let length = buffer.len().min(left);
        let read = self.source.read(&mut buffer[..length])?;
        self.left.set(self.left.get() - read as u64);
        Ok(read)
    }
}

#[cfg(test)]
#[path = "unpack_tests.rs"]
mod tests;
