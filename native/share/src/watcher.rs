//! The thread that takes the host's events and sends the guest notices.

use std::collections::HashSet;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use machinen_protocol::share::{NOTIFICATIONS, SYNC_MORE};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{AtFlags, Dir, Mode, OFlags, StatxFlags, makedev, openat, statx};
use rustix::io::Errno;

use crate::coverage::{Coverage, State};
use crate::node::Node;
use crate::notice::Notice;
use crate::reply;
use crate::trust::stamp;
use crate::watch::Event;
/// When so many notices wait they are sent before more events are taken.
const AT_ONCE: usize = 8192;

/// Waits until the guest has taken notices.
#[derive(Default)]
pub struct Pace {
    state: Mutex<Paced>,
    changed: Condvar,
}

#[derive(Default)]
struct Paced {
    sent: u64,
    taken: u64,
    began: bool,
    over: bool,
}

impl Pace {
    fn state(&self) -> MutexGuard<'_, Paced> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest has taken all notices before the one of that number.
    pub fn taken(&self, number: u64) {
        let mut state = self.state();
        // Any other number was given by another server, which this guest's memory was copied from.
        if number == state.sent {
            state.taken = number;
            self.changed.notify_all();
        }
    }

    /// The guest takes notices. One that does not must not believe anything for long.
    pub fn has_begun(&self) -> bool {
        self.state().began
    }

    fn begin(&self) {
        self.state().began = true;
    }

    fn is_over(&self) -> bool {
        self.state().over
    }

    fn end(&self) {
        self.state().over = true;
        self.changed.notify_all();
    }

    /// The next number to send. The first is any, so that no two servers have the same ones.
    fn next(&self, more: u64) -> u64 {
        let mut state = self.state();
        let first = || rustix::time::clock_gettime(rustix::time::ClockId::Monotonic).tv_nsec.unsigned_abs() << 24;
        let before = if state.sent == 0 { first() } else { state.sent & !SYNC_MORE };
        state.sent = (before + 1) | more;
        state.sent
    }

    fn wait(&self) {
        let waits = |state: &mut Paced| state.taken != state.sent && !state.over;
        drop(self.changed.wait_while(self.state(), waits).unwrap_or_else(PoisonError::into_inner));
    }
}

/// Sends notices until `end`, or until `send` fails. `pace` must be told what the guest has taken if `paced`.
///
/// # Errors
/// Those of `send`, and of the kernel's events.
pub fn run(coverage: &Coverage, pace: &Pace, paced: bool, send: impl Fn(&[u8]) -> io::Result<()>) -> io::Result<()> {
    let synchronize = |more: u64| -> io::Result<()> {
        if paced {
            send(&Notice::Sync(pace.next(more)).message())?;
            pace.wait();
        }
        Ok(())
    };
    let send_all = |more: u64| -> io::Result<()> {
        while let Some(notices) = coverage.next_notices() {
            notices.iter().try_for_each(|notice| send(&notice.message()))?;
            synchronize(more)?;
            coverage.state().sent.clear();
        }
        Ok(())
    };
    if coverage.is_behind.swap(false, Ordering::AcqRel) {
        coverage.recheck(|| send_all(SYNC_MORE))?;
    }
    // The guest that was copied, or has just started, may go on.
    synchronize(0)?;
    pace.begin();
    let mut buffer = vec![0; 64 * 1024];
    let mut settling = Vec::new();
    while !pace.is_over() {
        let mut woken = vec![PollFd::new(&coverage.wake, PollFlags::IN)];
        woken.extend(coverage.watch.as_ref().map(|watch| PollFd::new(watch, PollFlags::IN)));
        match poll(&mut woken, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        // Before what was put there is taken, so that nothing put there later is overlooked.
        let _ = rustix::io::read(&coverage.wake, &mut [0_u8; 8]);
        // Before events are taken: what had changed when they were asked is among these.
        settling.append(&mut coverage.state().settling);
        let (mut overflow, mut is_all) = (false, true);
        if let Some(watch) = &coverage.watch {
            let mut take = |event: &Event<'_>| {
                overflow |= event.is_overflow();
                coverage.take(event);
            };
            while watch.read(&mut buffer, &mut take)? {
                if coverage.state().waiting.len() >= AT_ONCE {
                    is_all = false;
                    break;
                }
            }
        }
        send_all(0)?;
        if overflow {
            coverage.recheck(|| send_all(0))?;
        }
        if is_all {
            let mut answers = settling.drain(..).filter_map(|unique| reply::message(unique, reply::done()));
            answers.try_for_each(|answer| send(&answer))?;
        }
    }
    Ok(())
}

/// Ends `run`, in whatever it waits.
pub fn end(coverage: &Coverage, pace: &Pace) {
    pace.end();
    coverage.wake();
}

