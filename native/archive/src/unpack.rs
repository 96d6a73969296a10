//! Unpacks an archive into a tree. The archive is not trusted: no name in it, and no symbolic link that it makes or meets, leads out of the
//! target. The kernel enforces that (`openat2`), so no race can get round it.

use std::cell::Cell;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, Uid};
use rustix::io::Errno;
use tar::{Entry, EntryType};

use crate::error::{Error, errno, invalid};
use crate::sparse::{self, Part};
use crate::times;

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
        let attributes = Attributes::of(entry, self.keeps_owners)?;
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
            attributes.set_owner(&directory)?;
            rustix::fs::fchmod(&directory, attributes.mode | Mode::RWXU)?;
            directories.open.push((name.to_owned(), attributes));
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
                attributes.set_on(&draft.file)?;
                rustix::fs::futimens(&draft.file, &attributes.times)?;
                attributes.check_time(&rustix::fs::fstat(&draft.file)?)?;
                draft.place(last)?;
            }
            EntryType::Link => self.link(entry, name, parent)?,
            EntryType::Symlink => {
                let to = entry.link_name()?.ok_or_else(|| invalid("a symbolic link to nothing"))?;
                remove(parent, last.as_ref())?;
                rustix::fs::symlinkat(to.as_ref(), parent, last)?;
                attributes.set_at(parent, last.as_ref(), false)?;
            }
            EntryType::Char | EntryType::Block if !self.keeps_owners => {}
            EntryType::Fifo | EntryType::Char | EntryType::Block => {
                remove(parent, last.as_ref())?;
                let (node, device) = node(entry)?;
                rustix::fs::mknodat(parent, last, node, attributes.mode, device)?;
                attributes.set_at(parent, last.as_ref(), true)?;
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
    open: Vec<(PathBuf, Attributes)>,
}

impl Directories<'_> {
    /// Finishes the directories in which the next entry, `name`, is not.
    fn leave(&mut self, name: &Path) {
        while let Some((directory, attributes)) = self.open.pop_if(|(directory, _)| !is_below(name, directory)) {
            // A directory that another process has renamed since is left as it is.
            if let Ok(directory) = self.target.open_directory(&directory) {
                let _ = rustix::fs::fchmod(&directory, attributes.mode);
                let _ = rustix::fs::futimens(directory, &attributes.times);
            }
        }
    }
}

fn is_below(name: &Path, directory: &Path) -> bool {
    name != directory && name.starts_with(directory)
}

struct Attributes {
    mode: Mode,
    uid: Option<Uid>,
    gid: Option<Gid>,
    times: Timestamps,
}

impl Attributes {
    fn of(entry: &mut Entry<impl Read>, keeps_owners: bool) -> io::Result<Self> {
        let time = time(entry)?;
        let header = entry.header();
        let id =
            |id: u64| u32::try_from(id).ok().filter(|id| *id != u32::MAX).ok_or_else(|| invalid("an impossible owner"));
        Ok(Self {
            mode: Mode::from_raw_mode(header.mode()? & if keeps_owners { 0o7777 } else { 0o1777 }),
            uid: keeps_owners.then(|| id(header.uid()?).map(Uid::from_raw)).transpose()?,
            gid: keeps_owners.then(|| id(header.gid()?).map(Gid::from_raw)).transpose()?,
            times: Timestamps { last_access: time, last_modification: time },
        })
    }

    /// Sets the owner first, because changing it clears set-id bits.
    fn set_on(&self, file: impl AsFd) -> rustix::io::Result<()> {
        self.set_owner(&file)?;
        rustix::fs::fchmod(&file, self.mode)
    }

    fn set_owner(&self, file: impl AsFd) -> rustix::io::Result<()> {
        if self.uid.is_some() { rustix::fs::fchown(&file, self.uid, self.gid) } else { Ok(()) }
    }

    fn set_at(&self, parent: BorrowedFd, name: &Path, has_mode: bool) -> rustix::io::Result<()> {
        if self.uid.is_some() {
            rustix::fs::chownat(parent, name, self.uid, self.gid, AtFlags::SYMLINK_NOFOLLOW)?;
        }
        if has_mode {
            rustix::fs::chmodat(parent, name, self.mode, AtFlags::empty())?;
        }
        rustix::fs::utimensat(parent, name, &self.times, AtFlags::SYMLINK_NOFOLLOW)?;
        self.check_time(&rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?)
    }

    /// Checks the time that the file got, because a file system silently stores the nearest time it can hold. FAT counts in steps of two
    /// seconds.
    fn check_time(&self, found: &Stat) -> rustix::io::Result<()> {
        let difference = found.st_mtime.abs_diff(self.times.last_modification.tv_sec);
        if difference <= 2 { Ok(()) } else { Err(Errno::OVERFLOW) }
    }
}

