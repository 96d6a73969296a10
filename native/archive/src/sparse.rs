//! Files with holes, in the form that GNU tar calls PAX 1.0: extended headers with the real name and size, then in the entry's data a map
//! of the parts that hold data, then the parts.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use crate::error::invalid;
use crate::holes::next_data;

/// A part of a file that is no hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    pub offset: u64,
    pub length: u64,
}

const BLOCK: usize = 512;
/// The most parts of a file. Their map stays below 1 MiB, which is what the reader accepts. In a file with more parts, small holes are sent
/// as zeros.
const MAX_PARTS: usize = 20_000;
const MAX_MAP: usize = 1 << 20;

pub const MAJOR: &str = "GNU.sparse.major";
pub const MINOR: &str = "GNU.sparse.minor";
pub const NAME: &str = "GNU.sparse.name";
pub const SIZE: &str = "GNU.sparse.realsize";

/// The parts of a file of this size that hold data. If the file changes meanwhile, they are a little more or less.
pub fn parts(file: &File, size: u64) -> io::Result<Vec<Part>> {
    let mut parts: Vec<Part> = Vec::new();
    let mut smallest_hole = 1;
    let mut at = 0;
    while let Some(data) = next_data(file, at, size)?.filter(|data| !data.is_empty()) {
        add(&mut parts, Part { offset: data.start, length: data.end - data.start }, smallest_hole);
        while parts.len() > MAX_PARTS {
            smallest_hole *= 2;
            let all = std::mem::take(&mut parts);
            all.into_iter().for_each(|part| add(&mut parts, part, smallest_hole));
        }
        at = data.end;
    }
    // By convention an empty part marks the end of a hole at the file's end.
    if parts.last().is_none_or(|last| last.offset + last.length < size) {
        parts.push(Part { offset: size, length: 0 });
    }
    Ok(parts)
}

/// Whether the file has no hole.
pub fn is_solid(parts: &[Part], size: u64) -> bool {
    matches!(parts, [Part { offset: 0, length }] if *length == size)
}

fn add(parts: &mut Vec<Part>, next: Part, smallest_hole: u64) {
    match parts.last_mut() {
        Some(last) if next.offset - (last.offset + last.length) < smallest_hole => {
            last.length = next.offset + next.length - last.offset;
        }
        _ => parts.push(next),
    }
}

/// The map that stands before the parts.
pub fn write_map(parts: &[Part]) -> Vec<u8> {
    let mut map = format!("{}\n", parts.len());
    for Part { offset, length } in parts {
        // Writing to a string cannot fail.
        let _ = write!(map, "{offset}\n{length}\n");
    }
    let mut map = map.into_bytes();
    map.resize(map.len().next_multiple_of(BLOCK), 0);
    map
}

/// Reads a map from `source`. `left` is the length of map and parts together. The parts that are returned are in order, do not overlap, lie
/// within `size`, and are together as long as what `left` leaves after the map.
pub fn read_map(source: &mut impl Read, mut left: u64, size: u64) -> io::Result<Vec<Part>> {
    let (mut map, mut at) = (Vec::new(), 0);
    let mut number = || loop {
        if let Some(length) = map[at..].iter().position(|&byte| byte == b'\n') {
            let digits = str::from_utf8(&map[at..at + length]).ok().filter(|digits| digits.len() <= 19);
            at += length + 1;
            let plain = digits.filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()));
            break plain.and_then(|digits| digits.parse::<u64>().ok()).ok_or_else(|| invalid("a map of no numbers"));
        }
        if map.len() >= MAX_MAP || left < BLOCK as u64 {
            break Err(invalid("a map without an end"));
        }
        let mut block = [0; BLOCK];
        source.read_exact(&mut block)?;
        left -= BLOCK as u64;
        map.extend_from_slice(&block);
    };
    let count = number()?;
    let mut parts = Vec::new();
    let (mut end, mut data) = (0_u64, 0_u64);
    for _ in 0..count {
        let part = Part { offset: number()?, length: number()? };
        let next = part.offset.checked_add(part.length).filter(|next| part.offset >= end && *next <= size);
        end = next.ok_or_else(|| invalid("a map of parts that are not apart"))?;
        data += part.length;
        parts.push(part);
    }
    if data == left { Ok(parts) } else { Err(invalid("a map of other parts than there are")) }
}

