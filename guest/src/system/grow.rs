//! Grows an ext4 file system to the size of its disk. Before the boot the host only enlarges the (sparse) file.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use rustix::ioctl::{Setter, ioctl, opcode};

use super::disks::Disk;

/// `EXT4_IOC_RESIZE_FS`: grow the mounted filesystem online to this many blocks.
const RESIZE: rustix::ioctl::Opcode = opcode::write::<u64>(b'f', 16);

const SUPERBLOCK_OFFSET: u64 = 1024;
const MAGIC: u16 = 0xef53;
const INCOMPAT_64BIT: u32 = 0x80;

/// What the superblock says about the filesystem's size.
#[derive(Debug, PartialEq, Eq)]
struct Size {
    blocks: u64,
    block_bytes: u64,
}

/// Grows the file system mounted at `mount` to fill `disk`. If the sizes match, this reads only one block, which mounting has read already.
pub fn to_disk(mount: impl AsFd, disk: &Disk) -> io::Result<()> {
    let mut superblock = [0; 1024];
    File::open(disk.node())?.read_exact_at(&mut superblock, SUPERBLOCK_OFFSET)?;
    let size =
        parse(&superblock).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not an ext4 filesystem"))?;
    let wanted = disk.bytes()? / size.block_bytes;
    if wanted <= size.blocks {
        return Ok(());
    }
    // SAFETY: the kernel reads one u64 through the pointer and keeps nothing.
    unsafe { ioctl(mount, Setter::<RESIZE, u64>::new(wanted))? };
    Ok(())
}

fn parse(superblock: &[u8; 1024]) -> Option<Size> {
    let word = |at: usize| superblock[at..].first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
    if u16::from_le_bytes([superblock[0x38], superblock[0x39]]) != MAGIC {
        return None;
    }
    let high = if word(0x60) & INCOMPAT_64BIT == 0 { 0 } else { word(0x150) };
    // An ext4 has blocks of at most 64 KiB; larger values would overflow the shift.
    let block_bytes = 1024_u64.checked_shl(word(0x18)).filter(|_| word(0x18) <= 6)?;
    Some(Size { blocks: u64::from(high) << 32 | u64::from(word(0x4)), block_bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn superblock(low: u32, log: u32, incompat: u32, high: u32) -> [u8; 1024] {
        let mut bytes = [0; 1024];
        bytes[0x38..0x3a].copy_from_slice(&MAGIC.to_le_bytes());
        for (at, value) in [(0x4, low), (0x18, log), (0x60, incompat), (0x150, high)] {
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn reads_the_size_of_a_filesystem() {
        assert_eq!(parse(&superblock(524_288, 2, 0, 9)), Some(Size { blocks: 524_288, block_bytes: 4096 }));
    }

    #[test]
    fn counts_the_high_word_of_a_64bit_filesystem() {
        assert_eq!(
            parse(&superblock(1, 0, INCOMPAT_64BIT, 1)),
            Some(Size { blocks: (1 << 32) + 1, block_bytes: 1024 })
        );
    }

    #[test]
    fn refuses_what_is_no_ext4() {
        assert_eq!(parse(&[0; 1024]), None);
        assert_eq!(parse(&superblock(1, 7, 0, 0)), None);
        assert_eq!(parse(&superblock(1, u32::MAX, 0, 0)), None);
    }
}