impl Coverage {
    /// The next notices to send; `None`: there are none. Those before have been taken.
    fn next_notices(&self) -> Option<Vec<Notice>> {
        let mut state = self.state();
        state.sent.clear();
        while state.sent.len() < NOTIFICATIONS
            && let Some(notice) = state.waiting.pop_first()
        {
            state.sent.push(notice);
        }
        Some(state.sent.clone()).filter(|notices| !notices.is_empty())
    }

    fn take(&self, event: &Event<'_>) {
        let mut guard = self.state();
        let state = &mut *guard;
        if let Some((key, name)) = event.name {
            let parents = state.numbers(key);
            // What the guest did is news only to another share of the same directory.
            let is_known = event.own && parents.len() == 1;
            for parent in parents.into_iter().filter(|_| !is_known) {
                state.take(event, parent, name);
            }
        }
        if let Some(key) = event.object {
            let numbers = state.numbers(key);
            let is_known = event.own && numbers.len() == 1;
            numbers.into_iter().filter(|_| !is_known).for_each(|number| state.changed(number));
        }
    }

    /// Compares all that the guest believes with what there is.
    fn recheck(&self, send: impl Fn() -> io::Result<()>) -> io::Result<()> {
        let marked: Vec<_> = {
            let mut state = self.state();
            state.directories.values_mut().for_each(|directory| directory.changes += 1);
            state.marked.iter().map(|((_, number), node)| (*number, node.clone())).collect()
        };
        for (number, node) in marked {
            // What was let go is asked for anew when the guest uses it.
            let Some(node) = node.upgrade() else { continue };
            if !is_as_told(&node) {
                self.state().changed(number);
            }
            self.recheck_names(number, &node);
            send()?;
        }
        send()
    }

    fn recheck_names(&self, parent: u64, directory: &Node) {
        let names: Vec<_> = {
            let state = self.state();
            let Some(directory) = state.directories.get(&parent) else { return };
            directory.names.iter().map(|(name, child)| (name.clone(), child.number, child.node.clone())).collect()
        };
        let known: HashSet<_> = names.iter().map(|(name, ..)| name.clone()).collect();
        for (name, number, node) in names {
            match node.upgrade() {
                Some(node) if is_named(directory, &name, &node) => {
                    if !is_as_told(&node) {
                        let mut state = self.state();
                        state.changed(number);
                        state.waiting.insert(Notice::Doubtful { parent, name });
                    }
                }
                Some(_) => self.state().is_no_more(parent, name, number),
                None => {
                    let mut state = self.state();
                    state.changed(number);
                    state.waiting.insert(Notice::Doubtful { parent, name });
                }
            }
        }
        // Names that the guest may believe not to exist.
        let open = openat(directory, c".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
        for entry in open.and_then(Dir::new).into_iter().flatten().flatten() {
            let name = entry.file_name().to_bytes();
            if !known.contains(name) && !matches!(name, b"." | b"..") {
                self.state().waiting.insert(Notice::Doubtful { parent, name: name.into() });
            }
        }
    }
}

impl State {
    /// Something has changed in a marked directory, by that name.
    fn take(&mut self, event: &Event<'_>, parent: u64, name: &[u8]) {
        let Some(directory) = self.directories.get_mut(&parent) else { return };
        directory.changes += 1;
        let child = directory.names.get(name).map(|child| child.number);
        if event.changes_name() {
            let child = self.remove(parent, name);
            let name = name.into();
            self.waiting.insert(if event.own {
                Notice::Doubtful { parent, name }
            } else {
                Notice::Renamed { parent, name }
            });
            self.changed(parent);
            if let Some(child) = child {
                child.lose_name();
                self.changed(child.number);
            }
            return;
        }
        let node = directory.names.get(name).and_then(|child| child.node.upgrade());
        if event.is_close_only() && node.is_some_and(|node| is_as_told(&node)) {
            return;
        }
        self.waiting.insert(Notice::Doubtful { parent, name: name.into() });
        if let Some(child) = child {
            self.changed(child);
        }
    }

    /// The name is not that file's any more, unless the guest has been told of another meanwhile.
    fn is_no_more(&mut self, parent: u64, name: Box<[u8]>, number: u64) {
        let believed = self.directories.get(&parent).and_then(|directory| directory.names.get(&name));
        if believed.is_some_and(|child| child.number == number)
            && let Some(child) = self.remove(parent, &name)
        {
            child.lose_name();
        }
        self.waiting.insert(Notice::Renamed { parent, name });
        self.changed(number);
    }
}

/// Whether the name in the directory is that file's.
fn is_named(directory: &Node, name: &[u8], node: &Node) -> bool {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    statx(directory, name, flags, StatxFlags::BASIC_STATS).is_ok_and(|found| {
        let device = makedev(found.stx_dev_major, found.stx_dev_minor);
        (device, found.stx_ino) == (node.identity.device, node.identity.inode)
    })
}

/// Nothing has changed since the guest was told of the file.
fn is_as_told(node: &Node) -> bool {
    node.status().is_ok_and(|status| stamp(&status) == node.trust.told())
}
