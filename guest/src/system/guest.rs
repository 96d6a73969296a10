//! What init hands to the agent.

use std::os::fd::OwnedFd;

use super::phases::Phases;
use crate::config::{BootConfig, GuestConfig};

/// A machine with its root in place.
#[derive(Debug)]
pub struct Guest {
    pub config: GuestConfig,
    pub boot: BootConfig,
    /// A directory of the filesystem that takes the root's writes.
    pub writable: OwnedFd,
    /// The same of the copy of a host directory.
    pub mounted: Option<OwnedFd>,
    pub phases: Phases,
}