/// Reads the parts of a file one after the other, until a part that has become shorter.
pub struct Parts<'a> {
    file: &'a File,
    parts: &'a [Part],
    /// How many bytes of the first part have been read.
    done: u64,
}

impl<'a> Parts<'a> {
    pub fn new(file: &'a File, parts: &'a [Part]) -> Self {
        Self { file, parts, done: 0 }
    }
}

impl Read for Parts<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let Some((part, rest)) = self.parts.split_first() else { return Ok(0) };
            let left = part.length - self.done;
            if left == 0 {
                (self.parts, self.done) = (rest, 0);
                continue;
            }
            let length = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            let read = self.file.read_at(&mut buffer[..length], part.offset + self.done)?;
            self.done += read as u64;
            return Ok(read);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(offset: u64, length: u64) -> Part {
        Part { offset, length }
    }

    #[test]
    fn a_map_is_read_as_it_was_written() {
        for parts in [vec![], vec![part(0, 1)], vec![part(4096, 4096), part(1 << 40, 5)], vec![part(0, 9); 1]] {
            let data = parts.iter().map(|part| part.length).sum::<u64>();
            let map = write_map(&parts);
            assert_eq!(map.len() % BLOCK, 0);
            let read = read_map(&mut map.as_slice(), map.len() as u64 + data, 1 << 41).unwrap();
            assert_eq!(read, parts);
        }
    }

    #[test]
    fn a_hostile_map_is_refused() {
        let maps = [
            "",
            "x\n",
            "1\n0\n",
            "1\n-1\n5\n",
            "2\n5\n5\n0\n5\n",
            "1\n0\n99999999999999999999\n",
            "1\n18446744073709551615\n1\n",
        ];
        for text in maps {
            let mut map = text.as_bytes().to_vec();
            map.resize(BLOCK, 0);
            assert!(read_map(&mut map.as_slice(), 1024, 512).is_err(), "{text:?}");
        }
        // More data than the parts have, parts beyond the size, a count without an end.
        assert!(read_map(&mut write_map(&[part(0, 4)]).as_slice(), 512 + 5, 512).is_err());
        assert!(read_map(&mut write_map(&[part(510, 4)]).as_slice(), 512 + 4, 512).is_err());
        assert!(read_map(&mut io::repeat(b'1'), u64::MAX, 512).is_err());
        assert!(read_map(&mut "9\n".repeat(1 << 20).as_bytes(), u64::MAX, u64::MAX).is_err());
    }

    /// Whatever is accepted as a map makes sense, and takes no more memory than a map may.
    #[test]
    fn no_text_makes_a_map_that_leads_out_of_the_file() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut below = |limit: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 33) % limit
        };
        let mut taken = 0;
        for _ in 0..20_000 {
            let size = below(5000);
            let count = below(5);
            let mut text = format!("{}\n", if below(8) == 0 { below(9) } else { count });
            let (mut at, mut data) = (0, 0);
            for _ in 0..count {
                let (offset, length) = (at + below(600), below(600));
                (at, data) = (offset + length, data + length);
                let _ = write!(text, "{offset}\n{length}\n");
            }
            let mut map = text.into_bytes();
            map.resize(map.len().next_multiple_of(BLOCK), 0);
            if below(3) == 0 {
                let at = usize::try_from(below(map.len() as u64)).unwrap();
                map[at] = u8::try_from(below(256)).unwrap();
            }
            let left = map.len() as u64 + if below(4) == 0 { below(3000) } else { data };
            let Ok(parts) = read_map(&mut map.as_slice(), left, size) else { continue };
            taken += 1;
            let mut end = 0;
            for Part { offset, length } in parts {
                assert!(offset >= end && offset + length <= size);
                end = offset + length;
            }
        }
        assert!(taken > 1000, "{taken}");
    }

    #[test]
    fn small_holes_count_for_little_where_there_are_many() {
        let mut parts = Vec::new();
        add(&mut parts, part(0, 10), 8);
        add(&mut parts, part(15, 5), 8);
        add(&mut parts, part(28, 2), 8);
        assert_eq!(parts, [part(0, 20), part(28, 2)]);
    }
}
