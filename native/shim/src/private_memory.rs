//! Copies memory that a VMM has mapped privately: a file that is never written to, and over it the pages that the VMM has made its own
//! (proc(5)).

use crate::files;
use crate::identity::Identity;
use crate::parallel_copy::{self, Known, Range};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::ptr;
use std::sync::atomic::AtomicBool;

const PAGE: u64 = 4096;
/// How many entries of pagemap are read at once: those of 32 MiB.
const ENTRIES: u64 = 8192;
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
/// The bit of a page that belongs to a file or is shared, and so is not the process's own.
const FOREIGN: u64 = 1 << 61;

pub struct PrivateMemory {
    pub base: File,
}

impl PrivateMemory {
    /// Copies the file, which never changes, whatever the VMM does meanwhile.
    pub fn copy_base(&self, to: &File, cancel: &AtomicBool) -> io::Result<()> {
        files::copy_content(&self.base, to, 0, cancel).map(drop)
    }

    /// Copies the pages that `vmm` has made its own, zeros included, over a copy of the base, unless they are `known` to be there. Returns
    /// the number of bytes.
    pub fn copy_own(&self, vmm: Identity, to: &File, known: &Known, cancel: &AtomicBool) -> io::Result<u64> {
        let open = |name| File::open(format!("/proc/{}/{name}", vmm.pid));
        let (maps, pagemap, memory) = (open("maps")?, open("pagemap")?, open("mem")?);
        // The open files stay with their process: another process that gets the pid later cannot be mistaken for it.
        if Identity::of(vmm.pid)? != vmm {
            return Err(Errno::SRCH.into());
        }
        let file = name_in_maps(&self.base)?;
        let maps = io::read_to_string(maps)?;
        let mappings: Vec<_> =
            maps.lines().filter_map(Mapping::parse).filter(|m| m.private && m.file == file).collect();
        if mappings.is_empty() {
            return Err(io::Error::new(ErrorKind::InvalidInput, "the VMM has not mapped it privately"));
        }
        let ranges = mappings.iter().flat_map(|mapping| OwnPages::new(&pagemap, mapping));
        parallel_copy::copy(&memory, to, ranges, known, cancel)
    }
}

/// A line of `/proc/<pid>/maps`.
#[derive(Debug, PartialEq, Eq)]
struct Mapping {
    start: u64,
    end: u64,
    private: bool,
    offset: u64,
    /// The device and inode of the mapped file.
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

/// The device and inode of a file as maps shows them. They are found by mapping the file, because stat(2) shows others on some file systems
/// (btrfs, overlayfs).
fn name_in_maps(file: &File) -> io::Result<(String, String)> {
    let length = 1;
    // SAFETY: a new mapping at an address of the kernel's choice; it is never accessed.
    let mapped = unsafe { mmap(ptr::null_mut(), length, ProtFlags::READ, MapFlags::PRIVATE, file, 0) }?;
    let maps = std::fs::read_to_string("/proc/self/maps");
    // SAFETY: made above, and nothing else uses it.
    unsafe { munmap(mapped, length) }?;
    let address = mapped.addr() as u64;
    let mapping = maps?.lines().filter_map(Mapping::parse).find(|mapping| mapping.start == address);
    mapping.map(|mapping| mapping.file).ok_or_else(|| ErrorKind::NotFound.into())
}

/// Iterates over the runs of a mapping's pages that are the process's own.
struct OwnPages<'a> {
    pagemap: &'a File,
    mapping: &'a Mapping,
    /// The address at which the search goes on.
    at: u64,
    found: std::vec::IntoIter<Run>,
    find: Find,
}

/// A range of addresses.
type Run = std::ops::Range<u64>;
/// Finds runs in a range. Also returns the address at which it has stopped.
type Find = fn(&File, Run) -> io::Result<(Vec<Run>, u64)>;

impl<'a> OwnPages<'a> {
    fn new(pagemap: &'a File, mapping: &'a Mapping) -> Self {
        OwnPages { pagemap, mapping, at: mapping.start, found: Vec::new().into_iter(), find: scan }
    }

    fn next_run(&mut self) -> io::Result<Option<Range>> {
        loop {
            if let Some(run) = self.found.next() {
                let to = self.mapping.offset + (run.start - self.mapping.start);
                return Ok(Some(Range { from: run.start, to, length: run.end - run.start }));
            }
            if self.at >= self.mapping.end {
                return Ok(None);
            }
            let (found, at) = match (self.find)(self.pagemap, self.at..self.mapping.end) {
                // Linux before 6.7 has no PAGEMAP_SCAN.
                Err(error) if Errno::from_io_error(&error) == Some(Errno::NOTTY) => {
                    self.find = read_entries;
                    continue;
                }
                found => found?,
            };
            // A search that does not advance means that the process has ended.
            self.at = if at > self.at { at } else { return Err(Errno::SRCH.into()) };
            self.found = found.into_iter();
        }
    }
}

impl Iterator for OwnPages<'_> {
    type Item = io::Result<Range>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next_run().transpose()
    }
}

