//! Finds the data of a file between its holes.

use std::fs::File;
use std::io;
use std::ops::Range;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

/// The first range of data at or after `at` and below `length`. `None`: nothing but a hole follows. The range is empty if its data have
/// become a hole meanwhile.
///
/// # Errors
/// Those of seek(2).
pub fn next_data(file: &File, at: u64, length: u64) -> io::Result<Option<Range<u64>>> {
    if at >= length {
        return Ok(None);
    }
    let find = |what| match seek(file, what) {
        Ok(found) => Ok(Some(found)),
        Err(Errno::NXIO) => Ok(None),
        Err(error) => Err(error),
    };
    let Some(start) = find(SeekFrom::Data(at))?.filter(|start| *start < length) else { return Ok(None) };
    // There is no hole to find either if the file has been cut meanwhile.
    let end = find(SeekFrom::Hole(start))?.unwrap_or(length);
    Ok(Some(start..end.clamp(start, length)))
}
