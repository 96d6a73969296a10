//! What this host tells of changes: one group of fanotify(7), with marks on the directories and files whose changes matter.
//!
//! libc's fanotify is used: rustix has none, and `nix` (which has) would bring a second set of descriptors and errors for two calls, without
//! name_to_handle_at. A group of an ordinary user may do all that is needed (Linux 5.13): it may mark what it may read.

use std::ffi::{CStr, CString};
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use zerocopy::{FromBytes, Immutable, KnownLayout};

/// What changes a file or its names. CLOSE_WRITE stands for writes through a mapping, which have no event of their own.
const CHANGES: u64 =
    libc::FAN_MODIFY | libc::FAN_ATTRIB | libc::FAN_CLOSE_WRITE | libc::FAN_DELETE_SELF | libc::FAN_MOVE_SELF;
const NAMES: u64 = libc::FAN_CREATE | libc::FAN_DELETE | libc::FAN_MOVED_FROM | libc::FAN_MOVED_TO;
const OF_DIRECTORY: u64 = CHANGES | NAMES | libc::FAN_EVENT_ON_CHILD | libc::FAN_ONDIR;

/// The longest file handle (MAX_HANDLE_SZ).
const MAX_HANDLE: usize = 128;

/// File systems of this kernel alone: every change to them makes an event here. (ext2-4, xfs, btrfs, tmpfs, f2fs, bcachefs, zfs.)
const LOCAL: [u64; 7] = [0xEF53, 0x5846_5342, 0x9123_683E, 0x0102_1994, 0xF2F5_2010, 0xCA45_1A4E, 0x2FC1_2FC1];

/// Stands for a file's handle. Two files may have the same one (they do on two file systems), so it is never proof of which file it is.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Key(u64);

/// A change that somebody made.
#[derive(Debug, Eq, PartialEq)]
pub struct Event<'a> {
    /// This process made it.
    pub own: bool,
    mask: u64,
    /// The directory, and the name in it.
    pub name: Option<(Key, &'a [u8])>,
    /// The file or directory itself.
    pub object: Option<Key>,
}

impl Event<'_> {
    /// So many events were lost that everything may have changed.
    pub fn is_overflow(&self) -> bool {
        self.mask & libc::FAN_Q_OVERFLOW != 0
    }

    /// The name means another file now, or none.
    pub fn changes_name(&self) -> bool {
        self.mask & NAMES != 0
    }

    /// Nothing is known but that a file is no longer open for writing.
    pub fn is_close_only(&self) -> bool {
        self.mask & (CHANGES | NAMES) == libc::FAN_CLOSE_WRITE
    }
}

pub struct Watch {
    group: OwnedFd,
    keys: RandomState,
    /// /proc/self/fd
    descriptors: OwnedFd,
}

impl Watch {
    /// Fails where there are too many groups already (128 of a user), or where the kernel has none or an old fanotify.
    pub fn new() -> Result<Self, Errno> {
        let flags = libc::FAN_CLASS_NOTIF
            | libc::FAN_CLOEXEC
            | libc::FAN_NONBLOCK
            | libc::FAN_REPORT_FID
            | libc::FAN_REPORT_DFID_NAME;
        // Root's group may have as many marks as there are directories. The queue stays bounded: it is the kernel's memory.
        let group = init(flags | libc::FAN_UNLIMITED_MARKS).or_else(|_| init(flags))?;
        let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let descriptors = rustix::fs::open("/proc/self/fd", directory, Mode::empty())?;
        Ok(Self { group, keys: RandomState::new(), descriptors })
    }

    /// Whether every change to the file makes an event here, if it is marked.
    pub fn can_watch(file: impl AsFd) -> bool {
        rustix::fs::fstatfs(file).is_ok_and(|found| LOCAL.contains(&u64::from_ne_bytes(found.f_type.to_ne_bytes())))
    }

    /// # Errors
    /// The file system has no handles.
    pub fn key(&self, file: impl AsFd) -> Result<Key, Errno> {
        #[repr(C, align(8))]
        struct Space {
            bytes: u32,
            kind: i32,
            handle: [u8; MAX_HANDLE],
        }
        let mut space = Space { bytes: 128, kind: 0, handle: [0; MAX_HANDLE] };
        let mut mount = 0;
        let file = file.as_fd().as_raw_fd();
        // SAFETY: the descriptor is open, the name is empty, and the handle's space is as long as it says.
        let result = unsafe {
            let handle = std::ptr::from_mut(&mut space).cast();
            libc::name_to_handle_at(file, c"".as_ptr(), handle, &raw mut mount, libc::AT_EMPTY_PATH)
        };
        if result != 0 {
            return Err(last_errno());
        }
        let handle = space.handle.get(..space.bytes as usize).ok_or(Errno::OVERFLOW)?;
        Ok(self.key_of(space.kind, handle))
    }

    fn key_of(&self, kind: i32, handle: &[u8]) -> Key {
        Key(self.keys.hash_one((kind, handle)))
    }

    /// Asks for events of the file that this process has open by that number; of a directory also for those of what is in it.
    pub fn mark(&self, number: i32, is_directory: bool) -> Result<(), Errno> {
        self.change(libc::FAN_MARK_ADD, number, is_directory)
    }

    pub fn unmark(&self, number: i32, is_directory: bool) -> Result<(), Errno> {
        self.change(libc::FAN_MARK_REMOVE, number, is_directory)
    }

