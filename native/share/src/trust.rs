//! What is kept with each file the guest knows, to say whether it may go on believing what it was told.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use rustix::fs::Statx;

const UNMARKED: u8 = 0;
const MARKED: u8 = 1;
/// It cannot be marked, or has been forgotten.
const NEVER: u8 = 2;

#[derive(Debug, Default)]
pub struct Trust {
    /// Its one name is in a directory that is watched, so all changes made by that name are seen.
    named: AtomicBool,
    mark: AtomicU8,
    /// The stamp of the attributes that the guest may believe; 0: of none.
    told: AtomicU64,
    /// The stamp the file had when the guest last began to cache its contents.
    contents: AtomicU64,
}

impl Trust {
    pub fn is_named(&self) -> bool {
        self.named.load(Ordering::Acquire)
    }

    pub fn set_named(&self, named: bool) {
        self.named.store(named, Ordering::Release);
    }

    pub fn is_marked(&self) -> bool {
        self.mark.load(Ordering::Acquire) == MARKED
    }

    pub fn can_be_marked(&self) -> bool {
        self.mark.load(Ordering::Acquire) == UNMARKED
    }

    pub fn set_marked(&self, marked: bool) {
        self.mark.store(if marked { MARKED } else { NEVER }, Ordering::Release);
    }

    pub fn told(&self) -> u64 {
        self.told.load(Ordering::Acquire)
    }

    pub fn set_told(&self, stamp: u64) {
        self.told.store(stamp, Ordering::Release);
    }

    pub fn contents(&self) -> u64 {
        self.contents.load(Ordering::Acquire)
    }

    /// The stamp before.
    pub fn set_contents(&self, stamp: u64) -> u64 {
        self.contents.swap(stamp, Ordering::AcqRel)
    }
}

/// Differs when the file has changed. Never 0.
pub fn stamp(status: &Statx) -> u64 {
    let mut hasher = DefaultHasher::new();
    let (changed, modified) = (status.stx_ctime, status.stx_mtime);
    (changed.tv_sec, changed.tv_nsec, modified.tv_sec, modified.tv_nsec, status.stx_size).hash(&mut hasher);
    hasher.finish().max(1)
}
