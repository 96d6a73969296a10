//! What the guest may believe, for how long, and from when on no more.
//!
//! What is guaranteed, for local file systems (`watch::LOCAL`) whose directories this process may read:
//! - A name, a name's absence, attributes and contents are told as valid for long only if the directory (for directories, files of several
//!   names and files that lost their name: the file itself) was marked before they were read. So each later change makes an event, and the
//!   event a notice to the guest. The guest sees the change as soon as it has the notice.
//! - An event that is taken while something is being read makes that answer valid for no time (`Reading`).
//! - What the guest itself did needs no notice: its kernel knows. If two shares have the same directory, each is told.
//! - Events that were lost (more than 16,384 wait) lead to a comparison of all that was told with what there is.
//!
//! Seen late, because the host's kernel makes no event:
//! - Writes through a shared mapping on the host: when the writer unmaps and closes the file, or at the guest's next open, whichever is first.
//! - Changes made by another name that the file got, in a directory that is not watched, after the guest was told of it: at the next open, or
//!   when the hour is over. (Of a file with several names the file itself is watched, so this is only about names made later.)
//!
//! Where changes cannot be watched (network, FUSE and overlay file systems, no more marks or groups of fanotify, directories this user may not
//! read) everything is valid for no time, and contents are cached only while a file is open.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{FileType, Statx};
use rustix::io::Errno;

use crate::node::Node;
use crate::notice::Notice;
use crate::trust::stamp;
use crate::watch::{Key, Watch};

/// As many operations as the agent may begin at once, and more.
const MOST_SETTLING: usize = 1024;
/// When so many notices wait, because the guest does not take them, it is told nothing more that would need one.
const MOST_WAITING: usize = 65_536;

/// A name that the guest believes to be this file's.
pub(crate) struct Child {
    pub number: u64,
    pub node: Weak<Node>,
}

impl Child {
    /// The file has that name no more.
    pub fn lose_name(&self) {
        if let Some(node) = self.node.upgrade() {
            node.trust.set_named(false);
        }
    }
}

/// A directory that is marked.
#[derive(Default)]
pub(crate) struct Directory {
    /// Events that were taken.
    pub changes: u64,
    pub names: HashMap<Box<[u8]>, Child>,
}

#[derive(Default)]
pub(crate) struct State {
    /// By key and number: a file has a number in each share, and two files may have one key.
    pub marked: BTreeMap<(Key, u64), Weak<Node>>,
    pub directories: HashMap<u64, Directory>,
    /// Notices that wait to be sent, and those that were sent and are not acknowledged yet.
    pub waiting: BTreeSet<Notice>,
    pub sent: Vec<Notice>,
    /// Requests that are answered once the guest has taken all notices of what had changed before.
    pub settling: Vec<u64>,
    /// What the names cost, and how many files were forgotten whose names may still be among them.
    pub cost: usize,
    pub forgotten: usize,
    /// How many names came since memory was given back.
    pub added: usize,
    /// Whether changes to a file system can be watched, by device.
    devices: HashMap<u64, bool>,
}

/// A directory is being read: what is read now is valid if nothing happens in it meanwhile.
#[derive(Clone, Copy, Debug)]
pub struct Reading {
    parent: u64,
    changes: u64,
}

/// What the guest may believe for long.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Valid {
    pub name: bool,
    pub attributes: bool,
}

pub struct Coverage {
    pub(crate) watch: Option<Watch>,
    state: Mutex<State>,
    /// An eventfd, which wakes the watcher.
    pub(crate) wake: OwnedFd,
    /// The guest believes what another server told it, which has to be compared with what there is.
    pub(crate) is_behind: AtomicBool,
}

impl Coverage {
    /// Must be made before the process confines itself. Without `watch` nothing is valid for long.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn new(watch: Option<Watch>) -> Result<Self, Errno> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { watch, state: Mutex::default(), wake, is_behind: AtomicBool::new(false) })
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the watcher send it: a thread that answers requests must not wait for the guest to take a notice.
    fn notify(&self, notice: Notice) {
        self.state().waiting.insert(notice);
        self.wake();
    }

