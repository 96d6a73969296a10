//! What the guest knows of the shares: a number for each file.
//!
//! Behind a number stands a descriptor, and a guest's kernel keeps numbers for as long as it has memory: a walk through a large tree would use up
//! descriptors. So there is a most of them (`Limits::nodes`), and beyond it files that are not open and were not asked for lately are let go: the
//! number stays, without a descriptor. When the guest uses such a number the answer is ESTALE, upon which its kernel walks the path again, with
//! the server's answer for each part of it (LOOKUP_REVAL, the way network file systems take), and the file found gets the same number again, if it
//! is still the same file. Neither of the other ways is as good: ENFILE would fail a program that has done nothing wrong, and a notification to
//! forget a name (FUSE_NOTIFY_INVAL_ENTRY) unmounts what the guest has mounted there. Directories are let go last, because the working
//! directory of a process is reached by no path.
//!
//! Numbers without a descriptor are bounded as well (`MOST`); beyond that the least used are forgotten. Such a file then gets a new number.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use rustix::fs::FileType;
use rustix::io::Errno;

use crate::abi::ROOT;
use crate::node::{Identity, Node};

/// The most numbers. Each takes about 150 bytes, and 80 more while it has a descriptor.
pub const MOST: usize = 114_688;
/// How many are let go or forgotten at once, so that looking for them costs little.
const BATCH: usize = 1024;

enum State {
    Held(Arc<Node>),
    /// With what it is told by when the guest looks it up again.
    LetGo(Identity, u64),
    /// It was known in a server before this one, and is no more.
    Lost,
}

struct Known {
    state: State,
    /// How often the guest was told of it and has not forgotten it since.
    lookups: u64,
    is_directory: bool,
    /// Since it was last considered to be let go.
    used: bool,
}

impl Known {
    fn new(node: &Arc<Node>) -> Self {
        let is_directory = node.kind == FileType::Directory;
        Self { state: State::Held(Arc::clone(node)), lookups: 1, is_directory, used: true }
    }

    fn identity(&self) -> Option<Identity> {
        match &self.state {
            State::Held(node) => Some(node.identity),
            State::LetGo(identity, _) => Some(*identity),
            State::Lost => None,
        }
    }

    /// Nothing is open of it, nor is a request under way.
    fn is_idle(&self) -> bool {
        matches!(&self.state, State::Held(node) if Arc::strong_count(node) == 1)
    }

    fn is_let_go(&self) -> bool {
        matches!(self.state, State::LetGo(..))
    }

    fn tell(&mut self) {
        self.lookups = self.lookups.saturating_add(1);
        self.used = true;
    }
}

pub struct Nodes {
    by_number: BTreeMap<u64, Known>,
    by_identity: HashMap<Identity, u64>,
    /// The first number that is not a share's.
    first: u64,
    next: u64,
    /// How many have a descriptor, and may have one.
    held: usize,
    most_held: usize,
    most: usize,
    /// What was let go and not taken yet.
    released: Vec<(u64, Arc<Node>)>,
    /// Where the search for what can be let go, or forgotten, goes on.
    hand: u64,
}

impl Nodes {
    /// `shares` are always known, by the numbers behind the root's.
    pub fn new(shares: Vec<Node>, most_held: usize, most: usize) -> Self {
        let first = ROOT + 1 + shares.len() as u64;
        let (by_number, by_identity) = (BTreeMap::new(), HashMap::new());
        let mut nodes = Self {
            by_number,
            by_identity,
            first,
            next: first,
            held: shares.len(),
            most_held,
            most,
            hand: first,
            released: Vec::new(),
        };
        for (number, node) in (ROOT + 1..).zip(shares) {
            nodes.by_identity.insert(node.identity, number);
            nodes.by_number.insert(number, Known::new(&Arc::new(node)));
        }
        nodes
    }

    /// The number of a share, by its place.
    pub fn of_share(place: usize) -> u64 {
        ROOT + 1 + place as u64
    }

    /// # Errors
    /// STALE: the guest has to look the file up anew. IO: it is no more.
    pub fn get(&mut self, number: u64) -> Result<Arc<Node>, Errno> {
        let known = self.by_number.get_mut(&number).ok_or(Errno::STALE)?;
        known.used = true;
        match &known.state {
            State::Held(node) => Ok(Arc::clone(node)),
            State::LetGo(..) => Err(Errno::STALE),
            State::Lost => Err(Errno::IO),
        }
    }

    /// The number of a file the guest is told of. A number is never given to two files.
    ///
    /// # Errors
    /// NFILE: as many files are open, or are just asked for, as there may be descriptors.
    pub fn tell(&mut self, node: Node) -> Result<(u64, Arc<Node>), Errno> {
        let Some(&number) = self.by_identity.get(&node.identity) else { return self.tell_new(node) };
        let known = self.by_number.get_mut(&number).ok_or(Errno::STALE)?;
        match &known.state {
            State::Held(held) => {
                // As long as it is held no other file has its inode.
                let held = Arc::clone(held);
                known.tell();
                Ok((number, held))
            }
            State::LetGo(_, born) if *born == node.born && *born != 0 => self.hold_again(number, node),
            _ => {
                // The inode is a later file's.
                self.remove(number);
                self.tell_new(node)
            }
        }
    }

    fn hold_again(&mut self, number: u64, node: Node) -> Result<(u64, Arc<Node>), Errno> {
        self.make_room()?;
        let known = self.by_number.get_mut(&number).ok_or(Errno::STALE)?;
        let node = Arc::new(node);
        known.state = State::Held(Arc::clone(&node));
        known.tell();
        self.held += 1;
        Ok((number, node))
    }

