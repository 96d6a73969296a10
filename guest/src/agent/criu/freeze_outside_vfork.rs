//! Freezes commands at a moment when none is in the middle of vfork(2), because CRIU cannot dump one there.
//!
//! The parent sleeps until its child executes a program or ends. The freezer counts it as frozen (Linux, `wait_for_vfork_done`), but ptrace
//! cannot stop it, so CRIU 3.17 would wait for the parent, while it holds the child, until its time is up. Measured: this happened in one
//! dump of 2 to 30, of shells that start programs all the time on a busy host.

use std::fs;
use std::io;
use std::time::{Duration, Instant};

use tokio::io::AsyncRead;

use super::process_trees::stat_fields;
use crate::agent::freeze;
use crate::agent::stream::{Abort, FrameReader};
use crate::reply::{Code, ErrorReply};
use crate::system::cgroup;

/// The first pause before commands are frozen again. An exec takes less, and no event tells of its end.
const FIRST_PAUSE: Duration = Duration::from_millis(2);
const LONGEST_PAUSE: Duration = Duration::from_millis(200);

/// Freezes the commands at a moment when none of them is in a vfork. Returns when that last freeze began. Ends early when the host's stream
/// is lost.
pub async fn stop_commands<R: AsyncRead + Unpin>(
    limit: Duration,
    input: &mut FrameReader<R>,
) -> Result<Instant, Abort> {
    let end = Instant::now() + limit;
    let mut pause = FIRST_PAUSE;
    loop {
        let began = Instant::now();
        freeze::stop_commands(end.saturating_duration_since(began), input).await?;
        let parents = parents().map_err(|error| Abort::io("processes", &error))?;
        let Some(parent) = parents.first() else { return Ok(began) };
        // Leaves as much time for freezing.
        if Instant::now() + 2 * pause >= end {
            let message = format!(
                "process {parent} waits in vfork for a child that has not executed a program within {} ms, where CRIU cannot stop it",
                limit.as_millis()
            );
            return Err(ErrorReply::new(Code::Criu, message).into());
        }
        cgroup::thaw_workload().map_err(|error| Abort::io("thaw", &error))?;
        tokio::select! {
            biased;
            () = input.lost() => return Err(Abort::Gone),
            () = tokio::time::sleep(pause) => {}
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// The frozen processes that wait in a vfork: they alone of all frozen processes sleep uninterruptibly.
fn parents() -> io::Result<Vec<i32>> {
    let pids = cgroup::workload_pids()?;
    Ok(pids.into_iter().filter(|pid| sleeps_uninterruptibly(*pid).unwrap_or(false)).collect())
}

/// Whether a thread of the process sleeps uninterruptibly. Fails if the process has just been killed.
fn sleeps_uninterruptibly(pid: i32) -> io::Result<bool> {
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let stat = fs::read_to_string(thread?.path().join("stat"))?;
        if stat_fields(&stat).is_some_and(|(_, mut fields)| fields.next() == Some("D")) {
            return Ok(true);
        }
    }
    Ok(false)
}
