//! Commands in terminals: the operations `pty`, `sessions` and `session-kill`.

mod pty;
mod screen;
mod session;

use std::num::NonZeroU16;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::io::{AsyncRead, AsyncWrite};

use self::pty::Pty;
use self::screen::Screen;
use self::session::{Client, Keyboard, Seen, Session};
use super::operation::Exchange;
use super::stream::{Abort, CHUNK};
use super::{Context, command, exec};
use crate::frame::Kind;
use crate::reply::{Code, Done, ErrorReply, Exit, SessionInfo, SessionList, Started};
use crate::request::{Exec, Pty as Request};

/// Sessions of one machine, those that have ended included.
const MOST: usize = 64;

/// Of a terminal, in cells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    pub columns: NonZeroU16,
    pub rows: NonZeroU16,
}

impl Size {
    pub fn new(columns: u16, rows: u16) -> Option<Self> {
        Some(Self { columns: NonZeroU16::new(columns)?, rows: NonZeroU16::new(rows)? })
    }
}

/// Every terminal there is: of commands that run, and of sessions that have ended and whose end nobody has seen.
#[derive(Default)]
pub struct Terminals(Mutex<Vec<Arc<Session>>>);

impl Terminals {
    fn all(&self) -> MutexGuard<'_, Vec<Arc<Session>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, name: &str) -> Option<Arc<Session>> {
        self.all().iter().find(|session| session.name.as_deref() == Some(name)).cloned()
    }

    fn remove(&self, session: &Arc<Session>) {
        self.all().retain(|other| !Arc::ptr_eq(other, session));
    }

    /// Oldest first.
    pub fn list(&self) -> SessionList {
        SessionList { sessions: self.infos() }
    }

    fn infos(&self) -> Vec<SessionInfo> {
        self.all().iter().filter_map(|session| session.info()).collect()
    }

    /// Ends a session; when this returns nothing of it is left.
    pub async fn kill(&self, name: &str) -> Result<Done, ErrorReply> {
        let Some(session) = self.find(name) else {
            return Err(ErrorReply::new(Code::SessionNotFound, format!("there is no session {name:?}")));
        };
        session.hang_up();
        session.ended().await;
        self.remove(&session);
        Ok(Done {})
    }

    /// Why the processes cannot be saved without the agent: it holds a terminal's other end.
    pub fn refuse_open(&self) -> Result<(), ErrorReply> {
        let all = self.all();
        let Some(open) = all.iter().find(|session| session.exit().is_none()) else { return Ok(()) };
        let pid = open.pid().as_raw_pid();
        let what = match &open.name {
            Some(name) => format!("terminal session {name:?} is open"),
            None => format!("process {pid} has a terminal that is open"),
        };
        Err(ErrorReply::new(
            Code::Criu,
            format!("{what}: CRIU cannot save a terminal without the agent, which holds it"),
        ))
    }

    /// Makes room for one more session.
    fn make_room(&self) -> Result<(), ErrorReply> {
        let mut all = self.all();
        if all.iter().filter(|session| session.name.is_some()).count() < MOST {
            return Ok(());
        }
        match all.iter().position(|session| session.exit().is_some()) {
            Some(ended) => drop(all.remove(ended)),
            None => return Err(ErrorReply::new(Code::Busy, format!("there are {MOST} sessions already"))),
        }
        Ok(())
    }
}

/// Runs a command in a terminal, or joins a session, until the command ends. A command without a session ends with its stream.
pub async fn pty<R, W>(context: &Arc<Context>, request: Request, exchange: &mut Exchange<R, W>) -> Result<Exit, Abort>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let Some(size) = Size::new(request.columns, request.rows) else { return Err(Abort::bad("no such size")) };
    let steal = request.steal;
    // Nothing is awaited from here until somebody is attached: a name cannot be taken twice.
    let session = match request.session.as_deref().and_then(|name| context.terminals.find(name)) {
        Some(session) => session,
        None => start(context, request, size)?,
    };
    let (replay, client) = session.join(size, steal)?;
    let attended = attend(&session, &replay, client, exchange).await;
    if attended.is_ok() {
        context.terminals.remove(&session);
    } else if session.name.is_none() && !exchange.session_is_over() {
        session.hang_up();
        session.ended().await;
    }
    attended
}

fn start(context: &Arc<Context>, request: Request, size: Size) -> Result<Arc<Session>, Abort> {
    let Request { argv, cwd, env, secrets, session: name, user, .. } = request;
    let mut size = size;
    if name.is_some() {
        context.terminals.make_room()?;
        size = Screen::limit(size);
    }
    let mut command = Exec { argv, env, cwd, user, stdin: true, secrets };
    let config = context.config().clone();
    if command.argv.is_empty() {
        command.argv = command::login_shell(&config, &command);
    }
    let pty = Pty::open(size).map_err(|error| Abort::io("terminal", &error))?;
    let process = command::start_in(pty.slave(), &config, &context.secrets(), &command)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
    let created_ms = u64::try_from(now).unwrap_or(u64::MAX);
    let session = Arc::new(Session::new(name, command.argv, created_ms, size, pty, process));
    context.terminals.all().push(Arc::clone(&session));
    let (context, running) = (Arc::clone(context), Arc::clone(&session));
    tokio::spawn(async move {
        running.run().await;
        // How a session ended is kept for who asks; of another command there is nobody left to ask.
        if running.name.is_none() {
            context.terminals.remove(&running);
        }
    });
    Ok(session)
}

/// Shows a session to the host and passes on what it types, until the session ends, either leaves or somebody else takes it.
async fn attend<R, W>(
    session: &Arc<Session>,
    replay: &[u8],
    mut client: Client,
    exchange: &mut Exchange<R, W>,
) -> Result<Exit, Abort>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let Exchange { input, output, .. } = exchange;
    let credit = exec::Credit::default();
    let taken = client.taken();
    let shown = async {
        output.send_json(Kind::Started, &Started { pid: session.pid().as_raw_pid().cast_unsigned() }).await?;
        for piece in replay.chunks(CHUNK) {
            output.send(Kind::Stdout, piece).await?;
        }
        loop {
            let seen = tokio::select! {
                seen = client.next() => seen,
                credit = credit.due() => {
                    output.send(Kind::Credit, &credit).await?;
                    continue;
                }
            };
            match seen {
                Seen::Output(bytes) => output.send(Kind::Stdout, &bytes).await?,
                Seen::Ended(exit) => return Ok(exit),
                Seen::Taken => {
                    return Err(ErrorReply::new(Code::SessionInUse, "somebody else has taken the session").into());
                }
            }
        }
    };
    let mut shown = pin!(shown);
    tokio::select! {
        biased;
        () = taken => {}
        shown = &mut shown => return shown,
        abort = exec::obey(input, Some(Keyboard(Arc::clone(session))), session.as_ref(), &credit) => return Err(abort),
    }
    // The host types into it no more. It may have stopped reading: it is told why once it reads again.
    tokio::select! {
        shown = shown => shown,
        () = input.closed() => Err(Abort::Gone),
    }
}
