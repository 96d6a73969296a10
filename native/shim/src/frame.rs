//! Frames of the agent's protocol (docs/protocol.md, section 3): u8 type, u32 length, payload.

use std::io::{self, ErrorKind};
use tokio::io::{AsyncRead, AsyncReadExt};

pub const REQUEST: u8 = 1;
pub const DATA: u8 = 2;
pub const EOF: u8 = 3;
pub const STARTED: u8 = 16;
pub const STDOUT: u8 = 17;
pub const STDERR: u8 = 18;
pub const END: u8 = 19;
pub const ERROR: u8 = 20;
/// Bytes before a payload.
pub const HEAD: usize = 5;
/// Longest payload of what a guest sends.
pub const MAX: u32 = 1 << 20;

/// What comes next.
pub struct Head {
    pub kind: u8,
    pub length: u32,
}

/// Reads a frame's head. `None`: the stream ended between two frames.
pub async fn head(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Head>> {
    let mut first = [0];
    if from.read(&mut first).await? == 0 {
        return Ok(None);
    }
    let length = from.read_u32().await?;
    if length > MAX { Err(ErrorKind::InvalidData.into()) } else { Ok(Some(Head { kind: first[0], length })) }
}

/// The bytes of a head.
pub fn encode_head(kind: u8, length: u32) -> [u8; HEAD] {
    let [a, b, c, d] = length.to_be_bytes();
    [kind, a, b, c, d]
}

/// A request; short ones only, their length fits.
pub fn request(payload: &[u8]) -> Vec<u8> {
    [&encode_head(REQUEST, u32::try_from(payload.len()).unwrap_or(u32::MAX))[..], payload].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Whatever a guest sends is a head, an end or an error, and never longer than there is room for.
        #[test]
        fn no_bytes_make_more_than_a_head(bytes in prop::collection::vec(any::<u8>(), 0..12)) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            match runtime.block_on(head(&mut &bytes[..])) {
                Ok(Some(Head { kind, length })) => {
                    prop_assert!(length <= MAX);
                    prop_assert_eq!(&encode_head(kind, length), &bytes[..HEAD]);
                }
                Ok(None) => prop_assert!(bytes.is_empty()),
                Err(_) => prop_assert!(bytes.len() < HEAD || bytes[1..HEAD] > MAX.to_be_bytes()[..]),
            }
        }
    }
}
