//! The state that init hands to the agent.

use std::os::fd::OwnedFd;

use super::phases::Phases;
use crate::config::{BootConfig, GuestConfig};

/// A machine whose root is mounted.
#[derive(Debug)]
pub struct Guest {
    pub config: GuestConfig,
    pub boot: BootConfig,
    /// A directory of the filesystem that takes the root's writes.
    pub writable: OwnedFd,
    /// A directory of the file system that takes the writes to a copied host directory.
    pub mounted: Option<OwnedFd>,
    pub phases: Phases,
}
