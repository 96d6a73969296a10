//! The operations `pty`, `sessions` and `session-kill`.

use std::pin::pin;
use std::sync::Arc;

use machinen_protocol::frame::Kind;
use tokio::io::{AsyncRead, AsyncWrite};

use super::pty::Pty;
use super::screen::Screen;
use super::session::{Client, Seen, Session, TerminalInput};
use super::size::Size;
use crate::agent::context::Context;
use crate::agent::exchange::Exchange;
use crate::agent::stream::{Abort, CHUNK, FrameReader};
use crate::agent::threads::COMMANDS;
use crate::agent::{attend, clock, command, lookup};
use crate::reply::{Code, ErrorReply, Exit, Started};
use crate::request::{Exec, Pty as Request};

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
    let session = Arc::new(Session::new(name, argv, clock::now_ms(), size, pty, process));
    context.terminals.add(Arc::clone(&session));
    let (context, running) = (Arc::clone(context), Arc::clone(&session));
    tokio::spawn(async move {
        running.run().await;
        // The end of a session is kept for the host to ask for; a command without a name ends with its client.
        if running.name.is_none() {
            context.terminals.remove(&running);
        }
    });
    Ok(session)
}

/// Shows a session to the host and passes on what the host types, until the session ends, the host leaves, or another client takes the
/// session.
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
                    return Err(ErrorReply::new(Code::SessionInUse, "another client has taken the session").into());
                }
            }
        }
    };
    let mut shown = pin!(shown);
    tokio::select! {
        biased;
        () = taken => {}
        shown = &mut shown => return shown,
        abort = attend::handle_frames(input, Some(TerminalInput(Arc::clone(session))), session.as_ref(), &credit) => return Err(abort),
    }
    // Its input is no longer passed on. The host may have stopped reading; it gets the reason once it reads again.
    tokio::select! {
        shown = shown => shown,
        () = input.closed() => Err(Abort::Gone),
    }
}
