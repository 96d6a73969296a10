//! Answers, put together.

use rustix::io::Errno;
use zerocopy::{Immutable, IntoBytes, KnownLayout};

use crate::abi::OutHeader;

/// What follows the header of an answer; `None`: the request wants no answer, or gets it later.
pub type Answer = Result<Option<Vec<u8>>, Errno>;

pub fn done() -> Answer {
    Ok(Some(Vec::new()))
}

pub fn reply<T: IntoBytes + Immutable + KnownLayout>(body: T) -> Answer {
    let body = body.as_bytes();
    let mut answer = with_room(body.len());
    answer.copy_from_slice(body);
    Ok(Some(answer))
}

/// The whole message of an answer, if there is one.
pub fn message(unique: u64, answer: Answer) -> Option<Vec<u8>> {
    match answer {
        Ok(body) => body.map(|body| assemble(unique, 0, body)),
        Err(errno) => Some(assemble(unique, -errno.raw_os_error(), Vec::new())),
    }
}

/// A body with room for a header (`with_room`) takes no more memory by this.
fn assemble(unique: u64, error: i32, mut body: Vec<u8>) -> Vec<u8> {
    let len = size_of::<OutHeader>() + body.len();
    let header = OutHeader { len: low(len as u64), error, unique };
    body.splice(0..0, header.as_bytes().iter().copied());
    body
}

/// A body of zeros to which a header can be added.
pub fn with_room(length: usize) -> Vec<u8> {
    let mut body = vec![0; length + size_of::<OutHeader>()];
    body.truncate(length);
    body
}

/// The lower half of a number.
pub fn low(wide: u64) -> u32 {
    u32::try_from(wide & u64::from(u32::MAX)).unwrap_or_default()
}

/// The standard library's words for an error, without its number.
pub fn words(errno: Errno) -> String {
    let words = std::io::Error::from(errno).to_string();
    words.split(" (os error").next().unwrap_or(&words).to_owned()
}

pub fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}
