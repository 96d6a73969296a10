//! Starts a child that runs in the agent's memory until it executes a program, as after vfork(2). A fork would copy page tables, and both
//! sides would then copy the pages they touch; in a guest that has just been restored under TCG all of that code would have to be
//! translated first.

use std::ffi::c_void;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicI32, Ordering};

use rustix::process::{Pid, Signal, pidfd_send_signal};

/// The size of the child's stack in bytes, enough for a few system calls.
const STACK: usize = 16 * 1024;

#[repr(align(16))]
struct Stack(MaybeUninit<[u8; STACK]>);

/// A child that has executed a program.
pub struct Spawned {
    pub pid: Pid,
    pub pidfd: OwnedFd,
}

/// A start that can be called off while it is under way, because the child may wait for a file system.
#[derive(Default)]
pub struct Start(AtomicI32);

impl Start {
    const NO_CHILD: i32 = 0;
    const CALLED_OFF: i32 = -1;

    /// Calls the start off: kills the child, unless it has executed its program already.
    pub fn call_off(&self) {
        let pidfd = self.0.swap(Self::CALLED_OFF, Ordering::AcqRel);
        if pidfd > Self::NO_CHILD {
            // SAFETY: the child has put an open descriptor there, and taking its number out takes it over.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            // A child that has ended already needs no signal.
            let _ = pidfd_send_signal(pidfd, Signal::KILL);
        }
    }

    /// Called by the child: makes it possible to kill the child. Returns false if the start has been called off.
    fn begins(&self, pidfd: RawFd) -> bool {
        self.0.compare_exchange(Self::NO_CHILD, pidfd, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Called by the starter when the child has executed or failed. Returns false if the start has been called off since the child began.
    fn ends(&self, pidfd: RawFd) -> bool {
        self.0.compare_exchange(pidfd, Self::NO_CHILD, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }
}

struct Task<'a> {
    become_program: &'a dyn Fn() -> io::Error,
    start: &'a Start,
    pidfd: RawFd,
    /// Whether `start` has the descriptor.
    began: bool,
    failed: Option<io::Error>,
}

/// Starts a child with the default signal handling. Returns when the child has executed a program or has failed to.
///
/// # Safety
/// `become_program` runs in the child, in the agent's memory, while this thread stands still. It must execute a program or return why it
/// could not, and must do nothing to memory that would be wrong in the agent: no allocation, no lock, no panic.
pub unsafe fn spawn(start: &Start, become_program: &dyn Fn() -> io::Error) -> io::Result<Spawned> {
    let mut task = Task { become_program, start, pidfd: -1, began: false, failed: None };
    let mut stack = Stack(MaybeUninit::uninit());
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD | libc::SIGCHLD;
    // SAFETY: the stack is the child's alone and, like all the child is given, outlives it as far as it runs in this memory: the
    // kernel holds this thread until then.
    let pid = unsafe {
        let top = stack.0.as_mut_ptr().add(1).cast();
        let task = &raw mut task;
        libc::clone(run, top, flags, task.cast(), &raw mut (*task).pidfd)
    };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    let is_wanted = task.began && start.ends(task.pidfd);
    // Otherwise the descriptor belongs to the thread that has called the start off.
    // SAFETY: the kernel has just made it, and nothing else owns it (any more).
    let pidfd = (is_wanted || !task.began).then(|| unsafe { OwnedFd::from_raw_fd(task.pidfd) });
    let (true, Some(pidfd), None) = (is_wanted, pidfd, &task.failed) else {
        // The child has ended or is being killed, and is reaped here only.
        // SAFETY: plain numbers, no status wanted.
        unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
        return Err(task.failed.unwrap_or_else(|| io::Error::from_raw_os_error(libc::ECANCELED)));
    };
    let pid = Pid::from_raw(pid).ok_or(io::ErrorKind::NotFound)?;
    Ok(Spawned { pid, pidfd })
}

extern "C" fn run(task: *mut c_void) -> libc::c_int {
    // SAFETY: it is the parent's `task`, which nothing else uses while the parent stands still.
    let task = unsafe { &mut *task.cast::<Task<'_>>() };
    task.began = task.start.begins(task.pidfd);
    task.failed = Some(match default_signals() {
        _ if !task.began => io::Error::from_raw_os_error(libc::ECANCELED),
        Ok(()) => (task.become_program)(),
        Err(error) => error,
    });
    127
}

/// Resets the signals: a program inherits which signals its parent ignores and blocks, and the agent ignores SIGPIPE, like every Rust
/// program.
fn default_signals() -> io::Result<()> {
    // SAFETY: both structures are plain data, for which zeros are the default action and the empty set.
    unsafe {
        let action: libc::sigaction = std::mem::zeroed();
        let mask: libc::sigset_t = std::mem::zeroed();
        if libc::sigaction(libc::SIGPIPE, &raw const action, std::ptr::null_mut()) < 0
            || libc::sigprocmask(libc::SIG_SETMASK, &raw const mask, std::ptr::null_mut()) < 0
        {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn exec(program: &std::ffi::CStr) -> io::Error {
        // SAFETY: a string and two arrays that end with a null pointer.
        unsafe {
            libc::execve(program.as_ptr(), [program.as_ptr(), std::ptr::null()].as_ptr(), [std::ptr::null()].as_ptr())
        };
        io::Error::last_os_error()
    }

    fn exit_code(child: &Spawned) -> i32 {
        let mut status = 0;
        // SAFETY: a child of ours that has not been waited for.
        assert_eq!(unsafe { libc::waitpid(child.pid.as_raw_pid(), &raw mut status, 0) }, child.pid.as_raw_pid());
        libc::WEXITSTATUS(status)
    }

    #[test]
    fn a_child_executes() {
        // SAFETY: makes one system call.
        let child = unsafe { spawn(&Start::default(), &|| exec(c"/bin/false")) }.unwrap();
        assert_eq!(exit_code(&child), 1);
    }

    #[test]
    fn a_child_that_cannot_is_buried() {
        // SAFETY: makes one system call.
        let failed = unsafe { spawn(&Start::default(), &|| exec(c"/no/such/program")) }.map(|child| child.pid);
        assert_eq!(failed.unwrap_err().raw_os_error(), Some(libc::ENOENT));
        let children = fs::read_to_string("/proc/thread-self/children").unwrap();
        assert_eq!(children, "");
    }

    #[test]
    fn a_child_that_is_called_off_ends_whatever_it_waits_for() {
        let (reads, writes) = rustix::pipe::pipe().unwrap();
        let (start, waits) = (&Start::default(), &reads);
        std::thread::scope(|scope| {
            let starting = scope.spawn(move || {
                let wait = || {
                    let _ = rustix::io::write(&writes, b"waits");
                    // SAFETY: waits for a signal.
                    unsafe { libc::pause() };
                    io::Error::last_os_error()
                };
                // SAFETY: makes two system calls.
                unsafe { spawn(start, &wait) }.map(|child| child.pid)
            });
            rustix::io::read(waits, &mut [0; 5]).unwrap();
            start.call_off();
            assert_eq!(starting.join().unwrap().unwrap_err().raw_os_error(), Some(libc::ECANCELED));
        });
        // SAFETY: makes no system call.
        let late = unsafe { spawn(start, &|| io::ErrorKind::Other.into()) }.map(|child| child.pid);
        assert_eq!(late.unwrap_err().raw_os_error(), Some(libc::ECANCELED));
    }
}
