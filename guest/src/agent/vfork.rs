//! A child that runs in the agent's memory until it executes a program, as after vfork(2). A fork copies page tables, and both sides then
//! copy the pages they touch; in a guest that has just been restored under emulation all of that is code to be translated first.

use std::ffi::c_void;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{FromRawFd, OwnedFd};

use rustix::process::Pid;

/// Enough for a few system calls.
const STACK: usize = 16 * 1024;

#[repr(align(16))]
struct Stack(MaybeUninit<[u8; STACK]>);

/// A child that has executed a program.
pub struct Spawned {
    pub pid: Pid,
    pub pidfd: OwnedFd,
}

struct Task<'a> {
    become_program: &'a dyn Fn() -> io::Error,
    failed: Option<io::Error>,
}

/// Starts a child, and returns when it has executed a program, with the default signal handling, or has failed to.
///
/// # Safety
/// `become_program` runs in the child while this thread stands still, in the same memory: it must execute, or return why it could not,
/// and do nothing to memory that would be wrong in the agent: allocate, lock, panic.
pub unsafe fn spawn(become_program: &dyn Fn() -> io::Error) -> io::Result<Spawned> {
    let mut task = Task { become_program, failed: None };
    let mut stack = Stack(MaybeUninit::uninit());
    let mut pidfd: libc::c_int = -1;
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD | libc::SIGCHLD;
    // SAFETY: the stack is the child's alone and, like all the child is given, outlives it as far as it runs in this memory: the
    // kernel holds this thread until then.
    let pid = unsafe {
        let top = stack.0.as_mut_ptr().add(1).cast();
        libc::clone(run, top, flags, (&raw mut task).cast(), &raw mut pidfd)
    };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made it, nobody else knows it.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    if let Some(error) = task.failed {
        // It has ended; nobody else waits for it.
        // SAFETY: plain numbers, no status wanted.
        unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
        return Err(error);
    }
    let pid = Pid::from_raw(pid).ok_or(io::ErrorKind::NotFound)?;
    Ok(Spawned { pid, pidfd })
}

extern "C" fn run(task: *mut c_void) -> libc::c_int {
    // SAFETY: it is the parent's `task`, which nobody else uses while the parent stands still.
    let task = unsafe { &mut *task.cast::<Task<'_>>() };
    task.failed = Some(match default_signals() {
        Ok(()) => (task.become_program)(),
        Err(error) => error,
    });
    127
}

/// A program begins with what its parent ignores and blocks; ours ignores SIGPIPE, as every Rust program.
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
        // SAFETY: a child of ours that nobody has waited for.
        assert_eq!(unsafe { libc::waitpid(child.pid.as_raw_pid(), &raw mut status, 0) }, child.pid.as_raw_pid());
        libc::WEXITSTATUS(status)
    }

    #[test]
    fn a_child_executes() {
        // SAFETY: makes one system call.
        let child = unsafe { spawn(&|| exec(c"/bin/false")) }.unwrap();
        assert_eq!(exit_code(&child), 1);
    }

    #[test]
    fn a_child_that_cannot_is_buried() {
        // SAFETY: makes one system call.
        let failed = unsafe { spawn(&|| exec(c"/no/such/program")) }.map(|child| child.pid);
        assert_eq!(failed.unwrap_err().raw_os_error(), Some(libc::ENOENT));
        let children = fs::read_to_string("/proc/thread-self/children").unwrap();
        assert_eq!(children, "");
    }
}
