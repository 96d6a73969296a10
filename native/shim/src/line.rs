//! The first line of a connection, from a peer that may send anything, or nothing.

use std::io::{self, ErrorKind};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt};

/// How long a peer may take for its line.
const PATIENCE: Duration = Duration::from_secs(10);

/// A line without its end, and what came behind it.
#[derive(Debug)]
pub struct Line {
    pub text: Vec<u8>,
    pub rest: Vec<u8>,
}

/// Reads a line of at most `max` bytes.
///
/// # Errors
/// `InvalidData` when it is longer, `UnexpectedEof` when it has no end, `TimedOut` when it takes too long.
pub async fn read(from: &mut (impl AsyncRead + Unpin), max: usize) -> io::Result<Line> {
    let read = async {
        let mut text = Vec::new();
        loop {
            let known = text.len();
            if from.read_buf(&mut text).await? == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            if let Some(at) = text[known..].iter().position(|&byte| byte == b'\n').map(|at| known + at)
                && at <= max
            {
                let rest = text.split_off(at + 1);
                text.truncate(at);
                return Ok(Line { text, rest });
            }
            if text.len() > max {
                return Err(ErrorKind::InvalidData.into());
            }
        }
    };
    tokio::time::timeout(PATIENCE, read).await?
}
