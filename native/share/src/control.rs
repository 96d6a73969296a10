//! The control connection: JSON lines of the shim, each with an answer. A line may carry a descriptor.

use std::io::{self, ErrorKind, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde::Serialize;

/// The longest line: a plan of the most shares with the longest paths fits.
const MAX_LINE: usize = 1 << 20;

pub struct Control {
    stream: UnixStream,
    rest: Vec<u8>,
    files: Vec<OwnedFd>,
}

pub struct Line {
    pub text: Vec<u8>,
    /// The descriptor that came with it.
    pub file: Option<OwnedFd>,
}

impl Control {
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, rest: Vec::new(), files: Vec::new() }
    }

    /// The next line; `None`: the connection has ended.
    ///
    /// # Errors
    /// Those of the connection; a line that is too long.
    pub fn line(&mut self) -> io::Result<Option<Line>> {
        loop {
            if let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
                let mut text: Vec<u8> = self.rest.drain(..=end).collect();
                text.pop();
                return Ok(Some(Line { text, file: std::mem::take(&mut self.files).pop() }));
            }
            if self.rest.len() > MAX_LINE {
                return Err(ErrorKind::InvalidData.into());
            }
            if self.receive()? == 0 {
                return Ok(None);
            }
        }
    }

    fn receive(&mut self) -> io::Result<usize> {
        let mut buffer = [0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut buffer)];
        let received =
            rustix::io::retry_on_intr(|| recvmsg(&self.stream, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC))?;
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(files) = message {
                self.files.extend(files);
            }
        }
        self.rest.extend_from_slice(&buffer[..received.bytes]);
        Ok(received.bytes)
    }

    /// # Errors
    /// Those of the connection.
    pub fn answer(&mut self, answer: &impl Serialize) -> io::Result<()> {
        let mut line = serde_json::to_vec(answer)?;
        line.push(b'\n');
        self.stream.write_all(&line)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{IoSlice, Read, Seek};
    use std::os::fd::AsFd;

    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

    use super::*;

    #[test]
    fn lines_come_one_by_one_with_their_descriptors() {
        let (mut shim, server) = UnixStream::pair().unwrap();
        let mut control = Control::new(server);
        shim.write_all(b"one\ntwo").unwrap();
        assert_eq!(control.line().unwrap().unwrap().text, b"one");
        let mut file = tempfile::tempfile().unwrap();
        let files = [file.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&files)));
        sendmsg(&shim, &[IoSlice::new(b" and a file\nthree\n")], &mut ancillary, SendFlags::empty()).unwrap();
        let line = control.line().unwrap().unwrap();
        assert_eq!(line.text, b"two and a file");
        std::fs::File::from(line.file.unwrap()).write_all(b"written").unwrap();
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "written");
        let line = control.line().unwrap().unwrap();
        assert_eq!((line.text, line.file.is_none()), (b"three".to_vec(), true));
        drop(shim);
        assert!(control.line().unwrap().is_none());
    }

    #[test]
    fn a_line_without_an_end_is_refused() {
        let (mut shim, server) = UnixStream::pair().unwrap();
        let writer = std::thread::spawn(move || shim.write_all(&vec![b'x'; MAX_LINE + 8192]));
        assert_eq!(Control::new(server).line().err().unwrap().kind(), ErrorKind::InvalidData);
        // Whether all of it was taken is of no matter.
        let _ = writer.join().unwrap();
    }
}
