//! An archive on its way out, a piece at a time. The contents of files are read straight into the piece that leaves next, for every copy
//! less is felt: in an emulated machine, one costs as much as the disk does.

use std::io::{self, Write};

/// Longest piece, without the room for its head. A peer is woken once for each.
const PIECE: usize = 256 * 1024;

/// Takes a piece and returns a buffer to fill next, whatever is in it.
type HandOn<'a> = Box<dyn FnMut(Vec<u8>) -> io::Result<Vec<u8>> + 'a>;

/// Cuts what is written to it into pieces.
pub struct Pieces<'a> {
    buffer: Vec<u8>,
    head: usize,
    filled: usize,
    hand_on: HandOn<'a>,
}

impl<'a> Pieces<'a> {
    /// `hand_on` gets every piece, none of them empty, behind `head` bytes that are its own to fill.
    pub fn new(head: usize, hand_on: impl FnMut(Vec<u8>) -> io::Result<Vec<u8>> + 'a) -> Self {
        Self { buffer: vec![0; head + PIECE], head, filled: head, hand_on: Box::new(hand_on) }
    }

    /// Room for more, never empty; what is put there counts after `advance`.
    pub fn spare(&mut self) -> io::Result<&mut [u8]> {
        if self.filled == self.buffer.len() {
            self.flush()?;
        }
        Ok(&mut self.buffer[self.filled..])
    }

    /// So many bytes have been put into `spare`.
    pub fn advance(&mut self, length: usize) {
        self.filled = self.buffer.len().min(self.filled + length);
    }
}

impl Write for Pieces<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let spare = self.spare()?;
        let length = spare.len().min(bytes.len());
        spare[..length].copy_from_slice(&bytes[..length]);
        self.advance(length);
        Ok(length)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.filled > self.head {
            let mut piece = std::mem::take(&mut self.buffer);
            piece.truncate(self.filled);
            self.filled = self.head;
            let (next, handed_on) = match (self.hand_on)(piece) {
                Ok(next) => (next, Ok(())),
                Err(error) => (Vec::new(), Err(error)),
            };
            // Also when nobody takes it: an archive's builder writes its end when it is dropped.
            self.buffer = next;
            self.buffer.resize(self.head + PIECE, 0);
            return handed_on;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_whole_but_the_last_and_none_is_empty() {
        let mut handed = Vec::new();
        let mut pieces = Pieces::new(3, |piece| {
            handed.push(piece);
            Ok(Vec::new())
        });
        pieces.flush().unwrap();
        pieces.write_all(&vec![1; PIECE - 1]).unwrap();
        let spare = pieces.spare().unwrap();
        assert_eq!(spare.len(), 1);
        spare.fill(2);
        pieces.advance(1);
        pieces.write_all(&[3; 10]).unwrap();
        pieces.flush().unwrap();
        pieces.flush().unwrap();
        drop(pieces);
        assert_eq!(handed.iter().map(Vec::len).collect::<Vec<_>>(), [3 + PIECE, 3 + 10]);
        assert_eq!((handed[0][3], handed[0][3 + PIECE - 1], handed[1][3]), (1, 2, 3));
    }

    #[test]
    fn who_takes_no_more_ends_it() {
        let mut pieces = Pieces::new(5, |_| Err(io::ErrorKind::BrokenPipe.into()));
        for _ in 0..3 {
            let error = pieces.write_all(&vec![0; PIECE + 1]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        }
        pieces.write_all(&[0; 1024]).unwrap();
    }
}
