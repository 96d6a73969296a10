//! The agent's answers: results of operations, and errors.

use std::io;
use std::path::{Path, PathBuf};

use machinen_protocol::exit::ExitReport;
use serde::{Deserialize, Serialize, Serializer};

use crate::{errno, file_names};

/// Why an operation failed, for the host to act on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Code {
    #[serde(rename = "AGENT_BAD_REQUEST")]
    BadRequest,
    #[serde(rename = "AGENT_OP_UNKNOWN")]
    OpUnknown,
    #[serde(rename = "AGENT_NOT_FOUND")]
    NotFound,
    #[serde(rename = "AGENT_NOT_EXECUTABLE")]
    NotExecutable,
    #[serde(rename = "AGENT_CWD_INVALID")]
    CwdInvalid,
    #[serde(rename = "AGENT_BUSY")]
    Busy,
    #[serde(rename = "AGENT_SESSION_NOT_FOUND")]
    SessionNotFound,
    /// Another client is attached to the session.
    #[serde(rename = "AGENT_SESSION_IN_USE")]
    SessionInUse,
    #[serde(rename = "AGENT_TIMEOUT")]
    Timeout,
    #[serde(rename = "AGENT_ARGUMENTS_TOO_LARGE")]
    ArgumentsTooLarge,
    #[serde(rename = "AGENT_NO_SPACE")]
    NoSpace,
    /// The limit of inotify's watches.
    #[serde(rename = "AGENT_WATCH_LIMIT")]
    WatchLimit,
    /// Processes hold files on shared directories.
    #[serde(rename = "AGENT_MOUNT_BUSY")]
    MountBusy,
    #[serde(rename = "AGENT_SECRET_UNKNOWN")]
    SecretUnknown,
    /// CRIU refuses, or is known to refuse.
    #[serde(rename = "AGENT_CRIU")]
    Criu,
    #[serde(rename = "AGENT_IO")]
    Io,
}

/// The payload of an `error` frame.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorReply {
    pub code: Code,
    pub message: String,
    /// The name of the error number behind it, e.g. `EACCES`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub errno: Option<String>,
}

impl ErrorReply {
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), errno: None }
    }

    /// The error of an operation on `subject` that the kernel refused.
    pub fn io(subject: impl AsRef<Path>, error: &io::Error) -> Self {
        let code = match errno::number(error) {
            Some(libc::ENOENT) => Code::NotFound,
            Some(libc::ENOSPC) => Code::NoSpace,
            _ => Code::Io,
        };
        Self { code, message: format!("{}: {error}", subject.as_ref().display()), errno: errno::of(error) }
    }
}

/// The payload of `started` for a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Started {
    pub pid: u32,
}

/// The empty result `{}`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Done {}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    Code(i32),
    Signal {
        signal: i32,
        /// Whether the kernel killed it, or another process meanwhile, for want of memory.
        oom_killed: bool,
    },
}

impl Serialize for Exit {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match *self {
            Self::Code(code) => ExitReport { code: Some(code), signal: None, oom_killed: None },
            Self::Signal { signal, oom_killed } => {
                ExitReport { code: Some(128 + signal), signal: Some(signal), oom_killed: Some(oom_killed) }
            }
        }
        .serialize(serializer)
    }
}

/// A session, as `sessions` reports it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SessionInfo {
    pub name: String,
    pub pid: i32,
    pub argv: Vec<String>,
    pub created_ms: u64,
    pub attached: bool,
    pub columns: u16,
    pub rows: u16,
    /// How its command ended; `None` while it runs.
    pub ended: Option<Exit>,
}

/// Result of `sessions`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SessionList {
    pub sessions: Vec<SessionInfo>,
}

/// Result of `write` and `read`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Transferred {
    pub bytes: u64,
}

/// Result of `push`, `pull`, `image` and `list`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct EntryCount {
    pub entries: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FileKind {
    File,
    Directory,
    Symlink,
    Other,
}

/// Result of `stat`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Stat {
    pub kind: FileKind,
    pub size: u64,
    /// Permission bits, without the file type.
    pub mode: u32,
    pub mtime_ms: i64,
    pub uid: u32,
    pub gid: u32,
    #[serde(serialize_with = "file_names::serialize_some", skip_serializing_if = "Option::is_none")]
    pub target: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Memory {
    pub total_bytes: u64,
    pub available_bytes: u64,
}

/// Result of `stats`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Stats {
    pub memory: Memory,
    pub uptime_ms: u64,
    /// Processes of commands; the agent and kernel threads are not counted.
    pub processes: u64,
    pub disk_total_bytes: u64,
    pub disk_free_bytes: u64,
    /// Processes of commands the kernel killed for want of memory since boot.
    pub oom_kills: u64,
    /// Pages (of 4 KiB) of restored processes that will be read only when they are touched.
    pub lazy_pages_pending: u64,
    /// What was renewed in this machine; `None` if it is no copy.
    pub rejuvenation: Option<Rejuvenated>,
}

/// The payload of `started` for `dump`: the images are on the disk, and the disk is frozen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Dumped {
    /// How long the commands have stood still, in milliseconds.
    pub frozen_ms: u64,
    pub processes: usize,
}

/// Something that a copy still has in common with its original.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Kept {
    pub what: &'static str,
    pub why: String,
}

/// Result of `rejuvenate`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Rejuvenated {
    pub renewed: Vec<&'static str>,
    pub kept: Vec<Kept>,
    /// By how many milliseconds the wall clock was moved.
    pub clock_step_ms: i64,
}