    /// Has the watcher answer that request once the guest knows of all changes until now.
    ///
    /// # Errors
    /// AGAIN: too many such requests wait.
    pub fn settle(&self, unique: u64) -> Result<(), Errno> {
        let mut state = self.state();
        if state.settling.len() >= MOST_SETTLING {
            return Err(Errno::AGAIN);
        }
        state.settling.push(unique);
        drop(state);
        self.wake();
        Ok(())
    }

    pub(crate) fn wake(&self) {
        // It can only fail when it is awake already.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    /// Watches the file itself from now on. False: that cannot be.
    pub fn mark(&self, number: u64, node: &Arc<Node>) -> bool {
        let Some(watch) = self.watch.as_ref().filter(|_| node.trust.can_be_marked()) else {
            return node.trust.is_marked();
        };
        let mut state = self.state();
        if node.trust.can_be_marked() {
            let is_directory = node.kind == FileType::Directory;
            let is_local = *state.devices.entry(node.identity.device).or_insert_with(|| Watch::can_watch(node));
            let key = if is_local { watch.key(node).ok() } else { None };
            let key = key.filter(|_| watch.mark(node.as_fd().as_raw_fd(), is_directory).is_ok());
            if let Some(key) = key {
                state.marked.insert((key, number), Arc::downgrade(node));
                if is_directory {
                    // Names may be there already: the file was let go, and is held again.
                    state.directories.entry(number).or_default();
                }
            }
            node.trust.set_marked(key.is_some());
        }
        node.trust.is_marked()
    }

    /// Before a directory is read.
    pub fn reading(&self, parent: u64, node: &Arc<Node>) -> Option<Reading> {
        if !self.mark(parent, node) {
            return None;
        }
        self.state().directories.get(&parent).map(|directory| Reading { parent, changes: directory.changes })
    }

    /// The file must be marked itself for its attributes to be valid: its status has to be read after that.
    pub fn needs_mark(node: &Node, status: &Statx, reading: Option<Reading>) -> bool {
        node.kind == FileType::Directory || status.stx_nlink > 1 || reading.is_none()
    }

    /// The guest is told that the name is this file's.
    pub fn tell(&self, reading: Option<Reading>, name: &[u8], number: u64, node: &Arc<Node>, status: &Statx) -> Valid {
        if self.has_backlog() {
            node.trust.set_told(0);
            return Valid::default();
        }
        let mut valid = Valid { name: false, attributes: node.trust.is_marked() };
        if let Some(reading) = reading {
            valid.name = self.believe(reading, name, number, node);
            let is_only_name = node.kind != FileType::Directory && status.stx_nlink == 1;
            valid.attributes |= valid.name && is_only_name;
        }
        node.trust.set_told(if valid.attributes { stamp(status) } else { 0 });
        valid
    }

    fn has_backlog(&self) -> bool {
        self.state().waiting.len() >= MOST_WAITING
    }

    fn believe(&self, reading: Reading, name: &[u8], number: u64, node: &Arc<Node>) -> bool {
        let mut guard = self.state();
        let state = &mut *guard;
        let directory = state.directories.get(&reading.parent);
        if directory.is_none_or(|directory| directory.changes != reading.changes) {
            return false;
        }
        let is_added = state.add(reading.parent, name, Child { number, node: Arc::downgrade(node) });
        if is_added {
            // What is a directory or has several names is marked itself, but they lose nothing by this.
            node.trust.set_named(node.kind != FileType::Directory);
        }
        if !state.waiting.is_empty() {
            self.wake();
        }
        is_added
    }

    /// Whether the guest may believe that there is no such name.
    pub fn is_absence_valid(&self, reading: Option<Reading>) -> bool {
        reading.is_some_and(|reading| {
            let state = self.state();
            state.directories.get(&reading.parent).is_some_and(|directory| directory.changes == reading.changes)
        })
    }

    /// Before a file's status is read.
    pub fn is_watched(&self, number: u64, node: &Arc<Node>) -> bool {
        node.trust.is_named() || self.mark(number, node)
    }

    /// Whether the guest may believe attributes, which were read after `is_watched` said this.
    pub fn are_attributes_valid(&self, is_watched: bool, number: u64, node: &Arc<Node>, status: &Statx) -> bool {
        let valid = node.trust.is_marked() || is_watched && node.kind != FileType::Directory && status.stx_nlink == 1;
        let valid = valid && !self.has_backlog();
        if !valid && is_watched {
            // It has got another name: from the next time on.
            self.mark(number, node);
        }
        node.trust.set_told(if valid { stamp(status) } else { 0 });
        valid
    }

    /// The guest opens a file, which is like this now. Whether it may keep what it has cached of the contents.
    pub fn opened(&self, number: u64, node: &Arc<Node>, status: &Statx) -> bool {
        let now = stamp(status);
        let is_watched = self.is_watched(number, node);
        let told = node.trust.told();
        if told != 0 && told != now {
            // Something changed it without an event.
            node.trust.set_told(0);
            self.notify(Notice::Inode { node: number, pages: false });
        }
        node.trust.set_contents(now) == now && is_watched
    }

    /// The guest has removed the name.
    pub fn removed(&self, parent: u64, name: &[u8]) {
        if let Some(child) = self.state().remove(parent, name) {
            child.lose_name();
        }
    }

    /// The guest has renamed something; `reading` is of the new directory, from before.
    pub fn renamed(&self, from: (u64, &[u8]), to: (u64, &[u8]), reading: Option<Reading>, exchanged: bool) {
        let (moved, replaced) = {
            let mut state = self.state();
            (state.remove(from.0, from.1), state.remove(to.0, to.1))
        };
        if let Some(replaced) = replaced {
            replaced.lose_name();
            self.notify(Notice::Inode { node: replaced.number, pages: false });
        }
        let doubtful = |(parent, name): (u64, &[u8])| self.notify(Notice::Doubtful { parent, name: name.into() });
        if exchanged {
            doubtful(from);
            doubtful(to);
        }
        let Some(moved) = moved else { return };
        moved.lose_name();
        let node = moved.node.upgrade().filter(|_| !exchanged);
        let believed =
            node.zip(reading).is_some_and(|(node, reading)| self.believe(reading, to.1, moved.number, &node));
        if !believed {
            // The guest's kernel took what it believes along.
            doubtful(to);
            self.notify(Notice::Inode { node: moved.number, pages: false });
        }
    }

    /// The file is held no more, though the guest knows it. What it believes by a name stays watched with the directory; of what was watched
    /// itself it believes nothing any more.
    pub fn let_go(&self, number: u64, node: &Node) {
        if node.trust.is_marked() {
            self.forgotten(number, Some(node));
            self.notify(Notice::Inode { node: number, pages: true });
        }
    }

    /// The guest knows the file no more.
    pub fn forgotten(&self, number: u64, node: Option<&Node>) {
        let mut guard = self.state();
        let state = &mut *guard;
        state.forgotten += 1;
        if let Some(node) = node
            && let Some(watch) = self.watch.as_ref().filter(|_| node.trust.is_marked())
            && let Ok(key) = watch.key(node)
        {
            state.marked.remove(&(key, number));
            if state.numbers(key).is_empty() {
                // At the latest the mark ends with this process.
                let _ = watch.unmark(node.as_fd().as_raw_fd(), node.kind == FileType::Directory);
            }
        }
        if let Some(node) = node {
            node.trust.set_marked(false);
        }
        let Some(directory) = state.directories.remove(&number) else { return };
        state.cost -= directory.cost();
        drop(guard);
        for child in directory.names.into_values().filter(|child| child.node.strong_count() > 0) {
            child.lose_name();
            self.notify(Notice::Inode { node: child.number, pages: false });
        }
    }
}
