//! Writes the entries of an archive. A file that grows meanwhile is cut at the size it had, and a file that becomes shorter is written a
//! second time under the same name, which replaces the first.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Stat};
use rustix::io::Errno;
use tar::{Builder, EntryType, Header};

use crate::attributes::{MAX_ATTRIBUTE, Records, attributes};
use crate::chunk_writer::ChunkWriter;
use crate::held::{CHANGES, Held, TRIES, kind};
use crate::sparse::{self, Parts};
use crate::times;

/// The size of a tar's block in bytes.
const BLOCK: u64 = 512;
/// A file whose stated size is below this is read to its end before its header is written, because files of /proc and /sys do not know
/// their size.
const FIRST: usize = 64 * 1024;
/// The longest file, in bytes, whose size only a read can tell; it is held in memory.
const MAX_UNKNOWN: u64 = 16 << 20;

/// Options of a file system that is packed as a whole.
pub struct Whole {
    /// Directories on another device are mount points, whose content is not of this file system.
    pub device: u64,
    pub newest: Option<u64>,
}

/// An archive that is being written.
pub struct Archive<'a, 'p> {
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

impl<'a, 'p> Archive<'a, 'p> {
    pub fn new(writer: ChunkWriter<'p>, whole: Option<&'a Whole>) -> Self {
        Self {
            builder: Builder::new(writer),
            entries: 0,
            links: HashMap::new(),
            whole,
            buffer: vec![0; MAX_ATTRIBUTE],
            first: vec![0; FIRST],
        }
    }

    /// Writes the archive's end. Returns the number of its entries.
    pub fn finish(self) -> io::Result<u64> {
        self.builder.into_inner()?.flush()?;
        Ok(self.entries)
    }

    /// Appends an entry. Everything that can fail is done before the first header is written, because a header left behind would describe
    /// the next entry.
    pub fn append(&mut self, held: &Held, name: &Path) -> io::Result<()> {
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
