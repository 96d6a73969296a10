//! Requests that wait for a lock, each on a thread of its own until it has the lock or the guest's process is interrupted.
//!
//! To interrupt a call that waits, its thread gets a signal. The signal alone would be too early if the thread had not begun to wait. So the
//! descriptor it waits with, which no other thread uses, is replaced first by one that cannot be locked: then either the call has begun, and the
//! signal ends it, or it fails.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::Pid;
use rustix::thread::gettid;

use crate::reply::last_errno;

/// The most that wait at once.
const MOST: usize = 64;
/// A thread that waits calls little.
const STACK: usize = 128 * 1024;
/// How many interruptions are remembered that came before their request was begun: other threads read them.
const MOST_EARLY: usize = 64;

#[derive(Default)]
struct State {
    waiters: HashMap<u64, Waiter>,
    early: VecDeque<u64>,
}

struct Waiter {
    file: Arc<OwnedFd>,
    /// Known once it runs.
    thread: Option<Pid>,
}

pub struct Waiting {
    state: Arc<Mutex<State>>,
    /// Cannot be locked.
    dead: OwnedFd,
}

impl Waiting {
    /// # Errors
    /// The kernel's.
    pub fn new() -> Result<Self, Errno> {
        handle_signal()?;
        let dead = rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self { state: Arc::default(), dead })
    }

    /// Has `work` wait with a descriptor of the open file that `file` is, and hands its result to `end`.
    ///
    /// # Errors
    /// NOLCK: as many wait as may. INTR: the request was interrupted before.
    pub fn start(
        &self,
        unique: u64,
        file: &OwnedFd,
        work: impl Fn(RawFd) -> Result<(), Errno> + Send + 'static,
        end: impl FnOnce(Result<(), Errno>) + Send + 'static,
    ) -> Result<(), Errno> {
        let mut locked = lock(&self.state);
        if let Some(place) = locked.early.iter().position(|early| *early == unique) {
            locked.early.remove(place);
            return Err(Errno::INTR);
        }
        if locked.waiters.len() >= MOST || locked.waiters.contains_key(&unique) {
            return Err(Errno::NOLCK);
        }
        let file = Arc::new(rustix::io::fcntl_dupfd_cloexec(file, 0)?);
        let (number, state) = (file.as_raw_fd(), Arc::clone(&self.state));
        let run = move || {
            if let Some(waiter) = lock(&state).waiters.get_mut(&unique) {
                waiter.thread = Some(gettid());
            }
            let done = work(number);
            // From here on no signal comes.
            lock(&state).waiters.remove(&unique);
            end(match done {
                // The descriptor was taken away.
                Err(Errno::BADF) => Err(Errno::INTR),
                done => done,
            });
        };
        thread::Builder::new().stack_size(STACK).spawn(run).map_err(|_| Errno::NOLCK)?;
        locked.waiters.insert(unique, Waiter { file, thread: None });
        Ok(())
    }

    /// Ends the waiting of that request.
    pub fn interrupt(&self, unique: u64) {
        let mut state = lock(&self.state);
        let Some(waiter) = state.waiters.get(&unique) else {
            if state.early.len() == MOST_EARLY {
                state.early.pop_front();
            }
            state.early.push_back(unique);
            return;
        };
        // SAFETY: the waiter's descriptor stays its own: it now means what cannot be locked.
        unsafe { libc::dup3(self.dead.as_raw_fd(), waiter.file.as_raw_fd(), libc::O_CLOEXEC) };
        if let Some(thread) = waiter.thread {
            let (process, thread) = (rustix::process::getpid().as_raw_pid(), thread.as_raw_pid());
            // SAFETY: a thread of this process, which does not end while the state is locked.
            unsafe { libc::syscall(libc::SYS_tgkill, process, thread, libc::SIGRTMIN()) };
        }
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        lock(&self.state).waiters.len()
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

extern "C" fn nothing(_signal: libc::c_int) {}

/// The signal does nothing but end a call.
fn handle_signal() -> Result<(), Errno> {
    // SAFETY: all of it is set below that is not zero.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = nothing as *const () as libc::sighandler_t;
    // SAFETY: the structure is whole, and the handler does nothing.
    let result = unsafe { libc::sigaction(libc::SIGRTMIN(), &raw const action, std::ptr::null_mut()) };
    if result == 0 { Ok(()) } else { Err(last_errno()) }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use rustix::fs::{FlockOperation, flock};

    use super::*;

    /// A file that is locked, and a second description of it that is not.
    fn locked() -> (tempfile::NamedTempFile, OwnedFd) {
        let file = tempfile::NamedTempFile::new().unwrap();
        flock(&file, FlockOperation::LockExclusive).unwrap();
        let other = file.reopen().unwrap().into();
        (file, other)
    }

    fn take(file: RawFd) -> Result<(), Errno> {
        // SAFETY: plain numbers.
        if unsafe { libc::flock(file, libc::LOCK_EX) } == 0 { Ok(()) } else { Err(last_errno()) }
    }

    #[test]
    fn an_interruption_ends_the_waiting_whenever_it_comes() {
        let waiting = Waiting::new().unwrap();
        let (_file, other) = locked();
        for unique in 0..200 {
            let (sender, ended) = mpsc::channel();
            let end = move |done| sender.send(done).unwrap();
            waiting.start(unique, &other, take, end).unwrap();
            // At once, or when it has been waiting for a little while: at any of its steps.
            (0..unique * 50).for_each(|_| std::hint::spin_loop());
            waiting.interrupt(unique);
            assert_eq!(ended.recv().unwrap(), Err(Errno::INTR));
        }
        assert_eq!(waiting.len(), 0);
    }

    #[test]
    fn one_that_comes_before_its_request_is_remembered() {
        let waiting = Waiting::new().unwrap();
        let (_file, other) = locked();
        waiting.interrupt(7);
        assert_eq!(waiting.start(7, &other, take, |_| ()), Err(Errno::INTR));
    }

    #[test]
    fn a_lock_that_is_given_up_ends_the_waiting_and_no_more_wait_than_may() {
        let waiting = Waiting::new().unwrap();
        let (file, other) = locked();
        let (sender, ended) = mpsc::channel();
        for unique in 0..MOST as u64 {
            let sender = sender.clone();
            waiting.start(unique, &other, take, move |done| sender.send(done).unwrap()).unwrap();
        }
        assert_eq!(waiting.start(99, &other, take, |_| ()), Err(Errno::NOLCK));
        drop(file);
        (0..MOST).for_each(|_| assert_eq!(ended.recv().unwrap(), Ok(())));
    }
}