    fn change(&self, what: libc::c_uint, number: i32, is_directory: bool) -> Result<(), Errno> {
        let (mask, flags) = if is_directory { (OF_DIRECTORY, what | libc::FAN_MARK_ONLYDIR) } else { (CHANGES, what) };
        let name = CString::new(number.to_string()).map_err(|_| Errno::INVAL)?;
        let (group, descriptors) = (self.group.as_raw_fd(), self.descriptors.as_raw_fd());
        // SAFETY: both descriptors are open, and the name ends with a zero byte.
        match unsafe { libc::fanotify_mark(group, flags, mask, descriptors, name.as_ptr()) } {
            0 => Ok(()),
            _ => Err(last_errno()),
        }
    }

    /// Gives the events that wait to `each`, as many as the buffer has room for. False: there were none.
    pub fn read(&self, buffer: &mut [u8], mut each: impl FnMut(&Event<'_>)) -> io::Result<bool> {
        let length = match rustix::io::read(&self.group, &mut *buffer) {
            Ok(length) => length,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(false),
            Err(errno) => return Err(errno.into()),
        };
        let mut rest = &buffer[..length];
        let this_process = std::process::id();
        while let Ok((header, _)) = Metadata::read_from_prefix(rest) {
            let Some((event, others)) = rest.split_at_checked(header.event_len as usize) else { break };
            let Some(records) = event.get(usize::from(header.metadata_len)..) else { break };
            each(&self.event(&header, records, this_process));
            rest = others;
        }
        Ok(length > 0)
    }

    fn event<'a>(&self, header: &Metadata, mut records: &'a [u8], this_process: u32) -> Event<'a> {
        let own = u32::try_from(header.pid).is_ok_and(|pid| pid == this_process);
        let mut event = Event { own, mask: header.mask, name: None, object: None };
        while let Ok((record, after)) = Record::read_from_prefix(records) {
            let Some((whole, others)) = records.split_at_checked(usize::from(record.len)) else { break };
            records = others;
            let body = after.get(..whole.len().saturating_sub(size_of::<Record>())).unwrap_or_default();
            let Some((handle, name)) = body.split_at_checked(record.handle_bytes as usize) else { continue };
            let key = self.key_of(record.handle_type, handle);
            match record.info_type {
                libc::FAN_EVENT_INFO_TYPE_DFID_NAME => match CStr::from_bytes_until_nul(name).map(CStr::to_bytes) {
                    // The kernel's way to say: the directory itself.
                    Ok(b"." | b"") | Err(_) => event.object = Some(key),
                    Ok(name) => event.name = Some((key, name)),
                },
                libc::FAN_EVENT_INFO_TYPE_FID | libc::FAN_EVENT_INFO_TYPE_DFID => event.object = Some(key),
                _ => {}
            }
        }
        event
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.group.as_fd()
    }
}

/// `struct fanotify_event_metadata`
#[derive(Clone, Copy, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Metadata {
    event_len: u32,
    version: u8,
    reserved: u8,
    metadata_len: u16,
    mask: u64,
    file: i32,
    pid: i32,
}

/// `struct fanotify_event_info_fid` with the head of its `struct file_handle`.
#[derive(Clone, Copy, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Record {
    info_type: u8,
    padding: u8,
    len: u16,
    file_system: [u32; 2],
    handle_bytes: u32,
    handle_type: i32,
}

fn init(flags: libc::c_uint) -> Result<OwnedFd, Errno> {
    // SAFETY: plain numbers.
    match unsafe { libc::fanotify_init(flags, 0) } {
        // SAFETY: the call has just opened it, and no other code knows of it.
        group @ 0.. => Ok(unsafe { OwnedFd::from_raw_fd(group) }),
        _ => Err(last_errno()),
    }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::Command;

    use super::*;

    fn open(path: &std::path::Path) -> OwnedFd {
        rustix::fs::open(path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()).unwrap()
    }

    type Seen = (bool, Option<(Key, String)>, bool);

    fn seen(watch: &Watch) -> Vec<Seen> {
        let mut seen = Vec::new();
        while watch
            .read(&mut [0; 8192], |event| {
                let name = event.name.map(|(key, name)| (key, String::from_utf8_lossy(name).into_owned()));
                seen.push((event.own, name, event.changes_name()));
            })
            .unwrap()
        {}
        seen
    }

    #[test]
    fn changes_in_a_marked_directory_are_told_with_names_and_whose_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let watch = Watch::new().unwrap();
        let directory = open(dir.path());
        let key = watch.key(&directory).unwrap();
        watch.mark(directory.as_raw_fd(), true).unwrap();
        fs::write(dir.path().join("mine"), "").unwrap();
        assert_eq!(seen(&watch)[0], (true, Some((key, "mine".to_owned())), true));
        assert!(Command::new("sh").args(["-c", ": >theirs"]).current_dir(dir.path()).status().unwrap().success());
        assert_eq!(seen(&watch)[0], (false, Some((key, "theirs".to_owned())), true));
        watch.unmark(directory.as_raw_fd(), true).unwrap();
        fs::write(dir.path().join("unseen"), "").unwrap();
        assert_eq!(seen(&watch), []);
    }

    #[test]
    fn changes_of_a_marked_file_are_told_whatever_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let (one, other) = (dir.path().join("one"), dir.path().join("other"));
        fs::write(&one, "").unwrap();
        let watch = Watch::new().unwrap();
        let file = open(&one);
        let key = watch.key(&file).unwrap();
        watch.mark(file.as_raw_fd(), false).unwrap();
        fs::hard_link(&one, &other).unwrap();
        fs::write(&other, "more").unwrap();
        let mut objects = Vec::new();
        watch.read(&mut [0; 8192], |event| objects.push(event.object)).unwrap();
        assert!(!objects.is_empty() && objects.iter().all(|object| *object == Some(key)), "{objects:?}");
    }
}
