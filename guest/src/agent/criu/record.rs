//! What a dump leaves beside CRIU's images for the machine that goes on with it.

use std::fs;
use std::io;

use serde::{Deserialize, Serialize};

use super::place::DIR;
use crate::config::GuestConfig;

const VERSION: u32 = 1;

/// A dump.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    version: u32,
    /// Environment and working directory of commands to come.
    pub config: GuestConfig,
    pub main: Option<MainCommand>,
    pub trees: Vec<Tree>,
    pub pipes: Vec<AgentPipe>,
    /// Established connections were not kept.
    pub tcp_close: bool,
}

/// The command the machine exists for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MainCommand {
    pub pid: i32,
    /// Inodes of its pipes to the agent.
    pub stdout: u64,
    pub stderr: u64,
}

/// Processes that descend from one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Tree {
    pub root: i32,
    /// All of them.
    pub processes: Vec<i32>,
    /// Those that job control had stopped.
    pub stopped: Vec<i32>,
    /// The root leads the session it is in; a process whose parent has ended often does not.
    pub leads_session: bool,
    /// Inodes of the pipes it has open.
    pub pipes: Vec<u64>,
}

/// A pipe between a command and the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AgentPipe {
    pub inode: u64,
    /// A command's output; otherwise its input.
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
