//! Memory that is restored when it is touched: one `criu lazy-pages` for each tree runs until all of its memory is there.

use std::io;
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::Pid;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::unix::pipe;
use tokio::sync::watch;

use super::program::Criu;
use crate::agent::child::Child;
use crate::reply::{Code, ErrorReply};

const PAGE: u64 = 4096;
/// The log level at which CRIU writes a line for every page it copies.
const EVERYTHING: &str = "-v4";

/// The daemons of this machine.
#[derive(Clone, Debug, Default)]
pub struct LazyPages(Arc<Mutex<Vec<Daemon>>>);

#[derive(Debug)]
struct Daemon {
    pages: Arc<Pages>,
    ended: watch::Receiver<bool>,
}

#[derive(Debug, Default)]
struct Pages {
    total: AtomicU64,
    copied: AtomicU64,
}

impl LazyPages {
    fn daemons(&self) -> std::sync::MutexGuard<'_, Vec<Daemon>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Pages (of 4 KiB) that are still to come.
    pub fn pending(&self) -> u64 {
        let pending = |daemon: &Daemon| {
            let (total, copied) =
                (daemon.pages.total.load(Ordering::Relaxed), daemon.pages.copied.load(Ordering::Relaxed));
            if *daemon.ended.borrow() { 0 } else { total.saturating_sub(copied) }
        };
        self.daemons().iter().map(pending).sum()
    }

    /// Waits until all memory is there.
    pub async fn finished(&self) {
        let ends: Vec<_> = self.daemons().iter().map(|daemon| daemon.ended.clone()).collect();
        for mut end in ends {
            // An error means that the daemon's task is gone, which is an end too.
            let _ = end.wait_for(|ended| *ended).await;
        }
        self.daemons().clear();
    }

    /// Starts a daemon for the images in `directory`; returns when a restore can ask it.
    pub async fn serve(&self, criu: &Criu, directory: &str) -> Result<(), ErrorReply> {
        let failed = |error: io::Error| ErrorReply::io("lazy-pages", &error);
        let (said, says) = pipe_with(PipeFlags::CLOEXEC).map_err(|errno| failed(errno.into()))?;
        let (readied, ready) = pipe_with(PipeFlags::CLOEXEC).map_err(|errno| failed(errno.into()))?;
        let mut run = criu.bare("lazy-pages");
        let ready = run.inherit(ready);
        run.arg(EVERYTHING).arg("-D").arg(directory).arg("--status-fd").arg(ready.to_string());
        run.command.stderr(Stdio::from(says));
        let child = run.command.spawn().map_err(failed)?;
        // Closes the agent's copy of the pipe's end, so that the daemon's end is seen as end of file.
        drop(run);
        let child = Child::of(Pid::from_child(&child)).map_err(failed)?;

        let pages = Arc::new(Pages::default());
        let (end, ended) = watch::channel(false);
        tokio::spawn(count(pipe::Receiver::from_owned_fd(said).map_err(failed)?, Arc::clone(&pages)));
        tokio::spawn(async move {
            let _ = child.wait().await;
            end.send_replace(true);
        });
        // The daemon writes one byte when it listens; end of file means that it has ended before.
        let readied = pipe::Receiver::from_owned_fd(readied).map_err(failed)?;
        readied.readable().await.map_err(failed)?;
        if !matches!(readied.try_read(&mut [0]), Ok(1)) {
            return Err(ErrorReply::new(Code::Criu, "criu lazy-pages ended at once"));
        }
        self.daemons().push(Daemon { pages, ended });
        Ok(())
    }
}

async fn count(said: pipe::Receiver, pages: Arc<Pages>) {
    let mut lines = BufReader::new(said).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        match Said::read(&line) {
            Some(Said::Found(n)) => pages.total.fetch_add(n, Ordering::Relaxed),
            Some(Said::Copied(n)) => pages.copied.fetch_add(n, Ordering::Relaxed),
            None => continue,
        };
    }
}

/// A line of the daemon's log that is understood.
#[derive(Debug, PartialEq, Eq)]
enum Said {
    /// The number of pages that there are.
    Found(u64),
    /// The number of pages that have been copied.
    Copied(u64),
}

impl Said {
    fn read(line: &str) -> Option<Self> {
        if let Some((_, rest)) = line.split_once("Found ") {
            return rest.split_once(" pages to be handled")?.0.parse().ok().map(Self::Found);
        }
        let (_, rest) = line.split_once("uffd_copy: 0x")?;
        let bytes: u64 = rest.split_once('/')?.1.trim_end().parse().ok()?;
        Some(Self::Copied(bytes / PAGE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_by_what_the_daemon_says() {
        assert_eq!(
            Said::read("(00.10) uffd: 1003-7: Found 66113 pages to be handled by UFFD"),
            Some(Said::Found(66113))
        );
        assert_eq!(Said::read("(00.11) uffd: 1003-7: uffd_copy: 0x7f0000a000/65536"), Some(Said::Copied(16)));
        assert_eq!(Said::read("(00.12) uffd: 1003-7: #PF at 0x7f0000a000"), None);
    }
}
