//! The thread that takes the host's events and sends the guest notices.

use std::collections::HashSet;
use std::io;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{AtFlags, Dir, Mode, OFlags, StatxFlags, makedev, openat, statx};
use rustix::io::Errno;

use crate::coverage::Coverage;
use crate::node::Node;
use crate::notice::Notice;
use crate::trust::stamp;
use crate::watch::Event;

/// How many notices are sent before the guest has taken those before (`Notice::Sync`).
const AT_ONCE: usize = 64;
/// How many events are taken before their notices are sent.
const EVENTS: usize = 4096;

/// Notices, each once. Those of names go first: the guest's kernel takes such a one only when no lookup in that directory is under way, so that
/// what a notice of a file is about is known to it.
#[derive(Default)]
struct Notices {
    known: HashSet<Notice>,
    names: Vec<Notice>,
    files: Vec<Notice>,
}

impl Notices {
    fn add(&mut self, notice: Notice) {
        if self.known.insert(notice.clone()) {
            let is_file = matches!(notice, Notice::Inode { .. });
            if is_file { self.files.push(notice) } else { self.names.push(notice) }
        }
    }

    fn changed(&mut self, node: u64) {
        self.add(Notice::Inode { node, pages: true });
    }
}

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
            state.began = true;
            self.changed.notify_all();
        }
    }

    /// The guest takes notices. One that does not must not believe anything for long.
    pub fn has_begun(&self) -> bool {
        self.state().began
    }

    fn is_over(&self) -> bool {
        self.state().over
    }

    fn end(&self) {
        self.state().over = true;
        self.changed.notify_all();
    }

    /// The next number to send. The first is any, so that no two servers have the same ones.
    fn next(&self) -> u64 {
        let mut state = self.state();
        let first = || rustix::time::clock_gettime(rustix::time::ClockId::Monotonic).tv_nsec.unsigned_abs() << 24;
        state.sent = if state.sent == 0 { first() + 1 } else { state.sent + 1 };
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
    let send_all = |notices: Notices| -> io::Result<()> {
        let notices: Vec<_> = notices.names.into_iter().chain(notices.files).collect();
        for some in notices.chunks(AT_ONCE) {
            some.iter().try_for_each(|notice| send(&notice.message()))?;
            if paced {
                send(&Notice::Sync(pace.next()).message())?;
                pace.wait();
            }
        }
        Ok(())
    };
    let mut buffer = vec![0; 64 * 1024];
    if paced {
        send(&Notice::Sync(pace.next()).message())?;
        pace.wait();
    } else {
        pace.state().began = true;
    }
    while !pace.is_over() {
        let mut woken = vec![PollFd::new(&coverage.wake, PollFlags::IN)];
        woken.extend(coverage.watch.as_ref().map(|watch| PollFd::new(watch, PollFlags::IN)));
        match poll(&mut woken, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        // Before what was put there is taken, so that nothing put there later is overlooked.
        let _ = rustix::io::read(&coverage.wake, &mut [0_u8; 8]);
        let mut notices = Notices::default();
        coverage.take_pending().into_iter().for_each(|notice| notices.add(notice));
        let mut overflow = false;
        if let Some(watch) = &coverage.watch {
            let mut take = |event: &Event<'_>| {
                overflow |= event.is_overflow();
                coverage.take(event, &mut notices);
            };
            let mut taken = 0;
            while taken < EVENTS && watch.read(&mut buffer, |event| take(event))? {
                taken += 512;
            }
        }
        send_all(notices)?;
        if overflow {
            coverage.recheck(&send_all)?;
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
    fn take(&self, event: &Event<'_>, notices: &mut Notices) {
        let mut state = self.state();
        if let Some((key, name)) = event.name {
            let parents = state.numbers(key);
            // What the guest did is news only to another share of the same directory.
            let is_known = event.own && parents.len() == 1;
            for parent in parents.into_iter().filter(|_| !is_known) {
                let Some(directory) = state.directories.get_mut(&parent) else { continue };
                directory.changes += 1;
                let name: Box<[u8]> = name.into();
                if event.changes_name() {
                    let child = state.remove(parent, &name);
                    if event.own {
                        notices.add(Notice::Doubtful { parent, name });
                    } else {
                        notices.add(Notice::Renamed { parent, name });
                    }
                    notices.changed(parent);
                    if let Some(child) = child {
                        child.lose_name();
                        notices.changed(child.number);
                    }
                    continue;
                }
                let child = directory.names.get(&name);
                let node = child.and_then(|child| child.node.upgrade());
                if event.is_close_only() && node.is_some_and(|node| is_as_told(&node)) {
                    continue;
                }
                if let Some(child) = child {
                    notices.changed(child.number);
                }
                notices.add(Notice::Doubtful { parent, name });
            }
        }
        if let Some(key) = event.object {
            let numbers = state.numbers(key);
            let is_known = event.own && numbers.len() == 1;
            numbers.into_iter().filter(|_| !is_known).for_each(|number| notices.changed(number));
        }
    }

    /// Compares all that the guest believes with what there is.
    fn recheck(&self, send: &impl Fn(Notices) -> io::Result<()>) -> io::Result<()> {
        let marked: Vec<_> = {
            let mut state = self.state();
            state.directories.values_mut().for_each(|directory| directory.changes += 1);
            state.marked.iter().map(|((_, number), node)| (*number, node.clone())).collect()
        };
        for (number, node) in marked {
            let Some(node) = node.upgrade() else { continue };
            let mut notices = Notices::default();
            if !is_as_told(&node) {
                notices.changed(number);
            }
            self.recheck_names(number, &node, &mut notices);
            send(notices)?;
        }
        Ok(())
    }

    fn recheck_names(&self, parent: u64, directory: &Node, notices: &mut Notices) {
        let names: Vec<_> = {
            let state = self.state();
            let Some(directory) = state.directories.get(&parent) else { return };
            directory.names.iter().map(|(name, child)| (name.clone(), child.number, child.node.clone())).collect()
        };
        let known: HashSet<_> = names.iter().map(|(name, ..)| name.clone()).collect();
        for (name, number, node) in names {
            let node = node.upgrade();
            let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
            let found = statx(directory, &*name, flags, StatxFlags::BASIC_STATS).ok();
            let is_it = node.as_ref().zip(found).is_some_and(|(node, found)| {
                let device = makedev(found.stx_dev_major, found.stx_dev_minor);
                (device, found.stx_ino) == (node.identity.device, node.identity.inode)
            });
            if is_it {
                if !node.is_some_and(|node| is_as_told(&node)) {
                    notices.add(Notice::Doubtful { parent, name });
                    notices.changed(number);
                }
                continue;
            }
            let mut state = self.state();
            let believed = state.directories.get(&parent).and_then(|directory| directory.names.get(&name));
            if believed.is_some_and(|child| child.number == number)
                && let Some(child) = state.remove(parent, &name)
            {
                child.lose_name();
            }
            notices.add(Notice::Renamed { parent, name });
            notices.changed(number);
        }
        // Names that the guest may believe not to exist.
        let open = openat(directory, c".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
        for entry in open.and_then(Dir::new).into_iter().flatten().flatten() {
            let name = entry.file_name().to_bytes();
            if !known.contains(name) {
                notices.add(Notice::Doubtful { parent, name: name.into() });
            }
        }
    }
}

/// Nothing has changed since the guest was told of the file.
fn is_as_told(node: &Node) -> bool {
    node.status().is_ok_and(|status| stamp(&status) == node.trust.told())
}
