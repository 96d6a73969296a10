//! Packs and unpacks trees as tar. The guest agent is at one end and the host at the other, and neither trusts what the other sends.

#![warn(clippy::missing_errors_doc)]

mod attributes;
mod chunk_writer;
mod content;
#[cfg(test)]
mod damaged_tests;
mod draft;
mod entries;
mod error;
mod held;
mod holes;
#[cfg(test)]
mod holes_tests;
mod metadata;
mod pack;
mod sparse;
#[cfg(test)]
mod tests;
mod times;
mod unpack;

pub use chunk_writer::ChunkWriter;
pub use error::{Error, errno};
pub use holes::next_data;
pub use pack::Source;
pub use unpack::Target;
