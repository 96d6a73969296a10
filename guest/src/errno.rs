//! Names of error numbers, as the protocol carries them.

use std::io;

pub use machinen_archive::errno as number;
use machinen_protocol::errno::text;

/// The name of an I/O error's number.
pub fn of(error: &io::Error) -> Option<String> {
    number(error).map(text)
}
