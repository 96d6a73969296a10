//! From an archive to a tree. The archive is not trusted: no name in it, and no symbolic link it makes or meets, leads out of the
//! target. The kernel itself sees to that (`openat2`), so nothing depends on who looks at what first.

use std::cell::Cell;
use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::rc::Rc;

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid};
use rustix::io::Errno;
use tar::{Entry, EntryType};

use super::CHUNK;
use crate::errno;
use crate::reply::{Code, ErrorReply};

/// What the headers of one entry may take: long names and extended attributes are read into memory as a whole.
const MAX_HEADERS: u64 = 1 << 20;

/// The directory that is unpacked into.
pub struct Target {
    root: OwnedFd,
    resolve: ResolveFlags,
}

impl Target {
    /// Opens the directory, making it if it is missing.
    pub fn open(path: &str) -> io::Result<Self> {
        fs::create_dir_all(path)?;
        let root = rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        // Nothing leads out of the root directory, so absolute symbolic links are as good as others there.
        let whole = Path::new(path).components().eq([Component::RootDir]);
        let confined = if whole { ResolveFlags::IN_ROOT } else { ResolveFlags::BENEATH };
        Ok(Self { root, resolve: confined | ResolveFlags::NO_MAGICLINKS })
    }

    /// Unpacks everything and reads to the end. Returns the number of entries.
    pub fn unpack(&self, source: impl Read) -> Result<u64, ErrorReply> {
        let left = Rc::new(Cell::new(0));
        let mut archive = tar::Archive::new(Limited { source, left: Rc::clone(&left) });
        let mut entries = archive.entries().map_err(|error| malformed(&error))?;
        let mut directories = Directories { target: self, open: Vec::new() };
        let mut count = 0;
        loop {
            left.set(MAX_HEADERS);
            let Some(entry) = entries.next() else { break };
            let mut entry = entry.map_err(|error| malformed(&error))?;
            left.set(u64::MAX);
            let shown = String::from_utf8_lossy(&entry.path_bytes()).chars().take(256).collect::<String>();
            let name =
                inside(&entry.path().map_err(|error| malformed(&error))?).map_err(|error| failed(&shown, &error))?;
            directories.leave(&name);
            self.add(&mut entry, &name, &mut directories).map_err(|error| failed(&shown, &error))?;
            // Whatever of its data has not been used: only headers may be left to the next turn.
            io::copy(&mut entry, &mut io::sink()).map_err(|error| malformed(&error))?;
            count += 1;
        }
        directories.leave(Path::new(""));
        left.set(u64::MAX);
        io::copy(&mut archive.into_inner(), &mut io::sink()).map_err(|error| malformed(&error))?;
        Ok(count)
    }

    fn add(&self, entry: &mut Entry<impl Read>, name: &Path, directories: &mut Directories) -> io::Result<()> {
        let attributes = Attributes::of(entry)?;
        let kind = entry.header().entry_type();
        let Some(last) = name.file_name() else {
            // The target itself: how it looks is not the archive's business.
            return if kind.is_dir() { Ok(()) } else { Err(io::ErrorKind::IsADirectory.into()) };
        };
        if kind.is_dir() {
            let directory = self.make_directory(name)?;
            attributes.set_on(&directory)?;
            directories.open.push((name.to_owned(), attributes.times));
            return Ok(());
        }
        let parent = self.make_directory(name.parent().unwrap_or(Path::new("")))?;
        let parent = parent.as_fd();
        match kind {
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                remove(parent, last.as_ref())?;
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let file = rustix::fs::openat(parent, last, flags, Mode::RUSR | Mode::WUSR)?;
                copy(entry, &file)?;
                attributes.set_on(&file)?;
                rustix::fs::futimens(&file, &attributes.times)?;
            }
            EntryType::Link => self.link(entry, name, parent)?,
            EntryType::Symlink => {
                let to = entry.link_name()?.ok_or_else(|| invalid("a symbolic link to nothing"))?;
                remove(parent, last.as_ref())?;
                rustix::fs::symlinkat(to.as_ref(), parent, last)?;
                attributes.set_at(parent, last.as_ref(), false)?;
            }
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

    /// Opens a directory below the target, making what is missing on the way. Not by recursion: names are as deep as the peer likes.
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

/// Directories get their time when everything in them has been made. One path from the root at a time: an archive that comes back to
/// a directory later moves its time, and a hostile one fills no memory.
struct Directories<'a> {
    target: &'a Target,
    open: Vec<(PathBuf, Timestamps)>,
}

impl Directories<'_> {
    /// The next entry is `name`: finishes the directories it is not in.
    fn leave(&mut self, name: &Path) {
        while let Some((directory, times)) = self.open.pop_if(|(directory, _)| !is_below(name, directory)) {
            // What has been renamed since by someone else has no time to set.
            if let Ok(directory) = self.target.open_directory(&directory) {
                let _ = rustix::fs::futimens(directory, &times);
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
    fn of(entry: &Entry<impl Read>) -> io::Result<Self> {
        let header = entry.header();
        let id =
            |id: u64| u32::try_from(id).ok().filter(|id| *id != u32::MAX).ok_or_else(|| invalid("an impossible owner"));
        let seconds = i64::try_from(header.mtime()?).map_err(|_| invalid("an impossible time"))?;
        let time = Timespec { tv_sec: seconds, tv_nsec: 0 };
        Ok(Self {
            mode: Mode::from_raw_mode(header.mode()? & 0o7777),
            uid: Some(Uid::from_raw(id(header.uid()?)?)),
            gid: Some(Gid::from_raw(id(header.gid()?)?)),
            times: Timestamps { last_access: time, last_modification: time },
        })
    }

    /// Owner first: changing it takes set-id bits away.
    fn set_on(&self, file: impl AsFd) -> rustix::io::Result<()> {
        rustix::fs::fchown(&file, self.uid, self.gid)?;
        rustix::fs::fchmod(&file, self.mode)
    }

    fn set_at(&self, parent: BorrowedFd, name: &Path, has_mode: bool) -> rustix::io::Result<()> {
        rustix::fs::chownat(parent, name, self.uid, self.gid, AtFlags::SYMLINK_NOFOLLOW)?;
        if has_mode {
            rustix::fs::chmodat(parent, name, self.mode, AtFlags::empty())?;
        }
        rustix::fs::utimensat(parent, name, &self.times, AtFlags::SYMLINK_NOFOLLOW)
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

/// A new file replaces an old one, it does not write into it: the old one may have other names.
fn remove(parent: BorrowedFd, name: &Path) -> rustix::io::Result<()> {
    match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
        Err(Errno::NOENT) => Ok(()),
        done => done,
    }
}

fn copy(entry: &mut Entry<impl Read>, file: &OwnedFd) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    let mut copied = 0;
    loop {
        let mut piece = match entry.read(&mut buffer)? {
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

/// The path without `.`; an error where it could lead out of the target.
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

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// The bytes are no archive.
fn malformed(error: &io::Error) -> ErrorReply {
    ErrorReply::new(Code::BadRequest, format!("archive: {error}"))
}

/// One entry could not be unpacked: the kernel's reason, or the archive's fault.
fn failed(name: &str, error: &io::Error) -> ErrorReply {
    match errno::number(error) {
        // How the kernel says that a symbolic link leads out of the target.
        Some(libc::EXDEV) => ErrorReply::new(Code::BadRequest, format!("archive: {name:?}: leads out of the target")),
        Some(_) => ErrorReply::io(name, error),
        None => ErrorReply::new(Code::BadRequest, format!("archive: {name:?}: {error}")),
    }
}

/// Ends with an error once what is left has been read.
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