/// Reads an entry of pagemap for each page.
fn read_entries(pagemap: &File, within: Run) -> io::Result<(Vec<Run>, u64)> {
    let end = within.end.min(within.start + ENTRIES * PAGE);
    let count = usize::try_from((end - within.start) / PAGE).map_err(io::Error::other)?;
    let mut bytes = vec![0; count * size_of::<u64>()];
    // The file is shorter when the process has ended.
    pagemap.read_exact_at(&mut bytes, within.start / PAGE * size_of::<u64>() as u64)?;
    let mut runs: Vec<Run> = Vec::new();
    for (entry, page) in bytes.as_chunks().0.iter().map(|entry| u64::from_ne_bytes(*entry)).zip(0..) {
        if entry & (PRESENT | SWAPPED) != 0 && entry & FOREIGN == 0 {
            let at = within.start + page * PAGE;
            match runs.last_mut() {
                Some(run) if run.end == at => run.end += PAGE,
                _ => runs.push(at..at + PAGE),
            }
        }
    }
    Ok((runs, end))
}

/// Lets the kernel search (PAGEMAP_SCAN, ioctl(2) of `/proc/<pid>/pagemap` since Linux 6.7).
fn scan(pagemap: &File, within: Run) -> io::Result<(Vec<Run>, u64)> {
    /// `struct page_region` of linux/fs.h.
    #[repr(C)]
    #[derive(Clone, Copy, Default)]
    struct Region {
        start: u64,
        end: u64,
        categories: u64,
    }
    /// `struct pm_scan_arg` of linux/fs.h.
    #[repr(C)]
    #[derive(Default)]
    struct Arguments {
        size: u64,
        flags: u64,
        start: u64,
        end: u64,
        walk_end: u64,
        regions: u64,
        region_count: u64,
        max_pages: u64,
        category_inverted: u64,
        category_mask: u64,
        category_anyof_mask: u64,
        return_mask: u64,
    }
    /// `_IOWR('f', 16, struct pm_scan_arg)`.
    const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
    const IS_FILE: u64 = 1 << 2;
    const IS_PRESENT: u64 = 1 << 3;
    const IS_SWAPPED: u64 = 1 << 4;

    let mut regions = [Region::default(); 512];
    let mut arguments = Arguments {
        size: size_of::<Arguments>() as u64,
        start: within.start,
        end: within.end,
        regions: regions.as_mut_ptr().expose_provenance() as u64,
        region_count: regions.len() as u64,
        // Pages that are not of a file, and are present or swapped. They are reported as one category, so that neighbours form one region.
        category_inverted: IS_FILE,
        category_mask: IS_FILE,
        category_anyof_mask: IS_PRESENT | IS_SWAPPED,
        ..Arguments::default()
    };
    // SAFETY: both structures are the kernel's, live for the call, and it is told how many regions there is room for.
    let found = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut arguments) };
    let found = usize::try_from(found).map_err(|_| io::Error::last_os_error())?;
    Ok((regions[..found].iter().map(|region| region.start..region.end).collect(), arguments.walk_end))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn runs(pagemap: &File, mapping: &Mapping, find: Find) -> io::Result<Vec<Range>> {
        let all = OwnPages { find, ..OwnPages::new(pagemap, mapping) };
        // Runs may be cut anywhere, so neighbours are joined.
        let mut joined: Vec<Range> = Vec::new();
        for run in all {
            let run = run?;
            match joined.last_mut() {
                Some(last) if last.from + last.length == run.from => last.length += run.length,
                _ => joined.push(run),
            }
        }
        Ok(joined)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20))]
        /// Both methods find exactly the pages that were written, not those only read or never touched.
        #[test]
        fn own_pages_are_those_written_to(mut written in prop::collection::vec(any::<bool>(), 1..20_000), read in 0usize..20_000) {
            written.extend([false, true, false]);
            let length = written.len() * 4096;
            let file = tempfile::tempfile().unwrap();
            file.set_len(length as u64).unwrap();
            let rights = ProtFlags::READ | ProtFlags::WRITE;
            // SAFETY: a new mapping at an address of the kernel's choice.
            let mapped = unsafe { mmap(ptr::null_mut(), length, rights, MapFlags::PRIVATE, &file, 0) }.unwrap();
            // SAFETY: it is as long as that, and nothing else uses it.
            let memory = unsafe { std::slice::from_raw_parts_mut(mapped.cast::<u8>(), length) };
            std::hint::black_box(memory[read.min(written.len() - 1) * 4096]);
            written.iter().zip(memory.chunks_mut(4096)).filter(|(own, _)| **own).for_each(|(_, page)| page[1] = 1);

            let start = mapped.addr() as u64;
            let name = name_in_maps(&file).unwrap();
            let mapping = Mapping { start, end: start + length as u64, private: true, offset: 8192, file: name };
            let pagemap = File::open("/proc/self/pagemap").unwrap();
            let (entries, scanned) = (runs(&pagemap, &mapping, read_entries), runs(&pagemap, &mapping, scan));
            // SAFETY: made above, and not used any more.
            unsafe { munmap(mapped, length) }.unwrap();
            let entries = entries.unwrap();
            let mut found = vec![false; written.len()];
            for Range { from, to, length } in &entries {
                prop_assert_eq!(to - 8192, from - start);
                let first = usize::try_from((from - start) / 4096).unwrap();
                found[first..][..usize::try_from(length / 4096).unwrap()].fill(true);
            }
            prop_assert_eq!(found, written);
            prop_assert_eq!(scanned.unwrap(), entries);
        }

        #[test]
        fn no_line_panics(line in "[0-9a-f :rwxp-]{0,40}") {
            Mapping::parse(&line);
        }
    }

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
