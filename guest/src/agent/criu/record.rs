//! The record that a dump leaves beside CRIU's images for the machine that goes on with it.

use std::fs;
use std::io;

use serde::{Deserialize, Serialize};

use super::place::DIR;
use crate::config::GuestConfig;

const VERSION: u32 = 1;

/// Describes a dump.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    version: u32,
    /// Environment and working directory of commands to come.
    pub config: GuestConfig,
    pub main: Option<MainCommand>,
    pub trees: Vec<Tree>,
    pub pipes: Vec<AgentPipe>,
    /// Whether established TCP connections were closed instead of saved.
    pub tcp_close: bool,
}

/// The command the machine exists for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MainCommand {
    pub pid: i32,
    /// The inode of its stdout, a pipe to the agent.
    pub stdout: u64,
    pub stderr: u64,
}

/// A process and its descendants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Tree {
    pub root: i32,
    /// The pids of all processes.
    pub processes: Vec<i32>,
    /// The pids of the processes that job control had stopped.
    pub stopped: Vec<i32>,
    /// Whether the root leads its session. Often it does not, if its parent has ended.
    pub leads_session: bool,
    /// The inodes of the pipes that its processes have open.
    pub pipes: Vec<u64>,
}

/// A pipe between a command and the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AgentPipe {
    pub inode: u64,
    /// True for a command's output, false for its input.
    pub agent_reads: bool,
}

impl Record {
    pub fn new(
        config: GuestConfig,
        main: Option<MainCommand>,
        trees: Vec<Tree>,
        pipes: Vec<AgentPipe>,
        tcp_close: bool,
    ) -> Self {
        Self { version: VERSION, config, main, trees, pipes, tcp_close }
    }

    fn path() -> String {
        format!("{DIR}/dump.json")
    }

    pub fn write(&self) -> io::Result<()> {
        fs::write(Self::path(), serde_json::to_vec(self)?)
    }

    pub fn read() -> io::Result<Self> {
        let record: Self = serde_json::from_slice(&fs::read(Self::path())?)?;
        if record.version == VERSION {
            Ok(record)
        } else {
            Err(io::Error::other(format!("version {}", record.version)))
        }
    }
}
