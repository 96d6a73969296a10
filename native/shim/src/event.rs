//! The events that the shim sends to its owner and its control clients, one JSON object a line.

use crate::failed::Failed;
use crate::identity::Identity;
use crate::share_control::Report;
use serde::Serialize;

#[derive(Serialize)]
#[serde(tag = "event", rename_all = "camelCase")]
pub enum Event<'a> {
    Started {
        shim: Identity,
        vmm: Identity,
        /// What the server of the shares has said.
        #[serde(skip_serializing_if = "Option::is_none")]
        shares: Option<&'a Report>,
    },
    Failed(&'a Failed),
    Exited {
        exit: &'a ExitRecord,
    },
}

impl Event<'_> {
    /// The event as a line.
    pub fn line(&self) -> String {
        // Serializing to memory fails only for maps whose keys are no strings, and there are none.
        let mut line = serde_json::to_string(self).unwrap_or_default();
        line.push('\n');
        line
    }
}

/// How a process ended.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct ProcessExit {
    pub code: Option<i32>,
    pub signal: Option<i32>,
}

impl ProcessExit {
    /// How the process ended, as the end of a sentence about it.
    pub fn how(self) -> String {
        match self {
            ProcessExit { signal: Some(signal), .. } => format!("was ended by signal {signal}"),
            ProcessExit { code, .. } => format!("ended with code {}", code.unwrap_or(-1)),
        }
    }
}

/// How the main command ended.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct MainExit {
    pub code: i32,
    pub signal: Option<i32>,
}

/// What ended the VM: the first that asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    Guest,
    Stop,
    Kill,
    OwnerLost,
    Vmm,
}

/// How a VM ended.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ExitRecord {
    pub vmm: ProcessExit,
    pub main: Option<MainExit>,
    /// Whether the guest announced its power-off.
    pub orderly: bool,
    pub reason: Reason,
    pub console_tail: String,
    pub vmm_log_tail: String,
}
