//! One operation of the agent, whose data this process sends or takes. The caller handles everything else: stdin is the stream, both ways,
//! and every frame that carries no data goes to stdout as it is. The caller judges those, and notices when the last is missing, so a stream
//! that breaks is no failure here. The data never pass through the caller.

use std::io::{self, BufReader, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::thread;

use machinen_archive::ChunkWriter;
use machinen_protocol::frame::{HEADER, Kind, header};
use rustix::process::{Signal, set_parent_process_death_signal};

use crate::error::Error;
use crate::frame::{self, Head};

/// How many bytes are read from the stream at once.
const BUFFER: usize = 256 * 1024;

/// Why a copy failed on this side.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The tree's path cannot be opened.
    #[error(transparent)]
    Io(#[from] Error),
    /// A tree could not be packed or unpacked.
    #[error(transparent)]
    Archive(#[from] machinen_archive::Error),
    /// The guest sent more than so many bytes, which is what the caller takes.
    #[error("the guest sent more than {0} bytes")]
    TooLarge(u64),
}

/// Begins the operation and sends the chunks that `pack` writes, each as a frame.
pub fn send(
    request: &str,
    pack: impl FnOnce(ChunkWriter) -> Result<u64, machinen_archive::Error>,
) -> Result<(), CopyError> {
    let Ok(Some(mut stream)) = begin(request) else { return Ok(()) };
    let Ok(mut answers) = stream.try_clone() else { return Ok(()) };
    let listening = thread::spawn(move || {
        let _ = relay(&mut answers);
        // The guest has sent its last frame. If it refused half-way, the next chunk fails, and no more files are read.
        let _ = answers.shutdown(Shutdown::Both);
    });
    let mut refused = false;
    let packed = pack(ChunkWriter::new(HEADER, |mut chunk| {
        let header = header(Kind::Data, chunk.len() - HEADER).map_err(io::Error::other)?;
        chunk[..HEADER].copy_from_slice(&header);
        let sent = stream.write_all(&chunk);
        refused = sent.is_err();
        sent.map(|()| chunk)
    }));
    if !refused {
        packed?;
        let _ = frame::encode(Kind::Eof, &[]).and_then(|end| stream.write_all(&end));
    }
    let _ = listening.join();
    Ok(())
}

/// Begins the operation and gives its data to `unpack`, up to `limit` bytes.
pub fn receive(
    request: &str,
    limit: u64,
    unpack: impl FnOnce(&mut dyn Read) -> Result<u64, machinen_archive::Error>,
) -> Result<(), CopyError> {
    let Ok(Some(stream)) = begin(request) else { return Ok(()) };
    let mut data = BufReader::with_capacity(BUFFER, Receiving { stream, left: 0, allowed: limit, end: None });
    let unpacked = unpack(&mut data);
    let mut data = data.into_inner();
    match data.end {
        Some(End::TooLarge) => return Err(CopyError::TooLarge(limit)),
        // The guest has failed or is gone; the caller knows why.
        Some(End::Frame(Some(Kind::Error))) => return Ok(()),
        Some(End::Frame(Some(Kind::Eof))) | None => unpacked?,
        Some(End::Frame(_)) => {
            return Err(machinen_archive::Error::Refused(
                "the guest ended the copy before it had sent all of its data".into(),
            )
            .into());
        }
    };
    let _ = relay(&mut data.stream);
    Ok(())
}

/// Sends the request and passes the answer on. `None`: the answer was not `started`, or there was none.
fn begin(request: &str) -> io::Result<Option<UnixStream>> {
    // If the caller is gone already, the write below fails.
    set_parent_process_death_signal(Some(Signal::KILL))?;
    let mut stream = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    // Node leaves the socket non-blocking, but the copies here need it blocking.
    stream.set_nonblocking(false)?;
    stream.write_all(&frame::encode(Kind::Request, request.as_bytes())?)?;
    let answer = relay(&mut stream)?.and_then(Head::kind);
    Ok((answer == Some(Kind::Started)).then_some(stream))
}

/// Passes a frame on and returns its head. `None`: the stream has ended, or the bytes are no frame.
fn relay(stream: &mut UnixStream) -> io::Result<Option<Head>> {
    match read_head(stream)? {
        Some(head) => Ok(pass_on(stream, head)?.then_some(head)),
        None => Ok(None),
    }
}

/// Reads the head of the next frame. `None`: the stream has ended.
fn read_head(stream: &mut UnixStream) -> io::Result<Option<Head>> {
    let mut head = [0; HEADER];
    match stream.read_exact(&mut head) {
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(None),
        read => {
            read?;
            Ok(Some(Head::from_bytes(head)))
        }
    }
}

/// Passes on a frame whose head has been read. Of a frame that is too long only the head is passed on, and nothing after it: returns false.
fn pass_on(stream: &mut UnixStream, head: Head) -> io::Result<bool> {
    let mut caller = io::stdout().lock();
    caller.write_all(&head.to_bytes())?;
    if head.fits() {
        io::copy(&mut stream.take(head.length.into()), &mut caller)?;
    }
    caller.flush()?;
    Ok(head.fits())
}

/// Reads the guest's data, up to the first frame of another kind.
struct Receiving {
    stream: UnixStream,
    /// The unread bytes of the present frame.
    left: u32,
    /// How many bytes may still come.
    allowed: u64,
    end: Option<End>,
}

/// Why no more data come.
#[derive(Clone, Copy)]
enum End {
    /// A frame of another kind; `None` if the protocol has no such kind.
    Frame(Option<Kind>),
    /// The guest has sent more than the caller takes.
    TooLarge,
}

/// The stream broke off, or the bytes are no frame: this counts as an error of the guest.
const BROKEN: End = End::Frame(Some(Kind::Error));

impl Read for Receiving {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.left == 0 {
            if self.end.is_some() {
                return Ok(0);
            }
            match read_head(&mut self.stream) {
                Ok(Some(head)) if head.kind() == Some(Kind::Data) && head.fits() => {
                    match self.allowed.checked_sub(head.length.into()) {
                        Some(allowed) => (self.left, self.allowed) = (head.length, allowed),
                        None => self.end = Some(End::TooLarge),
                    }
                }
                Ok(Some(head)) => {
                    let whole = pass_on(&mut self.stream, head).unwrap_or(false);
                    self.end = Some(End::Frame(if whole { head.kind() } else { Some(Kind::Error) }));
                }
                Ok(None) | Err(_) => self.end = Some(BROKEN),
            }
        }
        let length = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let read = self.stream.read(&mut buffer[..length]).unwrap_or(0);
        if read == 0 {
            (self.left, self.end) = (0, Some(BROKEN));
        }
        self.left = self.left.saturating_sub(u32::try_from(read).unwrap_or(u32::MAX));
        Ok(read)
    }
}
