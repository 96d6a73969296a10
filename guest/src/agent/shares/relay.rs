//! Carries the messages of shared directories between the kernel (/dev/fuse) and the host's file server (a virtio-serial port). One thread
//! carries requests out, another answers in, a third notifications (`invalidation`). None looks further into a message than its header.
//!
//! A machine can be copied only while no request is under way, because its answer would reach the original alone. `drain` brings that about:
//! the first thread keeps the next request to itself, and all those before it are answered.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use machinen_protocol::share::{
    ANSWER_HEADER, LOCKS, LOCKS_UNIQUE, MAX_MESSAGE, REQUEST_HEADER, SETTLE, SETTLE_UNIQUE, SYNC_MORE, SYNCED,
};
use rustix::io::Errno;
use tokio::sync::Notify;

use super::invalidation;
use super::messages::{Received, word};
use crate::config::Share;
use crate::system::{console, shares};

/// The `unique` of the first request to settle.
const SETTLE_FIRST: u64 = SETTLE_UNIQUE + 2;
/// Opcodes of requests that get no answer: `FORGET`, `INTERRUPT`, `BATCH_FORGET`.
const UNANSWERED: [u32; 3] = [2, 36, 42];

/// A lock on a shared file, which a copy of this machine would not have.
#[derive(Debug, PartialEq, Eq)]
pub struct Lock {
    pub pid: u32,
    /// The share's tag and the path in it, as the host knows it.
    pub path: String,
}

/// The relay of one machine.
pub struct Relay {
    /// /dev/fuse.
    kernel: OwnedFd,
    /// The virtio-serial port.
    host: File,
    state: Mutex<State>,
    /// The first thread may go on.
    resumed: Condvar,
    /// A request was answered, or the host's end is gone.
    answered: Notify,
    /// Held while a message is written to the port.
    writing: Mutex<()>,
    /// The kernel's number of the connection, `None` in a test.
    connection: Option<u32>,
    /// What it carries requests for.
    pub shares: Vec<Share>,
}

#[derive(Default)]
struct State {
    /// The requests without an answer.
    pending: usize,
    held: bool,
    locks: Option<Vec<Lock>>,
    /// How many `SYNC`s have come, how many of them have been answered, and how many had come at the last freeze.
    syncs: u64,
    synced: u64,
    syncs_at_freeze: u64,
    /// How many `SETTLE`s have been sent, and the number of the last that was answered.
    asked: u64,
    settled: u64,
    /// The host's end is gone, or nothing is mounted any more.
    over: bool,
}

