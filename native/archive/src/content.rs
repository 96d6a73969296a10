//! Writes the content of an entry to its file.

use std::io::{self, Read};
use std::os::fd::OwnedFd;

use tar::Entry;

use crate::error::invalid;
use crate::sparse::{self, Part};

/// The real size of a file with holes. The real name in the headers is ignored in favour of the entry's own.
pub fn sparse_size(entry: &mut Entry<impl Read>) -> io::Result<Option<u64>> {
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
pub fn copy_parts(entry: &mut Entry<impl Read>, file: &OwnedFd, size: u64, buffer: &mut [u8]) -> io::Result<()> {
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

pub fn copy(entry: &mut Entry<impl Read>, file: &OwnedFd, buffer: &mut [u8]) -> io::Result<()> {
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
