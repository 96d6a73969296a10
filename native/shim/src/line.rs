//! The lines of a connection, from a peer that may send anything, or nothing.

use std::io::{self, ErrorKind};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt};

/// How long a peer may take for its first line.
const PATIENCE: Duration = Duration::from_secs(10);
/// Read at once: the line, and most often all that is said behind it.
const BUFFER: usize = 16 * 1024;

/// A line without its end, and what came behind it.
#[derive(Debug)]
pub struct Line {
    pub text: Vec<u8>,
    pub rest: Vec<u8>,
}

/// Reads the first line, of at most `max` bytes.
///
/// # Errors
/// `InvalidData` when it is longer, `UnexpectedEof` when it has no end, `TimedOut` when it takes too long.
pub async fn read(from: &mut (impl AsyncRead + Unpin), max: usize) -> io::Result<Line> {
    let mut rest = Vec::with_capacity(BUFFER);
    let text = tokio::time::timeout(PATIENCE, next(from, &mut rest, max)).await??;
    Ok(Line { text, rest })
}

/// Reads the next line, however long it takes to come. `rest` is what came behind the line before.
///
/// # Errors
/// As `read`, but for the time.
pub async fn next(from: &mut (impl AsyncRead + Unpin), rest: &mut Vec<u8>, max: usize) -> io::Result<Vec<u8>> {
    let mut known = 0;
    loop {
        if let Some(at) = rest[known..].iter().position(|&byte| byte == b'\n').map(|at| known + at)
            && at <= max
        {
            let behind = rest.split_off(at + 1);
            let mut text = std::mem::replace(rest, behind);
            text.truncate(at);
            return Ok(text);
        }
        if rest.len() > max {
            return Err(ErrorKind::InvalidData.into());
        }
        known = rest.len();
        if from.read_buf(rest).await? == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
    }
}