fn time(entry: &mut Entry<impl Read>) -> io::Result<Timespec> {
    let impossible = || invalid("an impossible time");
    for extension in entry.pax_extensions()?.into_iter().flatten() {
        let extension = extension?;
        if extension.key() == Ok(times::KEY) {
            return extension.value().ok().and_then(times::read).ok_or_else(impossible);
        }
    }
    let seconds = i64::try_from(entry.header().mtime()?).map_err(|_| impossible())?;
    Ok(Timespec { tv_sec: seconds, tv_nsec: 0 })
}

/// A file that gets its name only when it is whole. Until then it has no name, so that nothing of it is left even if this process is
/// killed. On a file system without such files it has a temporary name, which is removed with the draft.
struct Draft<'a> {
    parent: BorrowedFd<'a>,
    file: OwnedFd,
    name: Option<String>,
}

static DRAFTS: AtomicU64 = AtomicU64::new(0);

impl<'a> Draft<'a> {
    fn begin(parent: BorrowedFd<'a>) -> rustix::io::Result<Self> {
        let (flags, mode) = (OFlags::WRONLY | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR);
        match rustix::fs::openat(parent, ".", flags | OFlags::TMPFILE, mode) {
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL | Errno::NOENT) => {}
            file => return Ok(Self { parent, file: file?, name: None }),
        }
        loop {
            let name = format!(".machinen-{}-{}", std::process::id(), DRAFTS.fetch_add(1, Ordering::Relaxed));
            let flags = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
            match rustix::fs::openat(parent, &name, flags, mode) {
                Err(Errno::EXIST) => {}
                file => return Ok(Self { parent, file: file?, name: Some(name) }),
            }
        }
    }

    /// Gives the draft its name and replaces what has that name. Writing into an old file would change its other names too.
    fn place(mut self, last: &OsStr) -> rustix::io::Result<()> {
        if let Some(name) = &self.name {
            rustix::fs::renameat(self.parent, name, self.parent, last)?;
            self.name = None;
            return Ok(());
        }
        let link = || {
            let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            rustix::fs::linkat(CWD, path, self.parent, last, AtFlags::SYMLINK_FOLLOW)
        };
        match link() {
            Err(Errno::EXIST) => {
                remove(self.parent, last.as_ref())?;
                link()
            }
            linked => linked,
        }
    }
}

impl Drop for Draft<'_> {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            // The earlier failure is reported, not one of this removal.
            let _ = rustix::fs::unlinkat(self.parent, name, AtFlags::empty());
        }
    }
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

/// Removes the old file of this name. It is not written into, because it may have other names.
fn remove(parent: BorrowedFd, name: &Path) -> rustix::io::Result<()> {
    match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
        Err(Errno::NOENT) => Ok(()),
        done => done,
    }
}

/// The real size of a file with holes. The real name in the headers is ignored in favour of the entry's own.
fn sparse_size(entry: &mut Entry<impl Read>) -> io::Result<Option<u64>> {
    let Some(extensions) = entry.pax_extensions()? else { return Ok(None) };
    let (mut form, mut size) = ([None, None], None);
    for extension in extensions {
        let extension = extension?;
        let number = || extension.value().ok().and_then(|digits| digits.parse::<u64>().ok());
        match extension.key() {
            Ok(sparse::MAJOR) => form[0] = number(),
            Ok(sparse::MINOR) => form[1] = number(),
            Ok(sparse::SIZE) => size = number(),
            _ => {}
        }
    }
    match (form, size) {
        ([None, None], None) => Ok(None),
        ([Some(1), Some(0)], Some(size)) => Ok(Some(size)),
        _ => Err(invalid("a file with holes in another form than PAX 1.0")),
    }
}

/// Writes the parts of a file with holes.
fn copy_parts(entry: &mut Entry<impl Read>, file: &OwnedFd, size: u64, buffer: &mut [u8]) -> io::Result<()> {
    let left = entry.size();
    let parts = sparse::read_map(entry, left, size)?;
    rustix::fs::ftruncate(file, size)?;
    for Part { mut offset, length } in parts {
        let end = offset + length;
        while offset < end {
            let wanted = usize::try_from(end - offset).unwrap_or(usize::MAX).min(buffer.len());
            let n = entry.read(&mut buffer[..wanted])?;
            if n == 0 {
                return Err(invalid("the archive ends within it"));
            }
            let mut piece = &buffer[..n];
            while !piece.is_empty() {
                let written = rustix::io::pwrite(file, piece, offset)?;
                offset += written as u64;
                piece = &piece[written..];
            }
        }
    }
    Ok(())
}

fn copy(entry: &mut Entry<impl Read>, file: &OwnedFd, buffer: &mut [u8]) -> io::Result<()> {
    let mut copied = 0;
    loop {
        let mut piece = match entry.read(buffer)? {
            0 => break,
            n => &buffer[..n],
        };
        copied += piece.len() as u64;
        while !piece.is_empty() {
            piece = &piece[rustix::io::write(file, piece)?..];
        }
    }
    if copied == entry.size() { Ok(()) } else { Err(invalid("the archive ends within it")) }
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
