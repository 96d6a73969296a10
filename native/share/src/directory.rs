//! Reading directories.

use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::sync::PoisonError;

use rustix::fs::{FileType, RawDir, SeekFrom, seek};
use rustix::io::Errno;
use zerocopy::IntoBytes;

use crate::abi::{Dirent, EntryOut};
use crate::handle::Handle;

pub struct Entry<'a> {
    pub name: &'a CStr,
    pub ino: u64,
    kind: FileType,
    /// Where the next one is.
    next: u64,
}

impl<'a> Entry<'a> {
    /// An entry of a directory that is not on a disk; the next one is at `next`.
    pub fn new(name: &'a CStr, ino: u64, kind: FileType, next: u64) -> Self {
        Self { name, ino, kind, next }
    }

    pub fn is_dots(&self) -> bool {
        matches!(self.name.to_bytes(), b"." | b"..")
    }
}

/// Gives the entries from `offset` on to `each`, until that returns false.
pub fn read(handle: &Handle, offset: u64, mut each: impl FnMut(Entry<'_>) -> Result<bool, Errno>) -> Result<(), Errno> {
    let mut position = handle.position.lock().unwrap_or_else(PoisonError::into_inner);
    if *position != offset {
        seek(&handle.file, SeekFrom::Start(offset))?;
        *position = offset;
    }
    let mut buffer = vec![MaybeUninit::uninit(); 32 * 1024];
    let mut entries = RawDir::new(&handle.file, &mut buffer);
    let mut last = offset;
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let next = entry.next_entry_cookie();
        let given = each(Entry { name: entry.file_name(), ino: entry.ino(), kind: entry.file_type(), next })?;
        if !given {
            // The kernel stands behind entries that are not taken.
            *position = u64::MAX;
            return Ok(());
        }
        last = next;
    }
    *position = last;
    Ok(())
}

/// Entries for the guest, as many as it has room for.
pub struct Answer {
    pub bytes: Vec<u8>,
    room: usize,
}

impl Answer {
    pub fn new(room: usize) -> Self {
        Self { bytes: Vec::with_capacity(room.min(64 * 1024)), room }
    }

    fn fits(&self, entry: &Entry<'_>, before: usize) -> bool {
        let length = (before + size_of::<Dirent>() + entry.name.to_bytes().len()).next_multiple_of(8);
        self.bytes.len() + length <= self.room
    }

    pub fn has_room_with_attributes(&self, entry: &Entry<'_>) -> bool {
        self.fits(entry, size_of::<EntryOut>())
    }

    /// False: there is no room for it.
    pub fn add(&mut self, entry: &Entry<'_>) -> bool {
        let fits = self.fits(entry, 0);
        if fits {
            self.append(entry);
        }
        fits
    }

    pub fn add_with_attributes(&mut self, entry: &Entry<'_>, found: EntryOut) -> bool {
        let fits = self.fits(entry, size_of::<EntryOut>());
        if fits {
            self.bytes.extend_from_slice(found.as_bytes());
            self.append(entry);
        }
        fits
    }

    fn append(&mut self, entry: &Entry<'_>) {
        let name = entry.name.to_bytes();
        let kind = entry.kind.as_raw_mode() >> 12;
        let name_len = u32::try_from(name.len()).unwrap_or_default();
        self.bytes.extend_from_slice(Dirent { ino: entry.ino, offset: entry.next, name_len, kind }.as_bytes());
        self.bytes.extend_from_slice(name);
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
    }
}
