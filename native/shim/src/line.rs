//! Reads lines of a connection whose peer may send anything, or nothing.

use serde_json::Value;
use std::io::{self, ErrorKind};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Longest line of a client of the control socket, and of QMP.
pub const MAX_LINE: usize = 64 * 1024;
/// How long a peer may take for its first line.
const PATIENCE: Duration = Duration::from_secs(10);
/// How many bytes are read at once: usually the line and all that follows it.
const BUFFER: usize = 16 * 1024;

/// A line without its newline, and the bytes that came behind it.
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

/// Reads the next line that is not longer than `max`. Longer lines are dropped.
///
/// # Errors
/// As `next`, except that no line is too long.
pub async fn next_short(from: &mut (impl AsyncRead + Unpin), rest: &mut Vec<u8>, max: usize) -> io::Result<Vec<u8>> {
    let mut is_tail = false;
    loop {
        match next(from, rest, max).await {
            // The rest of a line whose beginning was dropped.
            Ok(_) if is_tail => is_tail = false,
            Err(error) if error.kind() == ErrorKind::InvalidData => {
                // Bytes behind the end of the dropped line are kept.
                let known = rest.iter().position(|&byte| byte == b'\n').map_or(rest.len(), |at| at + 1);
                is_tail = rest[..known].last() != Some(&b'\n');
                rest.drain(..known);
            }
            read => return read,
        }
    }
}

/// Reads the next line, without a time limit. `rest` holds the bytes that came behind the line before.
///
/// # Errors
/// As `read`, except `TimedOut`.
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

/// Sends `answer` as a line.
pub async fn answer(client: &mut (impl AsyncWrite + Unpin), answer: &Value) -> io::Result<()> {
    client.write_all(format!("{answer}\n").as_bytes()).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[tokio::test]
    async fn long_lines_are_forgotten_and_short_ones_are_not() {
        let long = "x".repeat(100_000);
        let text = format!("one\n{long}\ntwo\n{long}\n{long}\nthree\n");
        let (mut from, mut rest) = (text.as_bytes(), Vec::new());
        for expected in ["one", "two", "three"] {
            assert_eq!(next_short(&mut from, &mut rest, 50).await.unwrap(), expected.as_bytes());
            assert!(rest.capacity() < 200_000);
        }
        assert_eq!(next_short(&mut from, &mut rest, 50).await.unwrap_err().kind(), ErrorKind::UnexpectedEof);
    }

    proptest! {
        /// In whatever pieces the bytes come, the short lines are found that a split finds.
        #[test]
        fn short_lines_are_found(text in "[ab\n]{0,200}", max in 0usize..8, piece in 1usize..20) {
            let lines: Vec<_> = text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')).collect();
            let expected: Vec<_> = lines.iter().filter(|line| line.len() <= max).map(|line| line.as_bytes()).collect();
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let found = runtime.block_on(async {
                let (mut from, mut to) = tokio::io::duplex(piece);
                let sent = text.clone();
                tokio::spawn(async move { tokio::io::AsyncWriteExt::write_all(&mut to, sent.as_bytes()).await });
                let (mut rest, mut found) = (Vec::new(), Vec::new());
                while let Ok(line) = next_short(&mut from, &mut rest, max).await {
                    found.push(line);
                }
                found
            });
            prop_assert_eq!(found, expected);
        }
    }
}
