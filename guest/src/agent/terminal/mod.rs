//! Commands in terminals, which outlive their streams as sessions.

mod operation;
mod pty;
mod screen;
mod session;

pub use operation::{Terminals, pty};
