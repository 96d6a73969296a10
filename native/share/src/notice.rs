//! What the guest's kernel is told without having asked: that it should no longer believe something.

use serde::{Deserialize, Serialize};
use zerocopy::IntoBytes;

use crate::abi::{InvalidateEntry, InvalidateInode, OutHeader, notify};

/// Their order is that in which they are sent. The guest's kernel takes one about a name only when no lookup in that directory is under way; so
/// what a notice of a file is about is known to it.
#[derive(Clone, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub enum Notice {
    /// The name means another file, or none. What the guest has mounted there is detached.
    Renamed { parent: u64, name: Box<[u8]> },
    /// The name is to be looked up before it is believed again.
    Doubtful { parent: u64, name: Box<[u8]> },
    /// The attributes, and the contents that it has cached if `pages`.
    Inode { node: u64, pages: bool },
    /// Not for the kernel: the relay sends the number back once all notices before it have been taken (opcode FUSE_NOTIFY_REPLY).
    Sync(u64),
}

impl Notice {
    pub fn message(&self) -> Vec<u8> {
        match self {
            Self::Inode { node, pages } => {
                let offset = if *pages { 0 } else { -1 };
                message(notify::INVALIDATE_INODE, &[InvalidateInode { node: *node, offset, length: 0 }.as_bytes()])
            }
            Self::Renamed { parent, name } => entry(*parent, name, 0),
            Self::Doubtful { parent, name } => entry(*parent, name, notify::EXPIRE_ONLY),
            Self::Sync(number) => message(notify::SYNC, &[number.as_bytes()]),
        }
    }
}

fn entry(parent: u64, name: &[u8], flags: u32) -> Vec<u8> {
    let name_len = u32::try_from(name.len()).unwrap_or_default();
    message(notify::INVALIDATE_ENTRY, &[InvalidateEntry { parent, name_len, flags }.as_bytes(), name, b"\0"])
}

fn message(code: i32, parts: &[&[u8]]) -> Vec<u8> {
    let body = parts.concat();
    let len = u32::try_from(size_of::<OutHeader>() + body.len()).unwrap_or_default();
    [OutHeader { len, error: code, unique: 0 }.as_bytes(), &body].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_as_long_as_the_kernel_wants_them() {
        let name: Box<[u8]> = b"name".as_slice().into();
        let messages = [
            (Notice::Inode { node: 7, pages: true }, 16 + 24),
            (Notice::Renamed { parent: 7, name: name.clone() }, 16 + 16 + 5),
            (Notice::Doubtful { parent: 7, name }, 16 + 16 + 5),
            (Notice::Sync(1), 16 + 8),
        ];
        for (notice, length) in messages {
            let message = notice.message();
            assert_eq!(message.len(), length, "{notice:?}");
            assert_eq!(message[..4], u32::try_from(length).unwrap().to_ne_bytes());
            assert_eq!(message[8..16], [0; 8]);
        }
    }
}
