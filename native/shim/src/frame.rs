//! Frames of the agent's protocol. The shim reads only their heads, and passes payloads on or drops them.

use machinen_protocol::frame::{self, HEADER, Kind, MAX_PAYLOAD};
use std::io::{self, ErrorKind};
use tokio::io::{AsyncRead, AsyncReadExt};

/// The head of a frame.
#[derive(Clone, Copy)]
pub struct Head {
    /// The number on the wire; a guest may send any.
    number: u8,
    pub length: u32,
}

impl Head {
    pub fn from_bytes([number, length @ ..]: [u8; HEADER]) -> Self {
        Head { number, length: u32::from_be_bytes(length) }
    }

    pub fn to_bytes(self) -> [u8; HEADER] {
        let [a, b, c, d] = self.length.to_be_bytes();
        [self.number, a, b, c, d]
    }

    /// `None`: the protocol has no such kind.
    pub fn kind(self) -> Option<Kind> {
        Kind::from_wire(self.number)
    }

    /// Whether the payload's length is allowed.
    pub fn fits(self) -> bool {
        self.length as usize <= MAX_PAYLOAD
    }
}

/// Reads a frame's head. `None`: the stream ended between two frames.
///
/// # Errors
/// `InvalidData` when the payload is too long, otherwise those of the stream.
pub async fn head(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Head>> {
    let mut first = [0];
    if from.read(&mut first).await? == 0 {
        return Ok(None);
    }
    let head = Head { number: first[0], length: from.read_u32().await? };
    if head.fits() { Ok(Some(head)) } else { Err(ErrorKind::InvalidData.into()) }
}

/// The bytes of a frame.
///
/// # Errors
/// `InvalidInput` when the payload is longer than frames of this kind may be.
pub fn encode(kind: Kind, payload: &[u8]) -> io::Result<Vec<u8>> {
    frame::encode(kind, payload).map_err(|error| io::Error::new(ErrorKind::InvalidInput, error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Any bytes of a guest give a head, the end or an error, and never a longer payload than is allowed.
        #[test]
        fn no_bytes_make_more_than_a_head(bytes in prop::collection::vec(any::<u8>(), 0..12)) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            match runtime.block_on(head(&mut &bytes[..])) {
                Ok(Some(head)) => {
                    prop_assert!(head.fits());
                    prop_assert_eq!(&head.to_bytes(), &bytes[..HEADER]);
                }
                Ok(None) => prop_assert!(bytes.is_empty()),
                Err(_) => prop_assert!(bytes.len() < HEADER || bytes[1..HEADER] > (1_u32 << 20).to_be_bytes()[..]),
            }
        }
    }
}