    fn tell_new(&mut self, node: Node) -> Result<(u64, Arc<Node>), Errno> {
        self.make_room()?;
        if self.by_number.len() >= self.most {
            self.forget_some();
        }
        let number = self.next;
        self.next += 1;
        let node = Arc::new(node);
        self.by_identity.insert(node.identity, number);
        self.by_number.insert(number, Known::new(&node));
        self.held += 1;
        Ok((number, node))
    }

    /// The files that were let go since the last time. They end with what is returned.
    pub fn released(&mut self) -> Vec<(u64, Arc<Node>)> {
        std::mem::take(&mut self.released)
    }

    /// The guest has forgotten that it was told of a file so many times. Shares stay. True: the guest knows that number no more.
    pub fn forget(&mut self, number: u64, lookups: u64) -> (bool, Option<Arc<Node>>) {
        if number < self.first {
            return (false, None);
        }
        let Some(known) = self.by_number.get_mut(&number) else { return (true, None) };
        known.lookups = known.lookups.saturating_sub(lookups);
        if known.lookups > 0 { (false, None) } else { (true, self.remove(number)) }
    }

    /// The file, if it was held.
    fn remove(&mut self, number: u64) -> Option<Arc<Node>> {
        let known = self.by_number.remove(&number)?;
        self.held -= usize::from(matches!(known.state, State::Held(_)));
        if let Some(identity) = known.identity()
            && self.by_identity.get(&identity) == Some(&number)
        {
            self.by_identity.remove(&identity);
        }
        match known.state {
            State::Held(node) => Some(node),
            _ => None,
        }
    }

    /// The files that are held beside the shares, with how often the guest was told of each. Others are looked up anew in a server that goes on.
    pub fn list(&self) -> Vec<(u64, u64, Arc<Node>)> {
        let held = self.by_number.range(self.first..).filter_map(|(number, known)| match &known.state {
            State::Held(node) => Some((*number, known.lookups, Arc::clone(node))),
            _ => None,
        });
        held.collect()
    }

    /// The next number.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// What a server before this one has told the guest of; `None`: it is no more.
    ///
    /// # Errors
    /// INVAL: the number is taken, or there are too many.
    pub fn go_on_with(&mut self, number: u64, lookups: u64, node: Option<Node>) -> Result<(), Errno> {
        if number < self.first || self.by_number.len() >= self.most || self.by_number.contains_key(&number) {
            return Err(Errno::INVAL);
        }
        let mut known = Known { state: State::Lost, lookups, is_directory: false, used: true };
        if let Some(node) = node {
            // Two files may have become one. Then the guest has two numbers for it, and is told the first.
            self.by_identity.entry(node.identity).or_insert(number);
            known.is_directory = node.kind == FileType::Directory;
            if self.make_room().is_ok() {
                known.state = State::Held(Arc::new(node));
                self.held += 1;
            } else {
                known.state = State::LetGo(node.identity, node.born);
            }
        }
        self.by_number.insert(number, known);
        self.go_on_at(number.saturating_add(1));
        Ok(())
    }

    /// Numbers below this one have been given.
    pub fn go_on_at(&mut self, next: u64) {
        self.next = self.next.max(next);
    }

    /// Room for one more descriptor.
    fn make_room(&mut self) -> Result<(), Errno> {
        if self.held < self.most_held {
            return Ok(());
        }
        let wanted = BATCH.min(self.most_held / 8).max(1);
        let files = self.sweep(wanted, |known| !known.is_directory && known.is_idle());
        let found = if files.is_empty() { self.sweep(wanted, Known::is_idle) } else { files };
        for number in found {
            if let Some(known) = self.by_number.get_mut(&number)
                && let State::Held(node) = &known.state
            {
                let let_go = State::LetGo(node.identity, node.born);
                if let State::Held(node) = std::mem::replace(&mut known.state, let_go) {
                    self.released.push((number, node));
                }
                self.held -= 1;
            }
        }
        if self.held < self.most_held { Ok(()) } else { Err(Errno::NFILE) }
    }

    /// Forgets numbers that have no descriptor.
    fn forget_some(&mut self) {
        let wanted = BATCH.min(self.most / 8).max(1);
        let files = self.sweep(wanted, |known| !known.is_directory && known.is_let_go());
        let found = if files.is_empty() { self.sweep(wanted, Known::is_let_go) } else { files };
        for number in found {
            self.remove(number);
        }
    }

    /// Some of those that fit and were not used since the last time; shares are not among them. Goes round twice at most: the first time
    /// everything may have been used.
    fn sweep(&mut self, wanted: usize, fits: impl Fn(&Known) -> bool) -> Vec<u64> {
        let mut found = Vec::new();
        let mut steps = 2 * self.by_number.len();
        while found.len() < wanted && steps > 0 {
            let mut last = None;
            for (&number, known) in self.by_number.range_mut(self.hand..).take(steps) {
                last = Some(number);
                steps -= 1;
                if !fits(known) {
                    continue;
                }
                if std::mem::take(&mut known.used) {
                    continue;
                }
                found.push(number);
                if found.len() == wanted {
                    break;
                }
            }
            self.hand = match last {
                Some(last) if found.len() == wanted => last + 1,
                _ => self.first,
            };
            // Nothing but shares.
            if last.is_none() && self.by_number.range(self.first..).next().is_none() {
                break;
            }
        }
        found.sort_unstable();
        found.dedup();
        found
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.by_number.len()
    }
}

#[cfg(test)]
#[path = "nodes_tests.rs"]
mod tests;
