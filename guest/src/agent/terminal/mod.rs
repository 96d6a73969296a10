//! Commands in terminals, which outlive their streams as sessions.

mod operation;
mod pty;
mod screen;
mod session;
mod size;
pub mod table;

pub use operation::pty;
