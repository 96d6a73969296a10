//! The operations `pty`, `sessions` and `session-kill`.

use std::collections::BTreeSet;
use std::num::NonZeroU16;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;

use super::pty::Pty;
use super::screen::Screen;
use super::session::{Client, Keyboard, Seen, Session};
use crate::agent::context::Context;
use crate::agent::exchange::Exchange;
use crate::agent::stream::{Abort, CHUNK, FrameReader};
use crate::agent::threads::COMMANDS;
use crate::agent::{attend, command, lookup};
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
pub struct Terminals {
    all: Mutex<Vec<Arc<Session>>>,
    /// Names of sessions whose commands are being started.
    starting: watch::Sender<BTreeSet<String>>,
}

/// A name that nobody else can start a session by.
struct Reserved<'a> {
    name: String,
    terminals: &'a Terminals,
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        self.terminals.starting.send_if_modified(|names| names.remove(&self.name));
    }
}

impl Terminals {
    fn all(&self) -> MutexGuard<'_, Vec<Arc<Session>>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, name: &str) -> Option<Arc<Session>> {
        self.all().iter().find(|session| session.name.as_deref() == Some(name)).cloned()
    }

    /// A session, or its name while it is being started here. Waits until nobody else starts it.
    async fn find_or_reserve(&self, name: &str) -> (Option<Arc<Session>>, Option<Reserved<'_>>) {
        // It cannot fail: the sender is this table's own.
        let _ = self.starting.subscribe().wait_for(|names| !names.contains(name)).await;
        if let Some(session) = self.find(name) {
            return (Some(session), None);
        }
        self.starting.send_if_modified(|names| names.insert(name.to_owned()));
        (None, Some(Reserved { name: name.to_owned(), terminals: self }))
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

    /// Makes room for the sessions that are being started.
    fn make_room(&self) -> Result<(), ErrorReply> {
        let mut all = self.all();
        if all.iter().filter(|session| session.name.is_some()).count() + self.starting.borrow().len() <= MOST {
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
    let (found, reserved) = match &request.session {
        Some(name) => tokio::select! {
            biased;
            found = context.terminals.find_or_reserve(name) => found,
            () = exchange.input.lost() => return Err(Abort::Gone),
        },
        None => (None, None),
    };
    let session = match found {
        Some(session) => session,
        None => start(context, request, size, &mut exchange.input).await?,
    };
    let (replay, client) = session.join(size, steal)?;
    drop(reserved);
    let attended = attend(&session, &replay, client, exchange).await;
    if attended.is_ok() {
        context.terminals.remove(&session);
    } else if session.name.is_none() && !exchange.session_is_over() {
        session.hang_up();
        session.ended().await;
    }
    attended
}

async fn start<R: AsyncRead + Unpin>(
    context: &Arc<Context>,
    request: Request,
    size: Size,
    input: &mut FrameReader<R>,
) -> Result<Arc<Session>, Abort> {
    let Request { argv, cwd, env, secrets, session: name, user, .. } = request;
    let mut size = size;
    if name.is_some() {
        context.terminals.make_room()?;
        size = Screen::limit(size);
    }
    let mut command = Exec { argv, env, cwd, user, stdin: true, secrets };
    if command.argv.is_empty() {
        let (config, asked) = (context.config().clone(), command.clone());
        command.argv = COMMANDS.run(input, move || lookup::login_shell(&config, &asked)).await?;
    }
    let argv = command.argv.clone();
    let failed = |error| Abort::io("terminal", &error);
    let pty = Pty::open(size).map_err(failed)?;
    let slave = pty.slave().try_clone_to_owned().map_err(failed)?;
    let process = command::start_in(slave, context, command, input).await?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
    let created_ms = u64::try_from(now).unwrap_or(u64::MAX);
    let session = Arc::new(Session::new(name, argv, created_ms, size, pty, process));
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
    let credit = attend::Credit::default();
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
        abort = attend::obey(input, Some(Keyboard(Arc::clone(session))), session.as_ref(), &credit) => return Err(abort),
    }
    // The host types into it no more. It may have stopped reading: it is told why once it reads again.
    tokio::select! {
        shown = shown => shown,
        () = input.closed() => Err(Abort::Gone),
    }
}
