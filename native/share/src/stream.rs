//! Requests on a byte stream: each message begins with its own length.

use std::io::{self, Read};
use std::sync::{Mutex, PoisonError};
use std::thread;

use crate::request::MAX_REQUEST;
use crate::server::{Server, prepare_thread};

/// Requests that are worked on at once.
const THREADS: usize = 6;

/// Serves until the stream ends or makes no sense. The threads take turns at reading: whichever has read a request answers it, so that none is
/// handed over.
///
/// # Errors
/// Those of the stream, and what makes it senseless.
pub fn serve(server: &Server, input: impl Read + Send) -> io::Result<()> {
    let input = Mutex::new(Some(input));
    thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(|| work(server, &input))).collect();
        // When it cannot send, the others cannot either.
        scope.spawn(|| server.watch(true, |message| server.send(message)));
        let ends: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap_or(Ok(()))).collect();
        server.stop_watching();
        ends.into_iter().find(Result::is_err).unwrap_or(Ok(()))
    })
}

fn work(server: &Server, input: &Mutex<Option<impl Read>>) -> io::Result<()> {
    prepare_thread()?;
    let mut message = Vec::new();
    loop {
        {
            let mut input = input.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(stream) = input.as_mut() else { return Ok(()) };
            let more = read(stream, &mut message);
            if !matches!(more, Ok(true)) {
                *input = None;
                return more.map(|_| ());
            }
        }
        if let Some(answer) = server.answer(&message) {
            server.send(&answer)?;
        }
    }
}

/// Reads the next message into `message`; false: the stream has ended.
fn read(input: &mut impl Read, message: &mut Vec<u8>) -> io::Result<bool> {
    let mut length = [0; 4];
    if input.read(&mut length[..1])? == 0 {
        return Ok(false);
    }
    input.read_exact(&mut length[1..])?;
    let total = u32::from_ne_bytes(length) as usize;
    if !(40..=MAX_REQUEST).contains(&total) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    message.resize(total, 0);
    message[..4].copy_from_slice(&length);
    input.read_exact(&mut message[4..])?;
    Ok(true)
}