impl Relay {
    /// Starts the threads. `kernel` must be mounted already.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub fn start(kernel: OwnedFd, host: File, connection: Option<u32>, shares: Vec<Share>) -> io::Result<Arc<Self>> {
        let relay = Arc::new(Self {
            kernel,
            host,
            state: Mutex::default(),
            resumed: Condvar::new(),
            answered: Notify::new(),
            writing: Mutex::default(),
            connection,
            shares,
        });
        let (notifications, waiting) = invalidation::queue();
        relay.spawn("share-requests", Self::carry_requests)?;
        relay.spawn("share-answers", move |relay| relay.carry_answers(&notifications))?;
        relay.spawn("share-caches", move |relay| {
            invalidation::deliver(waiting, &relay.kernel, |n| relay.tell_synced(n))
        })?;
        Ok(relay)
    }

    fn spawn(
        self: &Arc<Self>,
        name: &'static str,
        work: impl FnOnce(&Self) -> io::Result<()> + Send + 'static,
    ) -> io::Result<()> {
        let relay = Arc::clone(self);
        let body = move || {
            if let Err(error) = work(&relay) {
                console::say(&format!("{name}: {error}"));
            }
            relay.end();
        };
        thread::Builder::new().name(name.into()).spawn(body).map(drop)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the connection: whoever waits for an answer, or asks from now on, gets ENOTCONN.
    fn end(&self) {
        if std::mem::replace(&mut self.state().over, true) {
            return;
        }
        self.answered.notify_waiters();
        self.resumed.notify_all();
        if let Some(Err(failed)) = self.connection.map(shares::abort) {
            console::say(&format!("shared directories: {failed}"));
        }
    }

    /// Keeps all further requests in the guest, and waits for the answers to those before. Returns the locks that are held then. `resume`
    /// must follow, also when this future is dropped.
    pub async fn drain(self: &Arc<Self>) -> Vec<Lock> {
        {
            let mut state = self.state();
            (state.held, state.locks, state.syncs_at_freeze) = (true, None, state.syncs);
        }
        self.until(|state| state.pending == 0).await;
        if self.ask(LOCKS, LOCKS_UNIQUE).await.is_ok() {
            self.until(|state| state.locks.is_some()).await;
        }
        self.state().locks.take().unwrap_or_default()
    }

    async fn until(&self, done: impl Fn(&State) -> bool) {
        loop {
            let answered = self.answered.notified();
            {
                let state = self.state();
                if state.over || done(&state) {
                    return;
                }
            }
            answered.await;
        }
    }

    /// Sends a request of the agent's own, from another thread: while no host is connected the port takes nothing.
    async fn ask(self: &Arc<Self>, opcode: u32, unique: u64) -> io::Result<()> {
        if self.state().over {
            return Err(io::ErrorKind::NotConnected.into());
        }
        let relay = Arc::clone(self);
        tokio::task::spawn_blocking(move || relay.send(opcode, unique, 0)).await.map_err(io::Error::other)?
    }

    /// Sends a request of the agent's own.
    fn send(&self, opcode: u32, unique: u64, node: u64) -> io::Result<()> {
        let mut request = [0; REQUEST_HEADER];
        request[..4].copy_from_slice(&u32::try_from(REQUEST_HEADER).unwrap_or_default().to_ne_bytes());
        request[4..8].copy_from_slice(&opcode.to_ne_bytes());
        request[8..16].copy_from_slice(&unique.to_ne_bytes());
        request[16..24].copy_from_slice(&node.to_ne_bytes());
        self.write(&request)
    }

    fn write(&self, message: &[u8]) -> io::Result<()> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        (&self.host).write_all(message)
    }

    /// Everything before a `SYNC` has been given to the kernel.
    fn tell_synced(&self, number: u64) -> io::Result<()> {
        self.send(SYNCED, 0, number)?;
        self.state().synced += u64::from(is_last(number));
        self.answered.notify_waiters();
        Ok(())
    }

    /// In a copy: waits until its file server has said what changed on the host since the freeze, and the kernel knows it.
    pub async fn caught_up(&self) {
        self.until(|state| state.synced > state.syncs_at_freeze).await;
    }

    /// Waits until the kernel knows what had changed on the host before.
    pub async fn settle(self: &Arc<Self>) -> io::Result<()> {
        let number = {
            let mut state = self.state();
            state.asked += 1;
            state.asked
        };
        self.ask(SETTLE, SETTLE_UNIQUE + 2 * number).await?;
        self.until(|state| state.settled >= number).await;
        Ok(())
    }

    /// Lets the requests go on.
    pub fn resume(&self) {
        self.state().held = false;
        self.resumed.notify_all();
    }

    /// The first thread.
    fn carry_requests(&self) -> io::Result<()> {
        let mut buffer = vec![0; MAX_MESSAGE];
        loop {
            let length = match rustix::io::read(&self.kernel, &mut buffer[..]) {
                Ok(length) => length,
                // The request was taken back meanwhile.
                Err(Errno::INTR | Errno::NOENT | Errno::AGAIN) => continue,
                // Nothing is mounted any more.
                Err(Errno::NODEV) => return Ok(()),
                Err(errno) => return Err(errno.into()),
            };
            let request = &buffer[..length];
            {
                let held = |state: &mut State| state.held && !state.over;
                let mut state = self.resumed.wait_while(self.state(), held).unwrap_or_else(PoisonError::into_inner);
                if state.over {
                    return Ok(());
                }
                state.pending += usize::from(!UNANSWERED.contains(&word(request, 4)));
            }
            self.write(request)?;
        }
    }

    /// The second thread.
    fn carry_answers(&self, notifications: &SyncSender<Vec<u8>>) -> io::Result<()> {
        let mut received = Received::default();
        loop {
            while let Some(message) = received.next()? {
                self.take(message, notifications)?;
            }
            // 0 while no host is connected; it was when the first request went out.
            if received.read(&self.host)? == 0 {
                return Err(io::Error::other("the host's file server has ended"));
            }
        }
    }

    fn take(&self, message: &[u8], notifications: &SyncSender<Vec<u8>>) -> io::Result<()> {
        match u64::from_ne_bytes(message[8..16].try_into().unwrap_or_default()) {
            0 => {
                self.state().syncs += u64::from(invalidation::sync_number(message).is_some_and(is_last));
                // Never waits: the server waits for an answer before it sends more than there is room for.
                notifications.try_send(message.to_vec()).map_err(io::Error::other)?;
            }
            settled @ SETTLE_FIRST.. => {
                let mut state = self.state();
                state.settled = state.settled.max((settled - SETTLE_UNIQUE) / 2);
            }
            LOCKS_UNIQUE => self.state().locks = Some(locks(&message[ANSWER_HEADER..])),
            _ => {
                match rustix::io::write(&self.kernel, message) {
                    // The one that waited for it is gone.
                    Ok(_) | Err(Errno::NOENT) => {}
                    Err(errno) => return Err(errno.into()),
                }
                let mut state = self.state();
                state.pending = state.pending.saturating_sub(1);
            }
        }
        self.answered.notify_waiters();
        Ok(())
    }
}

