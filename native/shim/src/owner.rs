//! The owner, which has started the shim: a pipe that ends with it, and a reader of events that may be gone.

use std::io::{Read, Write};
use std::time::Duration;
use tokio::sync::oneshot;

/// How long an owner that does not read may delay the shim's end.
const LAST_EVENT: Duration = Duration::from_secs(5);

/// Resolves when the owner's pipe ends. A thread reads it, because stdin may be anything, also something that cannot be polled.
pub fn lost() -> oneshot::Receiver<()> {
    let (gone, lost) = oneshot::channel();
    std::thread::spawn(move || {
        let mut stdin = std::io::stdin().lock();
        while matches!(stdin.read(&mut [0; 256]), Ok(1..)) {}
        // The receiver has been dropped if the VM has ended meanwhile.
        let _ = gone.send(());
    });
    lost
}

/// Sends an event to the owner. An owner that is gone is no error.
pub fn tell(line: &str) {
    let mut stdout = std::io::stdout().lock();
    let _ = stdout.write_all(line.as_bytes()).and_then(|()| stdout.flush());
}

/// Sends the owner a line that may not fit into a pipe, and waits for the owner to read it, at most for `LAST_EVENT`.
pub async fn tell_last(line: String) {
    let (done, told) = oneshot::channel();
    std::thread::spawn(move || {
        tell(&line);
        let _ = done.send(());
    });
    let _ = tokio::time::timeout(LAST_EVENT, told).await;
}
