//! Memory that a VMM has mapped privately: a file nobody writes, and the pages over it that the VMM has made its own (proc(5)).

use crate::files;
use crate::identity::Identity;
use crate::pieces::{self, Range};
use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use std::fs::File;
use std::io::{self, ErrorKind};
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::sync::atomic::AtomicBool;

const PAGE: u64 = 4096;
/// Entries of pagemap read at once: those of 32 MiB.
const ENTRIES: u64 = 8192;
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
/// Of a file, or shared: not the process's own.
const FOREIGN: u64 = 1 << 61;

pub struct PrivateMemory {
    pub base: File,
}

impl PrivateMemory {
    /// Copies what never changes, whatever the VMM does meanwhile.
    pub fn copy_base(&self, to: &File, cancel: &AtomicBool) -> io::Result<()> {
        files::copy_content(&self.base, to, 0, cancel).map(drop)
    }

    /// Copies the pages `vmm` has made its own over a copy of the base, zeros included, and counts the bytes.
    pub fn copy_own(&self, vmm: Identity, to: &File, cancel: &AtomicBool) -> io::Result<u64> {
        let open = |name| File::open(format!("/proc/{}/{name}", vmm.pid));
        let (maps, pagemap, memory) = (open("maps")?, open("pagemap")?, open("mem")?);
        // What has been opened stays with its process: nobody who gets the number later can be taken for it.
        if Identity::of(vmm.pid)? != vmm {
            return Err(Errno::ESRCH.into());
        }
        let file = name_in_maps(&self.base)?;
        let maps = io::read_to_string(maps)?;
        let mappings: Vec<_> =
            maps.lines().filter_map(Mapping::parse).filter(|m| m.private && m.file == file).collect();
        if mappings.is_empty() {
            return Err(io::Error::new(ErrorKind::InvalidInput, "the VMM has not mapped it privately"));
        }
        let ranges = mappings.iter().flat_map(|mapping| OwnPages::new(&pagemap, mapping));
        pieces::copy(&memory, to, ranges, cancel)
    }
}

/// A line of `/proc/<pid>/maps`.
#[derive(Debug, PartialEq, Eq)]
struct Mapping {
    start: u64,
    end: u64,
    private: bool,
    offset: u64,
    /// Device and inode.
    file: (String, String),
}

impl Mapping {
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split_ascii_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let hex = |text| u64::from_str_radix(text, 16).ok();
        Some(Mapping {
            start: hex(start)?,
            end: hex(end)?,
            private: fields.next()?.ends_with('p'),
            offset: hex(fields.next()?)?,
            file: (fields.next()?.to_owned(), fields.next()?.to_owned()),
        })
    }
}

/// Device and inode of a file as they are written in maps. Found by mapping it ourselves: on some filesystems (btrfs, overlayfs)
/// stat(2) tells others.
fn name_in_maps(file: &File) -> io::Result<(String, String)> {
    let length = NonZeroUsize::MIN;
    // SAFETY: a new mapping at an address of the kernel's choice; it is never accessed.
    let mapped = unsafe { mmap(None, length, ProtFlags::PROT_READ, MapFlags::MAP_PRIVATE, file, 0) }?;
    let maps = std::fs::read_to_string("/proc/self/maps");
    // SAFETY: made above, and nobody else knows it.
    unsafe { munmap(mapped, length.get()) }?;
    let address = mapped.addr().get() as u64;
    let mapping = maps?.lines().filter_map(Mapping::parse).find(|mapping| mapping.start == address);
    mapping.map(|mapping| mapping.file).ok_or_else(|| ErrorKind::NotFound.into())
}

/// Runs of a mapping's pages that are the process's own.
struct OwnPages<'a> {
    pagemap: &'a File,
    mapping: &'a Mapping,
    /// What has been read of pagemap, from `first` on.
    entries: Vec<u64>,
    first: u64,
    at: u64,
}

impl<'a> OwnPages<'a> {
    fn new(pagemap: &'a File, mapping: &'a Mapping) -> Self {
        OwnPages { pagemap, mapping, entries: Vec::new(), first: mapping.start / PAGE, at: mapping.start / PAGE }
    }

    /// Whether the page at `at` is; `None` behind the last one.
    fn is_own(&mut self) -> io::Result<Option<bool>> {
        let end = self.mapping.end / PAGE;
        if self.at >= end {
            return Ok(None);
        }
        if self.at >= self.first + self.entries.len() as u64 {
            let count = usize::try_from((end - self.at).min(ENTRIES)).map_err(io::Error::other)?;
            let mut bytes = vec![0; count * size_of::<u64>()];
            // It ends early when the process has.
            self.pagemap.read_exact_at(&mut bytes, self.at * size_of::<u64>() as u64)?;
            self.entries = bytes.as_chunks().0.iter().map(|entry| u64::from_ne_bytes(*entry)).collect();
            self.first = self.at;
        }
        let entry = usize::try_from(self.at - self.first).map_or(0, |index| self.entries[index]);
        Ok(Some(entry & (PRESENT | SWAPPED) != 0 && entry & FOREIGN == 0))
    }

    fn next_run(&mut self) -> io::Result<Option<Range>> {
        while self.is_own()? == Some(false) {
            self.at += 1;
        }
        let start = self.at;
        while self.is_own()? == Some(true) {
            self.at += 1;
        }
        let from = start * PAGE;
        let run =
            Range { from, to: self.mapping.offset + (from - self.mapping.start), length: (self.at - start) * PAGE };
        Ok((run.length > 0).then_some(run))
    }
}

impl Iterator for OwnPages<'_> {
    type Item = io::Result<Range>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next_run().transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_maps() {
        let line = "7f1c8000-7f1ca000 rw-p 0001f000 fe:00 393455                     /var/my memory (deleted)";
        let (start, end) = (0x7f1c_8000, 0x7f1c_a000);
        let file = ("fe:00".to_owned(), "393455".to_owned());
        let expected = Mapping { start, end, private: true, offset: 0x1f000, file };
        assert_eq!(Mapping::parse(line), Some(expected));
        assert!(Mapping::parse("7f1c8000-7f1ca000 rw-s 0 00:01 7").is_some_and(|mapping| !mapping.private));
        assert_eq!(Mapping::parse("7f1c8000"), None);
    }
}
