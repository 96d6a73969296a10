//! `machinen-share`: serves the shared directories of one VM to its guest. The shim starts it with a stream to the guest as descriptor 3 and its
//! control connection as descriptor 4; it ends when either ends.

use std::fs::File;
use std::io::{self, BufReader};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::exit;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use machinen_protocol::errno;
use machinen_share::control::{Control, Line};
use machinen_share::plan::Plan;
use machinen_share::reply::words;
use machinen_share::server::Server;
use machinen_share::share::Refused;
use machinen_share::state::Lost;
use machinen_share::stream;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

const STREAM: RawFd = 3;
const CONTROL: RawFd = 4;
/// How long the guest may believe what it was told, where it is told of changes. Not for ever, for those that make no event (`coverage`).
const VALID: Duration = Duration::from_secs(3600);
/// How much of the guest's requests is read at once.
const BUFFER: usize = 256 * 1024;

/// What the shim asks for later.
#[derive(Deserialize)]
#[serde(tag = "op", rename_all = "camelCase")]
enum Operation {
    Save,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Answer {
    Started { ok: bool, confinement: Vec<&'static str>, lost: Vec<Lost> },
    Refused { ok: bool, code: String, message: String },
    Done { ok: bool },
}

impl From<Refused> for Answer {
    fn from(refused: Refused) -> Self {
        let message = format!("{}: {}", refused.what, words(refused.errno));
        Self::Refused { ok: false, code: errno::text(refused.errno.raw_os_error()), message }
    }
}

fn main() {
    let (Some(guest), Some(control)) = (descriptor(STREAM), descriptor(CONTROL)) else {
        eprintln!(
            "usage: machinen-share, with a stream to the guest as descriptor 3 and the shim's control connection as descriptor 4"
        );
        exit(2);
    };
    // A thread that panics would leave a request without an answer, and its caller in the guest waiting.
    let told = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        told(panic);
        std::process::abort();
    }));
    let mut control = Control::new(UnixStream::from(control));
    if let Err(error) = run(File::from(guest), &mut control) {
        eprintln!("machinen-share: {error}");
        exit(1);
    }
}

fn run(guest: File, control: &mut Control) -> io::Result<()> {
    let Some(line) = control.line()? else { return Ok(()) };
    let input = BufReader::with_capacity(BUFFER, guest.try_clone()?);
    let server = match start(&line, guest) {
        Ok((server, answer)) => {
            control.answer(&answer)?;
            Arc::new(server)
        }
        Err(refused) => {
            control.answer(&Answer::from(refused))?;
            exit(1);
        }
    };
    let serving = Arc::clone(&server);
    std::thread::Builder::new().spawn(move || {
        let code = match stream::serve(&serving, input) {
            Ok(()) => 0,
            Err(error) => {
                eprintln!("machinen-share: the guest's stream: {error}");
                1
            }
        };
        exit(code);
    })?;
    while let Some(line) = control.line()? {
        let answer = operate(&server, line);
        control.answer(&answer)?;
    }
    Ok(())
}

/// Opens what is shared, then gives up what is not needed for it.
fn start(line: &Line, guest: File) -> Result<(Server, Answer), Refused> {
    let plan = Plan::parse(&line.text)?;
    let shares = plan.open()?;
    let refused = |errno| Refused { errno, what: "the server".to_owned() };
    let server = Server::new(shares, VALID, Arc::new(Mutex::new(guest))).map_err(refused)?;
    let lost = match &plan.state {
        Some(path) => load(&server, path).map_err(|error| Refused {
            errno: Errno::from_io_error(&error).unwrap_or(Errno::INVAL),
            what: format!("{}: {error}", path.display()),
        })?,
        None => Vec::new(),
    };
    let confinement = server.confine().map_err(|error| Refused {
        errno: Errno::from_io_error(&error).unwrap_or(Errno::PERM),
        what: format!("the server cannot be confined: {error}"),
    })?;
    Ok((server, Answer::Started { ok: true, confinement, lost }))
}

fn load(server: &Server, path: &Path) -> io::Result<Vec<Lost>> {
    server.load(BufReader::new(File::open(path)?))
}

/// What the shim asks for while the guest is served.
fn operate(server: &Server, line: Line) -> Answer {
    let refused = |errno, what: &str| Answer::from(Refused { errno, what: what.to_owned() });
    match (serde_json::from_slice(&line.text), line.file) {
        (Ok(Operation::Save), Some(file)) => match server.save(File::from(file)) {
            Ok(()) => Answer::Done { ok: true },
            Err(error) => refused(Errno::from_io_error(&error).unwrap_or(Errno::IO), "the state"),
        },
        (Ok(Operation::Save), None) => refused(Errno::BADF, "save"),
        (Err(error), _) => refused(Errno::INVAL, &error.to_string()),
    }
}

/// A descriptor that this process was started with.
fn descriptor(number: RawFd) -> Option<OwnedFd> {
    // SAFETY: asks for the descriptor's flags; a number that is not open is an error.
    if unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
        return None;
    }
    // SAFETY: it is open, and nothing else in this process owns it: it was opened before the process began.
    Some(unsafe { OwnedFd::from_raw_fd(number) })
}
