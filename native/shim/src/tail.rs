//! The end of a text.

/// How many bytes are kept.
const LENGTH: usize = 8 * 1024;

/// The last bytes of what was pushed.
#[derive(Default)]
pub struct Tail(Vec<u8>);

impl Tail {
    pub fn push(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(&bytes[bytes.len().saturating_sub(LENGTH)..]);
        // Not cut at every push, because moving the rest costs more than keeping it for a while.
        if self.0.len() > 2 * LENGTH {
            self.0.drain(..self.0.len() - LENGTH);
        }
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.0[self.0.len().saturating_sub(LENGTH)..]).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_bytes_are_kept_however_they_come() {
        let all: String = (0..9000u32).map(|n| char::from(b'a' + u8::try_from(n % 26).unwrap())).collect();
        for piece in [1, 7, 4096, 8192, 9000] {
            let mut tail = Tail::default();
            for bytes in all.as_bytes().chunks(piece) {
                tail.push(bytes);
            }
            assert_eq!(tail.text(), all[all.len() - LENGTH..], "pieces of {piece}");
        }
    }
}
