//! The agent: serves the host's operations over the channel, each on its own stream. It is single-threaded, except that operations that may
//! wait for a file system run on threads (`threads`).

mod archive;
mod attend;
mod child;
mod clock;
mod command;
mod context;
mod criu;
mod directory;
mod disks;
mod doorbell;
mod exchange;
mod exec;
mod files;
mod format;
mod freeze;
mod gate;
mod identity_files;
mod lifecycle;
mod lookup;
mod main_command;
mod operation;
mod port;
mod process;
mod rejuvenate;
mod secrets;
mod serve;
mod shares;
mod stats;
mod stream;
mod terminal;
#[cfg(test)]
mod tests;
mod threads;
mod tunnel;
mod user;
mod vfork;
mod watch;

pub use criu::hook as criu_hook;
pub use serve::run;
