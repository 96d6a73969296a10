//! Finds the messages in the bytes of a port.

use std::io::{self, Read};

use machinen_protocol::share::{ANSWER_HEADER, MAX_MESSAGE};

/// The u32 at that place of a message.
pub fn word(message: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(message[at..at + 4].try_into().unwrap_or_default())
}

/// The bytes from the host, which come in pieces of any length.
pub struct Received {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl Default for Received {
    fn default() -> Self {
        Self { buffer: vec![0; MAX_MESSAGE + (64 << 10)], start: 0, end: 0 }
    }
}

impl Received {
    /// The next message, if all of it is here.
    pub fn next(&mut self) -> io::Result<Option<&[u8]>> {
        let bytes = &self.buffer[self.start..self.end];
        if bytes.len() < ANSWER_HEADER {
            return Ok(None);
        }
        let length = word(bytes, 0) as usize;
        if !(ANSWER_HEADER..=MAX_MESSAGE).contains(&length) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a message of {length} bytes")));
        }
        if bytes.len() < length {
            return Ok(None);
        }
        let begin = self.start;
        self.start += length;
        Ok(Some(&self.buffer[begin..self.start]))
    }

    /// Reads more. There is room, because a message that fills the buffer is complete.
    pub fn read(&mut self, mut from: impl Read) -> io::Result<usize> {
        self.buffer.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        loop {
            match from.read(&mut self.buffer[self.end..]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                done => return done.inspect(|length| self.end += length),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_found_in_pieces_of_any_length() {
        let message = |length: u32| [&length.to_ne_bytes()[..], &vec![7; length as usize - 4]].concat();
        let stream = [message(16), message(100_000), message(17)].concat();
        for piece in [1, 15, 4096, 1 << 20] {
            let (mut received, mut lengths) = (Received::default(), Vec::new());
            for piece in stream.chunks(piece) {
                received.read(piece).unwrap();
                while let Some(message) = received.next().unwrap() {
                    lengths.push(message.len());
                }
            }
            assert_eq!(lengths, [16, 100_000, 17]);
        }
        let mut received = Received::default();
        received.read(&[0; 16][..]).unwrap();
        assert!(received.next().is_err());
    }
}
