//! The guest's memory, if it is a file.

use crate::error::Error;
use crate::identity::Identity;
use crate::parallel_copy::Known;
use crate::private_memory::PrivateMemory;
use crate::{files, parallel_copy, plan};
use machinen_archive::next_data;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::sync::atomic::AtomicBool;

/// The name of the memfd in `/proc`.
const MEMORY: &CStr = c"machinen-memory";

/// The memory's file, kept open as long as the VM lives, to be captured.
pub enum Memory {
    /// The guest writes to the file.
    Shared(File),
    /// The VMM maps the file privately, so the guest's writes are in the VMM's own pages.
    Private(PrivateMemory),
}

impl Memory {
    pub fn open(plan: &plan::Memory) -> Result<Self, Error> {
        match plan {
            plan::Memory::New { size_bytes, .. } => {
                create(*size_bytes).map(Memory::Shared).map_err(|error| Error::io("memory", error))
            }
            plan::Memory::File { from, .. } => files::open(from)
                .map(|base| Memory::Private(PrivateMemory { base }))
                .map_err(|error| Error::io(from.display(), error)),
        }
    }

    /// The file that the VMM inherits.
    pub fn file(&self) -> &File {
        match self {
            Memory::Shared(file) | Memory::Private(PrivateMemory { base: file }) => file,
        }
    }

    /// Copies all memory while the guest runs on. Returns what the copy holds.
    pub fn copy_ahead(&self, vmm: Identity, to: &File, cancel: &AtomicBool) -> io::Result<Known> {
        let known = Known::new(self.file().metadata()?.len())?;
        if let Memory::Private(memory) = self {
            memory.copy_base(to, cancel)?;
        }
        self.update(vmm, to, &known, cancel)?;
        Ok(known)
    }

    /// Copies the pages that the copy is not `known` to hold. Returns the number of bytes written. The copy is complete if the guest stands
    /// still.
    pub fn update(&self, vmm: Identity, to: &File, known: &Known, cancel: &AtomicBool) -> io::Result<u64> {
        match self {
            Memory::Shared(memory) => copy_shared(memory, to, known, cancel),
            Memory::Private(memory) => memory.copy_own(vmm, to, known, cancel),
        }
    }
}

fn create(size: u64) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let never_executed = flags | MemfdFlags::NOEXEC_SEAL;
    // Linux before 6.3 does not know MFD_NOEXEC_SEAL.
    let file = File::from(memfd_create(MEMORY, never_executed).or_else(|_| memfd_create(MEMORY, flags))?);
    file.set_len(size)?;
    // A VMM that its guest has taken over can write the memory, but cannot cut it short while the shim copies it.
    let seals = SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    fcntl_add_seals(&file, seals)?;
    Ok(file)
}

/// Copies a memory file whose holes are pages the guest never touched.
fn copy_shared(memory: &File, to: &File, known: &Known, cancel: &AtomicBool) -> io::Result<u64> {
    let length = memory.metadata()?.len();
    let mut at = 0;
    let ranges = std::iter::from_fn(|| {
        let data = next_data(memory, at, length).transpose()?;
        Some(data.map(|data| {
            at = data.end;
            parallel_copy::Range { from: data.start, to: data.start, length: data.end - data.start }
        }))
    });
    let bytes = parallel_copy::copy(memory, to, ranges, known, cancel)?;
    to.set_len(length)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::io::Errno;
    use std::os::unix::fs::FileExt;

    #[test]
    fn its_size_cannot_be_changed() {
        let memory = create(1 << 20).unwrap();
        memory.write_all_at(b"x", (1 << 20) - 1).unwrap();
        let refused = Some(Errno::PERM.raw_os_error());
        for size in [0, 1 << 19, (1 << 20) + 1] {
            assert_eq!(memory.set_len(size).unwrap_err().raw_os_error(), refused, "{size}");
        }
        let unseal = fcntl_add_seals(&memory, SealFlags::WRITE);
        assert_eq!(unseal, Err(Errno::PERM));
        assert_eq!(memory.metadata().unwrap().len(), 1 << 20);
    }
}
