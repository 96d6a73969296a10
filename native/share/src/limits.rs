//! How much a guest may have of this process. What one of these costs is beside it, and all together stay below 64 MiB of memory.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Files that are held without being open. Each is a descriptor here, and keeps an inode in the host kernel's memory.
const NODES: u64 = 49_152;
/// Open files: a descriptor and about 150 bytes.
const HANDLES: u64 = 32_768;
/// Owners of POSIX locks, for each file: a descriptor and about 250 bytes.
const OWNERS: u64 = 16_384;
/// What else needs descriptors: the connections, the shares, requests under way, waiting locks.
const RESERVE: u64 = 256;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Limits {
    pub nodes: usize,
    pub handles: usize,
    pub owners: usize,
}

impl Limits {
    /// As many as the descriptors allow that this process may have.
    pub fn of_this_process() -> Self {
        let limit = getrlimit(Resource::Nofile);
        let most = limit.maximum.or(limit.current);
        // The kernel cannot refuse it: it is not above the maximum.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: most, maximum: most });
        Self::of(most.unwrap_or(u64::MAX))
    }

    fn of(descriptors: u64) -> Self {
        let free = descriptors.saturating_sub(RESERVE).max(64);
        let part = |most: u64, share: u64| usize::try_from(most.min(free / 8 * share)).unwrap_or(usize::MAX);
        Self { nodes: part(NODES, 4), handles: part(HANDLES, 3), owners: part(OWNERS, 1) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_together_are_not_more_than_the_descriptors() {
        assert_eq!(Limits::of(1 << 20), Limits { nodes: 49_152, handles: 32_768, owners: 16_384 });
        for descriptors in [1024, 4096, 65_536] {
            let Limits { nodes, handles, owners } = Limits::of(descriptors);
            assert!(((nodes + handles + owners) as u64) < descriptors && owners > 80, "{descriptors}");
        }
    }
}
