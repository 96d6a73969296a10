//! Pid 1: from the kernel's first user-space instruction to a running agent, and then the reaper of orphans.

mod boot;
mod reaper;

pub use boot::boot;
