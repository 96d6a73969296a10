//! Writes an archive in chunks. The contents of files are read straight into the chunk that leaves next, because every copy counts: in an
//! emulated machine a copy costs as much as the disk does.

use std::io::{self, Write};

/// The longest chunk in bytes, without the room for its head. A peer wakes up once for each.
const CHUNK: usize = 256 * 1024;

/// Takes a chunk and returns a buffer to fill next, whose content is arbitrary.
type HandOn<'a> = Box<dyn FnMut(Vec<u8>) -> io::Result<Vec<u8>> + 'a>;

/// Cuts what is written to it into chunks.
pub struct ChunkWriter<'a> {
    buffer: Vec<u8>,
    head: usize,
    filled: usize,
    hand_on: HandOn<'a>,
}

impl<'a> ChunkWriter<'a> {
    /// Passes every chunk to `hand_on`. No chunk is empty, and each stands behind `head` bytes, which `hand_on` may fill.
    pub fn new(head: usize, hand_on: impl FnMut(Vec<u8>) -> io::Result<Vec<u8>> + 'a) -> Self {
        Self { buffer: vec![0; head + CHUNK], head, filled: head, hand_on: Box::new(hand_on) }
    }

    /// Returns room for more bytes, which is never empty. Bytes put there count after `advance`.
    ///
    /// # Errors
    /// Those of `hand_on`, to which a full buffer goes.
    pub fn spare(&mut self) -> io::Result<&mut [u8]> {
        if self.filled == self.buffer.len() {
            self.flush()?;
        }
        Ok(&mut self.buffer[self.filled..])
    }

    /// Counts `length` bytes that were put into `spare`.
    pub fn advance(&mut self, length: usize) {
        self.filled = self.buffer.len().min(self.filled + length);
    }
}

impl Write for ChunkWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let spare = self.spare()?;
        let length = spare.len().min(bytes.len());
        spare[..length].copy_from_slice(&bytes[..length]);
        self.advance(length);
        Ok(length)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.filled > self.head {
            let mut chunk = std::mem::take(&mut self.buffer);
            chunk.truncate(self.filled);
            self.filled = self.head;
            let (next, handed_on) = match (self.hand_on)(chunk) {
                Ok(next) => (next, Ok(())),
                Err(error) => (Vec::new(), Err(error)),
            };
            // The buffer is replaced even after an error, because an archive's builder writes its end when it is dropped.
            self.buffer = next;
            self.buffer.resize(self.head + CHUNK, 0);
            return handed_on;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_whole_but_the_last_and_none_is_empty() {
        let mut handed = Vec::new();
        let mut writer = ChunkWriter::new(3, |chunk| {
            handed.push(chunk);
            Ok(Vec::new())
        });
        writer.flush().unwrap();
        writer.write_all(&vec![1; CHUNK - 1]).unwrap();
        let spare = writer.spare().unwrap();
        assert_eq!(spare.len(), 1);
        spare.fill(2);
        writer.advance(1);
        writer.write_all(&[3; 10]).unwrap();
        writer.flush().unwrap();
        writer.flush().unwrap();
        drop(writer);
        assert_eq!(handed.iter().map(Vec::len).collect::<Vec<_>>(), [3 + CHUNK, 3 + 10]);
        assert_eq!((handed[0][3], handed[0][3 + CHUNK - 1], handed[1][3]), (1, 2, 3));
    }

    #[test]
    fn a_receiver_that_fails_ends_it() {
        let mut writer = ChunkWriter::new(5, |_| Err(io::ErrorKind::BrokenPipe.into()));
        for _ in 0..3 {
            let error = writer.write_all(&vec![0; CHUNK + 1]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        }
        writer.write_all(&[0; 1024]).unwrap();
    }
}
