//! What init and the agent are built on: the machine's disks, mounts, names, network, control groups and console.

pub mod after_doorbell;
pub mod cgroup;
pub mod console;
mod disks;
mod grow;
pub mod guest;
pub mod host_name;
pub mod mounts;
pub mod network;
pub mod oom;
pub mod open_once;
pub mod phases;
pub mod root;
pub mod shares;
pub mod step;
