//! The names that a guest believes.

use std::sync::Weak;

use crate::coverage::{Child, Directory, State};
use crate::notice::Notice;
use crate::watch::Key;

/// The most memory for names that are told as valid for long, and the most names.
const MOST_MEMORY: usize = 12 << 20;
pub const MOST_NAMES: usize = MOST_MEMORY / NAME;
/// What a name takes beside its bytes.
const NAME: usize = 96;
/// After so many new names the memory of files that were let go is given back.
const RELEASE_EVERY: usize = 16_384;

impl Directory {
    pub fn cost(&self) -> usize {
        self.names.keys().map(|name| cost(name)).sum()
    }
}

fn cost(name: &[u8]) -> usize {
    NAME + name.len()
}

impl State {
    /// The guest must ask for the file's attributes and contents again.
    pub fn changed(&mut self, node: u64) {
        self.waiting.insert(Notice::Inode { node, pages: true });
    }

    /// The numbers of the marked files with that key.
    pub fn numbers(&self, key: Key) -> Vec<u64> {
        self.marked.range((key, 0)..=(key, u64::MAX)).map(|((_, number), _)| *number).collect()
    }

    /// The guest believes that the name is that file's. False: there are too many names.
    pub fn add(&mut self, parent: u64, name: &[u8], child: Child) -> bool {
        if self.cost >= MOST_MEMORY && !self.sweep() {
            return false;
        }
        let Some(directory) = self.directories.get_mut(&parent) else { return false };
        let number = child.number;
        self.added += 1;
        match directory.names.insert(name.into(), child) {
            None => self.cost += cost(name),
            Some(before) if before.number != number => {
                before.lose_name();
                self.changed(before.number);
            }
            Some(_) => {}
        }
        if self.added >= RELEASE_EVERY {
            self.release();
        }
        true
    }

    /// A weak reference keeps the memory of what it was to.
    fn release(&mut self) {
        self.added = 0;
        let children = self.directories.values_mut().flat_map(|directory| directory.names.values_mut());
        for child in children.filter(|child| child.node.strong_count() == 0) {
            child.node = Weak::new();
        }
    }

    pub fn remove(&mut self, parent: u64, name: &[u8]) -> Option<Child> {
        let child = self.directories.get_mut(&parent)?.names.remove(name)?;
        self.cost -= cost(name);
        Some(child)
    }

    /// Makes room for names, if many files were forgotten.
    fn sweep(&mut self) -> bool {
        if self.forgotten < MOST_NAMES / 8 {
            return false;
        }
        self.forgotten = 0;
        let waiting = &mut self.waiting;
        for (&parent, directory) in &mut self.directories {
            directory.names.retain(|name, child| {
                let is_held = child.node.strong_count() > 0;
                if !is_held {
                    // The guest may know it still: then it was let go.
                    waiting.insert(Notice::Doubtful { parent, name: name.clone() });
                    waiting.insert(Notice::Inode { node: child.number, pages: true });
                }
                is_held
            });
        }
        self.cost = self.directories.values().map(Directory::cost).sum();
        self.cost < MOST_MEMORY
    }
}