/// The locks in the body of an answer to `LOCKS`.
fn locks(mut body: &[u8]) -> Vec<Lock> {
    let mut locks = Vec::new();
    while let Some((head, rest)) = body.split_at_checked(8) {
        let length = word(head, 4) as usize;
        let Some((path, rest)) = rest.split_at_checked(length) else { break };
        locks.push(Lock { pid: word(head, 0), path: String::from_utf8_lossy(path).into_owned() });
        body = rest;
    }
    locks
}

/// Whether the server has said everything with that `SYNC` that a copy has to know.
fn is_last(number: u64) -> bool {
    number & SYNC_MORE == 0
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::{UnixDatagram, UnixStream};
    use std::time::Duration;

    use machinen_protocol::share::SYNC;

    use super::*;

    #[test]
    fn locks_are_listed() {
        let body =
            [&7u32.to_ne_bytes()[..], &3u32.to_ne_bytes(), b"a/b", &8u32.to_ne_bytes(), &9u32.to_ne_bytes(), b"cut"]
                .concat();
        assert_eq!(locks(&body), [Lock { pid: 7, path: "a/b".into() }]);
    }

    /// A relay between two pairs of sockets: the kernel's and the host's ends.
    fn relay() -> (Arc<Relay>, UnixDatagram, UnixStream) {
        let (kernel, ours) = UnixDatagram::pair().unwrap();
        let (host, server) = UnixStream::pair().unwrap();
        (Relay::start(kernel.into(), File::from(OwnedFd::from(host)), None, Vec::new()).unwrap(), ours, server)
    }

    fn request(opcode: u32, unique: u64) -> Vec<u8> {
        let mut bytes = vec![0; REQUEST_HEADER];
        bytes[..4].copy_from_slice(&u32::try_from(REQUEST_HEADER).unwrap().to_ne_bytes());
        bytes[4..8].copy_from_slice(&opcode.to_ne_bytes());
        bytes[8..16].copy_from_slice(&unique.to_ne_bytes());
        bytes
    }

    fn answer(unique: u64, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(ANSWER_HEADER + body.len()).unwrap();
        [&length.to_ne_bytes()[..], &[0; 4], &unique.to_ne_bytes(), body].concat()
    }

    fn received(server: &mut UnixStream) -> Vec<u8> {
        let mut bytes = vec![0; REQUEST_HEADER];
        server.read_exact(&mut bytes).unwrap();
        bytes
    }

    #[tokio::test]
    async fn drains_before_a_copy_and_keeps_what_comes_then() {
        let (relay, kernel, mut server) = relay();
        for asked in [request(3, 2), request(2, 4)] {
            kernel.send(&asked).unwrap();
            assert_eq!(received(&mut server), asked);
        }
        let drained = tokio::spawn({
            let relay = Arc::clone(&relay);
            async move { relay.drain().await }
        });
        tokio::task::yield_now().await;
        assert!(!drained.is_finished(), "a request has no answer yet");
        // Kept until `resume`.
        kernel.send(&request(3, 6)).unwrap();
        server.write_all(&answer(2, b"x")).unwrap();
        let mut seen = [0; 64];
        assert_eq!(kernel.recv(&mut seen).unwrap(), 17);
        let server = tokio::task::spawn_blocking(move || {
            assert_eq!(word(&received(&mut server), 4), LOCKS);
            server.write_all(&answer(LOCKS_UNIQUE, &[1, 0, 0, 0, 1, 0, 0, 0, b'f'])).unwrap();
            server
        });
        assert_eq!(drained.await.unwrap(), [Lock { pid: 1, path: "f".into() }]);
        let mut server = server.await.unwrap();
        relay.resume();
        assert_eq!(received(&mut server), request(3, 6));
    }

    #[tokio::test]
    async fn notifications_are_delivered_and_each_sync_is_answered() {
        let (relay, kernel, mut server) = relay();
        let mut sync = answer(0, &7u64.to_ne_bytes());
        sync[4..8].copy_from_slice(&SYNC.to_ne_bytes());
        let mut notification = answer(0, &[0; 24]);
        notification[4..8].copy_from_slice(&2i32.to_ne_bytes());
        // Those of the original's server do not count in the copy.
        server.write_all(&sync).unwrap();
        assert_eq!(word(&received(&mut server), 16), 7);
        relay.caught_up().await;
        let drained = tokio::spawn({
            let relay = Arc::clone(&relay);
            async move { relay.drain().await }
        });
        let mut server = tokio::task::spawn_blocking(move || {
            received(&mut server);
            server.write_all(&answer(LOCKS_UNIQUE, &[])).unwrap();
            server
        })
        .await
        .unwrap();
        drained.await.unwrap();
        assert!(tokio::time::timeout(Duration::ZERO, relay.caught_up()).await.is_err());
        let mut sync_with_more = sync.clone();
        sync_with_more[16..].copy_from_slice(&(7 | SYNC_MORE).to_ne_bytes());
        server.write_all(&sync_with_more).unwrap();
        let mut server = tokio::task::spawn_blocking(move || {
            assert_eq!(received(&mut server)[16..24], (7 | SYNC_MORE).to_ne_bytes());
            server
        })
        .await
        .unwrap();
        assert!(tokio::time::timeout(Duration::ZERO, relay.caught_up()).await.is_err());
        server.write_all(&[notification.clone(), sync].concat()).unwrap();
        let mut seen = [0; 64];
        let length = kernel.recv(&mut seen).unwrap();
        assert_eq!(seen[..length], notification);
        relay.caught_up().await;
        received(&mut server);
    }

    #[tokio::test]
    async fn an_operation_waits_for_the_hosts_news() {
        let (relay, _kernel, mut server) = relay();
        for number in 1..3 {
            let settled = tokio::spawn({
                let relay = Arc::clone(&relay);
                async move { relay.settle().await }
            });
            let asked;
            (server, asked) = tokio::task::spawn_blocking(move || {
                let asked = received(&mut server);
                (server, asked)
            })
            .await
            .unwrap();
            assert_eq!((word(&asked, 4), asked[8]), (SETTLE, 2 * number));
            assert!(!settled.is_finished());
            server.write_all(&answer(SETTLE_UNIQUE + 2 * u64::from(number), &[])).unwrap();
            settled.await.unwrap().unwrap();
        }
        drop(server);
        // The port says so to the second thread.
        relay.until(|state| state.over).await;
        assert!(relay.settle().await.is_err());
    }

    #[tokio::test]
    async fn drains_when_the_host_has_gone() {
        let (relay, kernel, mut server) = relay();
        kernel.send(&request(3, 2)).unwrap();
        received(&mut server);
        drop(server);
        assert_eq!(relay.drain().await, []);
    }
}
