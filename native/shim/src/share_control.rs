//! What the shim and the server of the shares say to each other: JSON lines on a socket (docs/protocol.md, section 5).

use crate::error::Error;
use crate::line::{self, MAX_LINE};
use crate::plan::{Share, Shares};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncWriteExt, Interest};
use tokio::sync::Mutex;
use tokio::time::timeout;

/// The subject of failures that the server has not told itself.
pub const SERVER: &str = "machinen-share";
/// The longest first answer, in bytes: it may name files.
const MAX_ANSWER: usize = 1 << 20;
/// How long the server may take to open what it serves, which a slow disk or network holds up, or to save its state.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the server says when it is ready. The starter is told.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// By what it is confined to the shares.
    #[serde(default)]
    confinement: Vec<String>,
    /// The files of a saved guest that are not there any more, or are others.
    #[serde(default)]
    lost: Vec<Lost>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Lost {
    tag: String,
    path: String,
    why: String,
}

/// Whether the server has closed the conversation, usually because it has ended.
pub fn is_end(error: &Error) -> bool {
    let kind = if let Error::Io { error, .. } = error { error.kind() } else { return false };
    matches!(kind, io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
}

/// The first line to the server.
#[derive(Serialize)]
struct Hello<'a> {
    version: u32,
    shares: &'a [Share],
    #[serde(skip_serializing_if = "Option::is_none")]
    state: Option<&'a Path>,
}

#[derive(Deserialize)]
struct Answer<T> {
    ok: bool,
    code: Option<String>,
    message: Option<String>,
    #[serde(flatten)]
    more: T,
}

#[derive(Deserialize)]
struct Nothing {}

/// The shim's conversation with the server, which ends when the shim closes its side.
pub struct Control(Mutex<Conversation>);

struct Conversation {
    stream: tokio::net::UnixStream,
    rest: Vec<u8>,
    /// An answer is owed: the next line might be that of a request which nobody waits for any more.
    owed: bool,
}

impl Control {
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let stream = tokio::net::UnixStream::from_std(stream)?;
        Ok(Control(Mutex::new(Conversation { stream, rest: Vec::new(), owed: false })))
    }

    /// Tells the server what to serve, and waits until it can.
    pub async fn greet(&mut self, shares: &Shares) -> Result<Report, Error> {
        let Shares { parts, state, .. } = shares;
        let hello = Hello { version: 1, shares: parts, state: state.as_deref() };
        let conversation = self.0.get_mut();
        let asked = timeout(PATIENCE, async {
            let mut line = serde_json::to_vec(&hello)?;
            line.push(b'\n');
            conversation.stream.write_all(&line).await?;
            conversation.answer(MAX_ANSWER).await
        });
        asked.await.map_err(io::Error::from).and_then(|answered| answered).map_err(server_failed)?
    }

    /// Has the server write its state to a new, empty file. The guest must stand still, with no request under way.
    ///
    /// # Errors
    /// The server's own words where it cannot (`EBUSY`: a lock is held), and what the connection says.
    pub async fn save(&self, to: &File) -> Result<(), Error> {
        let mut conversation = self.0.lock().await;
        if conversation.owed {
            return Err(Error::errno(format_args!("{SERVER} has not answered before"), Errno::IO));
        }
        conversation.owed = true;
        let asked = timeout(PATIENCE, async {
            conversation.send(b"{\"op\":\"save\"}\n", to).await?;
            conversation.answer::<Nothing>(MAX_LINE).await
        });
        let answer = asked.await.map_err(io::Error::from).and_then(|answered| answered).map_err(server_failed)?;
        conversation.owed = false;
        answer.map(|Nothing {}| ())
    }
}

impl Conversation {
    /// Sends a line, which is short enough to be sent whole, and a descriptor with it.
    async fn send(&mut self, line: &[u8], file: &File) -> io::Result<()> {
        let stream = &self.stream;
        let once = || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let fds = [file.as_fd()];
            if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
                return Err(Errno::NOBUFS.into());
            }
            let sent = sendmsg(stream, &[IoSlice::new(line)], &mut control, SendFlags::NOSIGNAL)?;
            if sent == line.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
        };
        stream.async_io(Interest::WRITABLE, once).await
    }

    /// Reads the next answer: what the server says, or why it refuses.
    async fn answer<T: for<'a> Deserialize<'a>>(&mut self, max: usize) -> io::Result<Result<T, Error>> {
        let text = line::next(&mut self.stream, &mut self.rest, max).await?;
        match serde_json::from_slice(&text)? {
            Answer { ok: true, more, .. } => Ok(Ok(more)),
            Answer { code: Some(code), message: Some(message), .. } => Ok(Err(Error::Told { code, message })),
            Answer { .. } => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

fn server_failed(error: io::Error) -> Error {
    Error::io(SERVER, error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    use std::io::{IoSliceMut, Read, Write};

    /// A server that takes one request, writes `state` to the file that came with it, and answers.
    fn serve(mut stream: UnixStream, state: &'static str, answer: &'static str) -> std::thread::JoinHandle<String> {
        std::thread::spawn(move || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut line = [0; 100];
            let received =
                recvmsg(&stream, &mut [IoSliceMut::new(&mut line)], &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
            let file = control.drain().find_map(|message| match message {
                RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
                _ => None,
            });
            File::from(file.unwrap()).write_all(state.as_bytes()).unwrap();
            stream.write_all(answer.as_bytes()).unwrap();
            String::from_utf8(line[..received.bytes].to_vec()).unwrap()
        })
    }

    #[tokio::test]
    async fn the_server_gets_the_file_to_save_to() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let control = Control::new(ours).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        let served = serve(theirs, "state", "{\"ok\":true}\n");
        control.save(&file).await.unwrap();
        assert_eq!(served.join().unwrap(), "{\"op\":\"save\"}\n");
        let mut state = String::new();
        io::Seek::rewind(&mut file).unwrap();
        file.read_to_string(&mut state).unwrap();
        assert_eq!(state, "state");
    }

    #[tokio::test]
    async fn what_the_server_refuses_is_told_in_its_words_and_it_can_be_asked_again() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let control = Control::new(ours).unwrap();
        let file = tempfile::tempfile().unwrap();
        for _ in 0..2 {
            let refusal = "{\"ok\":false,\"code\":\"EBUSY\",\"message\":\"pid 7 locks a/b\"}\n";
            let served = serve(theirs.try_clone().unwrap(), "", refusal);
            let error = control.save(&file).await.unwrap_err();
            assert_eq!((error.code().as_str(), error.to_string().as_str()), ("EBUSY", "pid 7 locks a/b"));
            served.join().unwrap();
        }
    }

    #[tokio::test]
    async fn an_answer_that_makes_no_sense_is_the_last() {
        for answer in ["{}\n", "{\"ok\":false}\n", "[\n", "{\"ok\":true}"] {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let control = Control::new(ours).unwrap();
            let file = tempfile::tempfile().unwrap();
            let served = serve(theirs, "", answer);
            control.save(&file).await.unwrap_err();
            served.join().unwrap();
            let error = control.save(&file).await.unwrap_err();
            assert_eq!(error.to_string().split(':').next(), Some("machinen-share has not answered before"), "{answer}");
        }
    }
}
