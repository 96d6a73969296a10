//! One stream: its request, the operation, the last frame.

use std::sync::Arc;

use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};

use super::stream::{Abort, FrameReader, FrameWriter, split};
use super::{Context, archive, command, exec, files, main_command, stats};
use crate::frame::{Frame, Kind};
use crate::init::late;
use crate::reply::{Done, ErrorReply};
use crate::request::Request;

/// What an operation has of its stream.
pub struct Exchange<R, W> {
    pub input: FrameReader<R>,
    pub output: FrameWriter<W>,
}

/// Serves one stream to its end.
pub async fn serve<S: AsyncRead + AsyncWrite>(context: &Arc<Context>, stream: S) {
    let (input, output) = split(stream);
    let mut exchange = Exchange { input, output };
    let done = run(context, &mut exchange).await;
    let output = &mut exchange.output;
    // The stream is all there is to report a failure to, so a failure to send is not reported.
    let _ = match done {
        Ok(Outcome::Done(result)) => output.send_json(Kind::End, &result).await,
        Ok(Outcome::Last(result)) => {
            let _ = output.send_json(Kind::End, &result).await;
            output.finish().await;
            context.lifecycle.power_off(context.lifecycle.output(), &result, exchange.input.closed()).await
        }
        Err(Abort::Reply(error)) => output.send_json(Kind::Error, &error).await,
        Err(Abort::Gone) => Ok(()),
    };
    exchange.output.finish().await;
}

/// How an operation ends.
pub enum Outcome {
    /// With this result.
    Done(Value),
    /// With this result, and the machine with it.
    Last(Value),
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
    let result = match request {
        Request::Exec(request) => json(&exec::exec(&context.config, request, exchange).await?),
        Request::Main(request) => return main_command::run(context, request, exchange).await,
        Request::Write(request) => json(&files::write(&request, exchange).await?),
        Request::Read(request) => json(&files::read(&request, exchange).await?),
        Request::Push(request) => json(&archive::push(&request, exchange).await?),
        Request::Pull(request) => json(&archive::pull(request, exchange).await?),
        Request::Stat(request) => json(&files::stat(&request.path)?),
        Request::Stats => json(&stats::stats(&context.lifecycle)?),
        Request::Kill(request) => {
            command::kill(request.pid);
            json(&Done {})
        }
        Request::Hostname(request) => {
            let name = request.hostname;
            late::set_hostname(&name).map_err(|error| ErrorReply::io("hostname", &error))?;
            json(&Done {})
        }
        Request::Poweroff => return Ok(Outcome::Last(json(&Done {}))),
    };
    Ok(Outcome::Done(result))
}

/// Results are plain structures of numbers and strings, which always have a JSON form.
pub fn json(result: &impl serde::Serialize) -> Value {
    serde_json::to_value(result).unwrap_or(Value::Null)
}
