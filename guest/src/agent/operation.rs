//! Serves one stream: reads the request, runs the operation, sends the last frame.

use std::sync::Arc;

use machinen_channel::Opener;
use machinen_protocol::frame::{Frame, Kind};
use serde_json::value::{RawValue, to_raw_value};
use tokio::io::{AsyncRead, AsyncWrite};

use super::context::Context;
use super::exchange::Exchange;
use super::main_command::Ended;
use super::stream::{Abort, split};
use super::threads::FILES;
use super::{
    archive, clock, criu, directory, exec, files, freeze, lifecycle, main_command, rejuvenate, shares, stats, terminal,
    tunnel, watch,
};
use crate::reply::{Done, ErrorReply};
use crate::request::Request;
use crate::system::host_name::{self, Names};

/// Serves one stream of `session` to its end.
pub async fn serve<S: AsyncRead + AsyncWrite>(context: &Arc<Context>, session: Opener, stream: S) {
    let (input, output) = split(stream);
    let mut exchange = Exchange { input, output, session };
    let done = run(context, &mut exchange).await;
    let output = &mut exchange.output;
    // A failure to send the last frame is not reported, because the stream is the only way to report.
    let _ = match done {
        Ok(Outcome::Done(result)) => output.send_json(Kind::End, &result).await,
        Ok(Outcome::Last(result, announced)) => {
            let _ = output.send_json(Kind::End, &result).await;
            output.finish().await;
            context.lifecycle.power_off(announced, &result, exchange.input.closed()).await
        }
        Err(Abort::Reply(error)) => output.send_json(Kind::Error, &error).await,
        Err(Abort::Gone) => Ok(()),
    };
    exchange.output.finish().await;
}

/// How an operation ends.
enum Outcome {
    /// Ends with this result.
    Done(Box<RawValue>),
    /// Ends with this result, and the machine ends too, which is announced on this output.
    Last(Box<RawValue>, lifecycle::Output),
}

async fn run<R, W>(context: &Arc<Context>, exchange: &mut Exchange<R, W>) -> Result<Outcome, Abort>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let request = match exchange.input.next().await? {
        Frame { kind: Kind::Request, payload } => Request::parse(&payload)?,
        Frame { kind, .. } => return Err(Abort::bad(format!("the first frame is {kind:?}, not Request"))),
    };
    if matches!(request, Request::Secrets(_)) {
        exchange.input.wipe();
    }
    if waits_at_gate(&request) {
        tokio::select! {
            biased;
            () = context.gate.passed() => {}
            () = exchange.input.lost() => return Err(Abort::Gone),
        }
        // An operation that the old host asked for is not run in the copy.
        if exchange.session_is_over() {
            return Err(Abort::Gone);
        }
        shares::settle(context).await;
    }
    let result = match request {
        Request::Exec(request) => json(&exec::exec(context, request, exchange).await?),
        Request::Pty(request) => json(&terminal::pty(context, request, exchange).await?),
        Request::Sessions => json(&context.terminals.list()),
        Request::SessionKill(request) => json(&context.terminals.kill(&request.session).await?),
        Request::Main(request) => match main_command::run(context, request, exchange).await? {
            None => json(&Done {}),
            Some(Ended { exit, announced }) => return Ok(Outcome::Last(json(&exit), announced)),
        },
        Request::Write(request) => json(&files::write(request, exchange).await?),
        Request::Read(request) => json(&files::read(request, exchange).await?),
        Request::Push(request) => json(&archive::push(request, exchange).await?),
        Request::Pull(request) => json(&archive::pull(request, exchange).await?),
        Request::Image(request) => json(&archive::image(request, exchange).await?),
        Request::Stat(request) => {
            json(&FILES.run(&mut exchange.input, move || files::stat(&request.path, request.follow)).await??)
        }
        Request::List(request) => json(&directory::list(request, exchange).await?),
        Request::Mkdir(request) => json(&FILES.run(&mut exchange.input, move || directory::make(&request)).await??),
        Request::Rename(request) => json(&FILES.run(&mut exchange.input, move || directory::rename(&request)).await??),
        Request::Remove(request) => json(&FILES.run(&mut exchange.input, move || directory::remove(&request)).await??),
        Request::Secrets(request) => json(&context.secrets().take(request)?),
        Request::Stats => json(&stats::stats(context)?),
        Request::Hostname(request) => {
            let renamed = host_name::rename(&request.hostname, &Names::open(&context.root));
            renamed.map_err(|error| ErrorReply::io("hostname", &error))?;
            json(&Done {})
        }
        Request::Clock(request) => {
            clock::set(request.now_ms).map_err(|error| ErrorReply::io("clock", &error))?;
            json(&Done {})
        }
        Request::Freeze(request) => json(&freeze::freeze(context, &request, exchange).await?),
        Request::Rejuvenate(request) => json(&rejuvenate::rejuvenate(context, request).await?),
        Request::Dump(request) => json(&criu::dump(context, &request, exchange).await?),
        Request::Revive(request) => json(&criu::revive(context, request).await?),
        Request::Detach => json(&main_command::detach(context)?),
        Request::Tunnel(request) => json(&tunnel::tunnel(request, exchange).await?),
        Request::Watch(request) => json(&watch::watch(request, exchange).await?),
        Request::Poweroff => return Ok(Outcome::Last(json(&Done {}), context.lifecycle.output())),
    };
    Ok(Outcome::Done(result))
}

/// Whether a request waits at the gate. `freeze` and `dump` close the gate, `rejuvenate` and `revive` open it; `stats`, `clock` and
/// `poweroff` must work while it is closed.
fn waits_at_gate(request: &Request) -> bool {
    !matches!(
        request,
        Request::Freeze(_)
            | Request::Rejuvenate(_)
            | Request::Dump(_)
            | Request::Revive(_)
            | Request::Stats
            | Request::Clock(_)
            | Request::Poweroff
    )
}

/// The JSON of a result. It cannot fail, because results are plain structures of numbers and strings.
fn json(result: &impl serde::Serialize) -> Box<RawValue> {
    to_raw_value(result).unwrap_or_else(|_| RawValue::NULL.to_owned())
}
