//! The operation `watch`: reports changes below a directory.

mod tree;

pub use tree::watch;
