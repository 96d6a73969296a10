//! The program `criu` of the image.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::io::FdFlags;
use rustix::process::Pid;

use crate::agent::child::Child;
use crate::agent::lookup;
use crate::reply::{Code, ErrorReply};

/// The log level for errors only: the agent reads no other lines, and writing them takes time.
const QUIET: &str = "-v1";

/// The path of the program in the image.
pub struct Criu(PathBuf);

impl Criu {
    pub fn find() -> Result<Self, ErrorReply> {
        let found = lookup::resolve("criu", lookup::DEFAULT_PATH, Path::new("/"));
        found.map(Self).map_err(|_| {
            let message = "the image has no criu, which saves and restores its processes";
            ErrorReply::new(Code::NotFound, message)
        })
    }

    /// A run that does `action` and logs to `<directory>/<action>.log`.
    pub fn action(&self, action: &str, directory: &str) -> Run {
        let mut command = Command::new(&self.0);
        let log = PathBuf::from(format!("{directory}/{action}.log"));
        command.args([action, QUIET, "-D", directory, "-o"]).arg(&log);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Run { command, log: Some(log), action: action.to_owned() }
    }

    /// A run of `action` without images.
    pub fn bare(&self, action: &str) -> Run {
        let mut command = Command::new(&self.0);
        command.args([action, QUIET]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Run { command, log: None, action: action.to_owned() }
    }
}

/// A run that is being prepared.
pub struct Run {
    pub command: Command,
    log: Option<PathBuf>,
    action: String,
}

impl Run {
    pub fn arg(&mut self, argument: impl AsRef<OsStr>) -> &mut Self {
        self.command.arg(argument);
        self
    }

    /// Starts the run in the control group whose `cgroup.procs` this is.
    pub fn in_group(&mut self, procs: &'static File) -> &mut Self {
        // SAFETY: runs between fork and exec: one system call on a descriptor that is never closed.
        unsafe { self.command.pre_exec(move || Ok(rustix::io::write(procs, b"0").map(drop)?)) };
        self
    }

    /// Passes a descriptor to the program. Returns its number there, which is the same here.
    pub fn inherit(&mut self, fd: OwnedFd) -> RawFd {
        let number = fd.as_raw_fd();
        // SAFETY: runs between fork and exec: one system call on a descriptor that the closure owns.
        unsafe { self.command.pre_exec(move || Ok(rustix::io::fcntl_setfd(&fd, FdFlags::empty())?)) };
        number
    }

    /// Runs the program and waits for its end. It is killed only if it has not ended within `limit`, because its own code runs inside the
    /// processes meanwhile.
    pub async fn finish(mut self, limit: Duration) -> Result<(), ErrorReply> {
        let failed = |error: io::Error| ErrorReply::io("criu", &error);
        let child = self.command.spawn().map_err(failed)?;
        // Drops the closures and the descriptors they hold, because the child has its own by now.
        drop(self.command);
        let child = Child::of(Pid::from_child(&child)).map_err(failed)?;
        let code = match tokio::time::timeout(limit, child.wait()).await {
            Ok(status) => status.map_err(failed)?.exit_status(),
            Err(_) => {
                child.kill();
                let _ = child.wait().await;
                let message = format!("criu {} did not end within {} ms", self.action, limit.as_millis());
                return Err(ErrorReply::new(Code::Timeout, message));
            }
        };
        if code == Some(0) {
            return Ok(());
        }
        let said = self.log.as_deref().and_then(first_error);
        let said = said.unwrap_or_else(|| code.map_or("killed".to_owned(), |code| format!("code {code}")));
        Err(ErrorReply::new(Code::Criu, format!("criu {}: {said}", self.action)))
    }
}

/// The first error in CRIU's log; the later ones are its consequences.
fn first_error(log: &Path) -> Option<String> {
    let text = fs::read_to_string(log).ok()?;
    first_error_in(&text).map(|line| line.chars().take(512).collect())
}

fn first_error_in(log: &str) -> Option<&str> {
    let line = log.lines().find(|line| line.contains("Error ("))?;
    // Cuts off the time and the process id before the message.
    line.find("Error (").map(|at| line[at..].trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_error_is_told_without_its_time() {
        let log = "(00.01) Warn  (criu/x.c:1): y\n(00.02)    40: Error (criu/sk-inet.c:189): inet: Connected\n(00.03) Error (c): z\n";
        assert_eq!(first_error_in(log), Some("Error (criu/sk-inet.c:189): inet: Connected"));
        assert_eq!(first_error_in("(00.01) Warn  (criu/x.c:1): y\n"), None);
    }
}
