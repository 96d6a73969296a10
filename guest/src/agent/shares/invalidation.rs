//! Notifications of the host's file server: a file or a name in a shared directory has changed on the host, so the kernel must forget what it
//! has cached of it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use machinen_protocol::share::{ANSWER_HEADER, NOTIFICATIONS, SYNC};
use rustix::io::Errno;

/// As many as two servers may send without waiting: in a copy, the original's and its own.
const WAITING: usize = 2 * (NOTIFICATIONS + 1);

/// The notifications that wait for the kernel. Another thread delivers them than the one for answers, because the kernel waits: for the lock of
/// a directory, or for a page of a file, and the task that holds it may be waiting for an answer.
pub fn queue() -> (SyncSender<Vec<u8>>, Receiver<Vec<u8>>) {
    sync_channel(WAITING)
}

/// Gives the notifications to the kernel until none can come any more. `synced` is called with the number of each `SYNC`.
///
/// # Errors
/// Those of the kernel's end.
pub fn deliver(
    waiting: Receiver<Vec<u8>>,
    kernel: &OwnedFd,
    mut synced: impl FnMut(u64) -> io::Result<()>,
) -> io::Result<()> {
    for message in waiting {
        match sync_number(&message) {
            Some(number) => synced(number)?,
            None => notify(kernel, &message)?,
        }
    }
    Ok(())
}

fn notify(kernel: &OwnedFd, message: &[u8]) -> io::Result<()> {
    loop {
        return match rustix::io::write(kernel, message) {
            Err(Errno::INTR) => continue,
            Err(Errno::NODEV | Errno::PERM) => Err(io::ErrorKind::NotConnected.into()),
            // Usually the kernel does not know the file or the name. In no case would another try help.
            _ => Ok(()),
        };
    }
}

/// The number of a `SYNC`; `None`: it is a notification.
pub fn sync_number(message: &[u8]) -> Option<u64> {
    let (header, body) = message.split_at_checked(ANSWER_HEADER)?;
    let error = i32::from_ne_bytes(header[4..8].try_into().ok()?);
    let number = u64::from_ne_bytes(body.get(..8)?.try_into().ok()?);
    (error == SYNC).then_some(number)
}
