//! The end of the machine, and what goes to the host's lifecycle port: a detached main command's output, and the announcement that
//! the end is orderly.

use std::time::Duration;

use machinen_channel::{Opener, Stream};
use machinen_protocol::frame::Kind;
use machinen_protocol::ports::LIFECYCLE;
use serde::Serialize;
use tokio::io::AsyncReadExt;
use tokio::sync::watch;

use super::attend;
use super::disks::Disks;
use super::stream::{Abort, Chunk, FrameWriter};
use crate::system::cgroup;
use crate::system::console::reset;

/// How long the announcement may take to reach the host. A host that does not answer must not keep the machine alive.
const ANNOUNCED_WITHIN: Duration = Duration::from_secs(1);
/// How long `sync` may take. `Disks::freeze_root` writes the machine's own disk in any case.
const SYNCED_WITHIN: Duration = Duration::from_secs(10);

/// The current session's opener, `None` before the first.
pub type Sessions = watch::Receiver<Option<Opener>>;

/// Ends the machine.
pub struct Lifecycle {
    disks: Disks,
    sessions: Sessions,
}

impl Lifecycle {
    pub fn new(disks: Disks, sessions: Sessions) -> Self {
        Self { disks, sessions }
    }

    pub fn disks(&self) -> &Disks {
        &self.disks
    }

    /// A stream to the lifecycle port, which is opened when it is first used.
    pub fn output(&self) -> Output {
        Output { sessions: self.sessions.clone(), stream: None, asked: false }
    }

    /// Ends the machine: kills all commands, announces the end with `result`, waits a short time for `delivered`, and brings the disk in
    /// order.
    pub async fn power_off(&self, output: Output, result: &impl Serialize, delivered: impl Future<Output = ()>) -> ! {
        // Failures are not reported: the machine ends in any case, and a disk that was not written out shows it.
        let _ = cgroup::kill_workload();
        let announced = async { tokio::join!(output.end(result), delivered) };
        let _ = tokio::time::timeout(ANNOUNCED_WITHIN, announced).await;
        // On a thread, because a file system whose server does not answer must not keep the machine alive.
        let _ = tokio::time::timeout(SYNCED_WITHIN, tokio::task::spawn_blocking(rustix::fs::sync)).await;
        self.disks.freeze_root();
        reset()
    }
}

/// Sends frames to the lifecycle port. After a restore the new host gets a new stream, which begins with the frame that the old host did
/// not take. Between two hosts a frame waits. A host that refuses the stream gets no frames.
pub struct Output {
    sessions: Sessions,
    stream: Option<FrameWriter<Stream>>,
    /// Whether the current session's host has been asked for a stream.
    asked: bool,
}

impl Output {
    /// The stream of the current session; `None` if its host refuses it.
    async fn stream(&mut self) -> Option<&mut FrameWriter<Stream>> {
        let up = |session: &Option<Opener>| session.as_ref().is_some_and(Opener::is_connected);
        while self.stream.is_none() {
            let same = !self.sessions.has_changed().unwrap_or(false) && up(&self.sessions.borrow());
            if self.asked && same {
                return None;
            }
            self.asked = true;
            let opener = self.sessions.wait_for(up).await.ok()?.clone()?;
            self.stream = opener.open_urgent(LIFECYCLE).await.ok().map(FrameWriter::new);
        }
        self.stream.as_mut()
    }

    /// Sends the last frame and waits until the host has closed the stream, which confirms that the frame has arrived.
    async fn end(mut self, result: &impl Serialize) {
        let Some(stream) = self.stream().await else { return };
        if stream.send_json(Kind::End, result).await.is_err() {
            return;
        }
        stream.finish().await;
        if let Some(stream) = self.stream.take() {
            let mut stream = stream.into_inner();
            while matches!(stream.read(&mut [0; 64]).await, Ok(1..)) {}
        }
    }
}

impl attend::Output for Output {
    async fn send_chunk(&mut self, chunk: &mut Chunk, kind: Kind, length: usize) -> Result<(), Abort> {
        while let Some(stream) = self.stream().await {
            if stream.send_chunk(chunk, kind, length).await.is_ok() {
                break;
            }
            self.stream = None;
        }
        Ok(())
    }
}
