//! What a guest believes, from one server to the next: a copied guest's kernel has the names and attributes that the original was told, and is told
//! what is no longer so.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use rustix::fs::FileType;
use serde::{Deserialize, Serialize};

use crate::coverage::{Child, Coverage};
use crate::node::Node;
use crate::notice::Notice;

/// A name that the guest believes: the directory's number, the name, the file's number.
#[derive(Deserialize, Serialize)]
pub struct Name(u64, Box<[u8]>, u64);

/// What a guest believes of a file: the stamps of its attributes and contents, and whether the file itself was watched.
#[derive(Clone, Copy, Deserialize, Serialize)]
pub struct Belief {
    pub told: u64,
    pub contents: u64,
    pub is_marked: bool,
}

impl Belief {
    pub fn of(node: &Node) -> Self {
        let trust = &node.trust;
        Self { told: trust.told(), contents: trust.contents(), is_marked: trust.is_marked() }
    }
}

impl Coverage {
    /// What the guest believes, and the notices that it may not have got.
    pub fn beliefs(&self) -> (Vec<Name>, Vec<Notice>) {
        let state = self.state();
        let names = state.directories.iter().flat_map(|(parent, directory)| {
            directory.names.iter().map(|(name, child)| Name(*parent, name.clone(), child.number))
        });
        (names.collect(), state.sent.iter().chain(&state.waiting).cloned().collect())
    }

    /// Watches what a copied guest believes. `files` are those it knows, each with what it believes. `run` then compares that with what there is.
    pub fn go_on_with(&self, names: Vec<Name>, notices: Vec<Notice>, files: HashMap<u64, (Arc<Node>, Belief)>) {
        let mut doubtful = notices;
        let mut named = HashSet::new();
        for Name(parent, name, number) in names {
            let child = files.get(&number).map(|(node, _)| node);
            if files.get(&parent).is_some_and(|(directory, _)| self.mark(parent, directory)) {
                let node = child.map_or_else(Weak::new, Arc::downgrade);
                if self.state().add(parent, &name, Child { number, node }) {
                    if let Some(child) = child.filter(|child| child.kind != FileType::Directory) {
                        child.trust.set_named(true);
                        named.insert(number);
                    }
                    continue;
                }
            }
            doubtful.push(Notice::Doubtful { parent, name });
        }
        for (number, (node, belief)) in &files {
            node.trust.set_told(belief.told);
            node.trust.set_contents(belief.contents);
            let is_believed = belief.told != 0 || belief.is_marked;
            let needs_mark = belief.is_marked || !named.contains(number);
            if is_believed && needs_mark && !self.mark(*number, node) {
                doubtful.push(Notice::Inode { node: *number, pages: true });
            }
        }
        self.state().waiting.extend(doubtful);
        self.is_behind.store(true, Ordering::Release);
    }
}
