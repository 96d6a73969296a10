//! The guest's memory, where it is a file.

use crate::failed::{Failed, Step};
use crate::identity::Identity;
use crate::private_memory::PrivateMemory;
use crate::{files, pieces, plan};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use std::io;
use std::sync::atomic::AtomicBool;

/// Kept open for as long as the VM lives, to be captured.
pub enum Memory {
    /// What the guest writes is in the file.
    Shared(File),
    /// What the guest writes is the VMM's alone.
    Private(PrivateMemory),
}

impl Memory {
    pub fn open(plan: &plan::Memory) -> Result<Self, Failed> {
        match plan {
            plan::Memory::New { size_bytes, .. } => {
                create(*size_bytes).map(Memory::Shared).map_err(|error| Failed::new(Step::Files, "memory", &error))
            }
            plan::Memory::File { from, .. } => files::open(from)
                .map(|base| Memory::Private(PrivateMemory { base }))
                .map_err(|error| Failed::new(Step::Files, from.display(), &error)),
        }
    }

    /// What the VMM inherits.
    pub fn file(&self) -> &File {
        match self {
            Memory::Shared(file) | Memory::Private(PrivateMemory { base: file }) => file,
        }
    }

    /// Copies what will be there, while the guest runs on: all that never changes; and, of what it changes, what it holds now. That is
    /// copied again later, over pages the file has by then, which takes a part of the time finding them took.
    pub fn copy_ahead(&self, to: &File, cancel: &AtomicBool) -> io::Result<()> {
        match self {
            Memory::Shared(memory) => copy_shared(memory, to, cancel).map(drop),
            Memory::Private(memory) => memory.copy_base(to, cancel),
        }
    }

    /// Completes the copy while the guest stands still, and counts the bytes written.
    pub fn copy_rest(&self, vmm: Identity, to: &File, cancel: &AtomicBool) -> io::Result<u64> {
        match self {
            Memory::Shared(memory) => copy_shared(memory, to, cancel),
            Memory::Private(memory) => memory.copy_own(vmm, to, cancel),
        }
    }
}

fn create(size: u64) -> io::Result<File> {
    let file = File::from(memfd_create(c"machinen-memory", MFdFlags::MFD_CLOEXEC)?);
    file.set_len(size)?;
    Ok(file)
}

/// Memory the guest never touched is a hole.
fn copy_shared(memory: &File, to: &File, cancel: &AtomicBool) -> io::Result<u64> {
    let length = memory.metadata()?.len();
    let mut at = 0;
    let ranges = std::iter::from_fn(|| {
        let range = files::next_data(memory, at, length).transpose();
        if let Some(Ok((_, end))) = range {
            at = end;
        }
        range.map(|range| range.map(|(start, end)| pieces::Range { from: start, to: start, length: end - start }))
    });
    let bytes = pieces::copy(memory, to, ranges, cancel)?;
    to.set_len(length)?;
    Ok(bytes)
}
