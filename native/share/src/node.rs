//! What the guest knows of the shared tree: a number for each file, behind which the server holds the file itself. So a number means the same
//! file whatever becomes of its name.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Statx, StatxFlags, makedev, statx};
use rustix::io::Errno;

use crate::abi::ROOT;

/// The most files a guest may know at once. Each costs a descriptor and about 200 bytes; a kernel that is told to forgets some.
pub const MOST: usize = 400_000;

/// Which file it is, on this host.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Identity {
    /// The share's place: the same file in two shares is two nodes, because what may be done to it depends on the share.
    pub share: usize,
    pub device: u64,
    pub inode: u64,
}

#[derive(Debug)]
pub struct Node {
    /// Opened with O_PATH: it can be neither read nor written, nor does opening it have an effect.
    file: OwnedFd,
    pub identity: Identity,
    pub kind: FileType,
}

impl Node {
    /// The file of a share that `file` (O_PATH) is, and what it is like now.
    pub fn new(file: OwnedFd, share: usize) -> Result<(Self, Statx), Errno> {
        let status = status(&file)?;
        let identity =
            Identity { share, device: makedev(status.stx_dev_major, status.stx_dev_minor), inode: status.stx_ino };
        Ok((Self { file, identity, kind: FileType::from_raw_mode(status.stx_mode.into()) }, status))
    }

    pub fn status(&self) -> Result<Statx, Errno> {
        status(&self.file)
    }

    /// Its name among this process's descriptors, in /proc/self/fd.
    pub fn number(&self) -> String {
        self.file.as_raw_fd().to_string()
    }
}

impl AsFd for Node {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

pub fn status(file: impl AsFd) -> Result<Statx, Errno> {
    statx(file, c"", AtFlags::EMPTY_PATH | AtFlags::NO_AUTOMOUNT, StatxFlags::BASIC_STATS)
}

struct Known {
    /// `None`: the guest was told of it by a server before this one, and it is no more.
    node: Option<Arc<Node>>,
    /// How often the guest was told of it and has not forgotten it since.
    lookups: u64,
}

pub struct Nodes {
    by_number: HashMap<u64, Known>,
    by_identity: HashMap<Identity, u64>,
    /// The first number that is not a share's.
    first: u64,
    next: u64,
}

impl Nodes {
    /// `shares` are always known, by the numbers behind the root's.
    pub fn new(shares: Vec<Node>) -> Self {
        let first = ROOT + 1 + shares.len() as u64;
        let mut nodes = Self { by_number: HashMap::new(), by_identity: HashMap::new(), first, next: first };
        for (number, node) in (ROOT + 1..).zip(shares) {
            nodes.by_identity.insert(node.identity, number);
            nodes.by_number.insert(number, Known { node: Some(Arc::new(node)), lookups: 1 });
        }
        nodes
    }

    /// The number of a share, by its place.
    pub fn of_share(place: usize) -> u64 {
        ROOT + 1 + place as u64
    }

    pub fn get(&self, number: u64) -> Result<Arc<Node>, Errno> {
        self.by_number.get(&number).ok_or(Errno::STALE)?.node.clone().ok_or(Errno::IO)
    }

    /// The number of a file the guest is told of. A number is never given twice.
    pub fn tell(&mut self, node: Node) -> Result<(u64, Arc<Node>), Errno> {
        if self.by_number.len() >= MOST && !self.by_identity.contains_key(&node.identity) {
            return Err(Errno::NFILE);
        }
        match self.by_identity.entry(node.identity) {
            Entry::Occupied(known) => {
                let number = *known.get();
                let known = self.by_number.get_mut(&number).ok_or(Errno::STALE)?;
                known.lookups = known.lookups.saturating_add(1);
                Ok((number, known.node.clone().ok_or(Errno::IO)?))
            }
            Entry::Vacant(unknown) => {
                let number = self.next;
                self.next += 1;
                unknown.insert(number);
                let node = Arc::new(node);
                self.by_number.insert(number, Known { node: Some(Arc::clone(&node)), lookups: 1 });
                Ok((number, node))
            }
        }
    }

    /// The guest has forgotten that it was told of a file so many times. Shares stay.
    pub fn forget(&mut self, number: u64, lookups: u64) {
        if number < self.first {
            return;
        }
        let Entry::Occupied(mut known) = self.by_number.entry(number) else { return };
        known.get_mut().lookups = known.get().lookups.saturating_sub(lookups);
        if known.get().lookups == 0
            && let Some(node) = known.remove().node
            && self.by_identity.get(&node.identity) == Some(&number)
        {
            self.by_identity.remove(&node.identity);
        }
    }

    /// The files the guest knows beside the shares, with how often it was told of each.
    pub fn list(&self) -> Vec<(u64, u64, Arc<Node>)> {
        let known = self.by_number.iter().filter(|(number, _)| **number >= self.first);
        known.filter_map(|(number, known)| Some((*number, known.lookups, Arc::clone(known.node.as_ref()?)))).collect()
    }

    /// The next number.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// What a server before this one has told the guest of; `None`: it is no more.
    pub fn go_on_with(&mut self, number: u64, lookups: u64, node: Option<Node>) -> Result<(), Errno> {
        if number < self.first || self.by_number.len() >= MOST || self.by_number.contains_key(&number) {
            return Err(Errno::INVAL);
        }
        let node = node.map(Arc::new);
        if let Some(node) = &node {
            // Two files may have become one. Then the guest has two numbers for it, and is told the first.
            self.by_identity.entry(node.identity).or_insert(number);
        }
        self.by_number.insert(number, Known { node, lookups });
        self.go_on_at(number.saturating_add(1));
        Ok(())
    }

    /// Numbers below this one have been given.
    pub fn go_on_at(&mut self, next: u64) {
        self.next = self.next.max(next);
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.by_number.len()
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{Mode, OFlags, open};

    use super::*;

    fn node(path: &std::path::Path) -> Node {
        Node::new(open(path, OFlags::PATH | OFlags::NOFOLLOW, Mode::empty()).unwrap(), 0).unwrap().0
    }

    #[test]
    fn a_file_has_one_number_until_it_is_forgotten_as_often_as_it_was_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "").unwrap();
        let mut nodes = Nodes::new(vec![node(dir.path())]);
        let (number, _) = nodes.tell(node(&path)).unwrap();
        let link = dir.path().join("link");
        std::fs::hard_link(&path, &link).unwrap();
        assert_eq!(nodes.tell(node(&link)).unwrap().0, number);
        nodes.forget(number, 1);
        assert!(nodes.get(number).is_ok());
        nodes.forget(number, 1);
        assert_eq!(nodes.get(number).unwrap_err(), Errno::STALE);
        assert_ne!(nodes.tell(node(&path)).unwrap().0, number);
    }

    #[test]
    fn a_share_stays_and_what_is_unknown_is_no_matter() {
        let dir = tempfile::tempdir().unwrap();
        let mut nodes = Nodes::new(vec![node(dir.path())]);
        nodes.forget(Nodes::of_share(0), u64::MAX);
        nodes.forget(77, 1);
        assert!(nodes.get(Nodes::of_share(0)).is_ok());
        assert_eq!(nodes.len(), 1);
    }
}
