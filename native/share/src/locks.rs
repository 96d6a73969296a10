//! Locks, asked for by a guest.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::abi::{self, LockIn, flag, opcode};
use crate::lock::{self, Held};
use crate::reply::{self, Answer, done, reply};
use crate::request::{MAX_DATA, Request};
use crate::server::Server;

impl Server {
    /// A description for an owner's locks: writable where that can be, because a lock for writing needs it.
    fn lockable(&self, node: u64) -> Result<OwnedFd, Errno> {
        let node = self.node(node)?;
        if self.share(&node).read_only {
            return self.reopen(&node, OFlags::RDONLY);
        }
        self.reopen(&node, OFlags::RDWR).or_else(|_| self.reopen(&node, OFlags::RDONLY))
    }

    pub(crate) fn test_lock(&self, mut request: Request<'_>) -> Answer {
        let asked: LockIn = request.take()?;
        let node = request.header.node;
        self.locks.admit(node, &asked, || self.lockable(node))?;
        reply(self.locks.test(node, &asked)?)
    }

    pub(crate) fn set_lock(&self, mut request: Request<'_>) -> Answer {
        let asked: LockIn = request.take()?;
        let by_flock = asked.flags & flag::LOCK_FLOCK != 0;
        let set = if by_flock { self.set_flock(&request, &asked) } else { self.set_posix(&request, &asked) };
        match set {
            Ok(()) => done(),
            Err(Errno::AGAIN) if request.header.opcode == opcode::SETLKW => {
                if by_flock { self.wait_flock(&request, asked) } else { self.wait_posix(&request, asked) }?;
                Ok(None)
            }
            Err(errno) => Err(errno),
        }
    }

    fn set_flock(&self, request: &Request<'_>, asked: &LockIn) -> Result<(), Errno> {
        let handle = self.handle(request, asked.handle)?;
        lock::flock(&handle.file, asked)?;
        handle.locked(asked);
        Ok(())
    }

    fn set_posix(&self, request: &Request<'_>, asked: &LockIn) -> Result<(), Errno> {
        let node = request.header.node;
        if lock::is_unlock(asked) {
            // An owner that was never admitted has no lock.
            return self.locks.set(node, asked).or_else(|errno| if errno == Errno::BADF { Ok(()) } else { Err(errno) });
        }
        self.locks.admit(node, asked, || self.lockable(node))?;
        self.locks.set(node, asked)
    }

    fn wait_flock(&self, request: &Request<'_>, asked: LockIn) -> Result<(), Errno> {
        let handle = self.handle(request, asked.handle)?;
        let work = {
            let handle = Arc::clone(&handle);
            move |file| lock::wait_flock(file, &asked).inspect(|()| handle.locked(&asked))
        };
        self.wait(request.header.unique, &handle.file, work)
    }

    fn wait_posix(&self, request: &Request<'_>, asked: LockIn) -> Result<(), Errno> {
        let node = request.header.node;
        let description = self.locks.description(node, asked.owner)?;
        let locks = Arc::clone(&self.locks);
        let work = move |file| {
            loop {
                lock::wait(file, &asked)?;
                // Now that it can be had it is taken once more, in turn with what else the owner does with its locks.
                match locks.set(node, &asked) {
                    Err(Errno::AGAIN) => {}
                    set => return set,
                }
            }
        };
        self.wait(request.header.unique, &description, work)
    }

    fn wait(
        &self,
        unique: u64,
        file: &OwnedFd,
        work: impl Fn(i32) -> Result<(), Errno> + Send + 'static,
    ) -> Result<(), Errno> {
        let outlet = Arc::clone(&self.outlet);
        let end = move |waited: Result<(), Errno>| {
            if let Some(answer) = reply::message(unique, waited.and_then(|()| done())) {
                // When the guest is gone, those that read its requests see it too.
                let _ = outlet.send(&answer);
            }
        };
        self.waiting.start(unique, file, work, end)
    }

    /// The guest's process that made the request is interrupted. Only waiting for a lock takes long.
    pub(crate) fn interrupt(&self, mut request: Request<'_>) -> Answer {
        self.waiting.interrupt(request.take::<abi::InterruptIn>()?.unique);
        Ok(None)
    }

    /// The locks that are held, for a guest that is to be copied: its copy would not have them.
    pub(crate) fn list_locks(&self) -> Answer {
        let mut body = Vec::new();
        for Held { node, pid } in self.locks_held() {
            // One that cannot be named is held all the same.
            let path = self.place_of(node).unwrap_or_else(|_| b"?".to_vec());
            let length = u32::try_from(path.len()).map_err(|_| Errno::NAMETOOLONG)?;
            // The guest takes no longer message, and names a few of them.
            if body.len() + path.len() + 8 > MAX_DATA {
                break;
            }
            for part in [&pid.to_ne_bytes()[..], &length.to_ne_bytes(), &path] {
                body.extend_from_slice(part);
            }
        }
        Ok(Some(body))
    }

    /// The tag of a file's share, which the guest has at a place of its own, and the file's path there.
    fn place_of(&self, number: u64) -> Result<Vec<u8>, Errno> {
        let node = self.node(number)?;
        let share = self.share(&node);
        let (root, path) = (self.path_of(&share.file)?, self.path_of(&*node)?);
        Ok([share.tag.to_bytes(), path.strip_prefix(&root[..]).unwrap_or(b"/?")].concat())
    }

    /// The locks of the guest's processes, each once.
    pub fn locks_held(&self) -> Vec<Held> {
        let mut held = self.locks.held();
        held.extend(
            self.handles().all().filter_map(|handle| handle.lock_holder().map(|pid| Held { node: handle.number, pid })),
        );
        held
    }

    /// How many requests wait for a lock.
    pub fn requests_waiting(&self) -> usize {
        self.waiting.len()
    }
}
