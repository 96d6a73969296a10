//! The operation `exec`.

use std::sync::atomic::AtomicBool;

use machinen_protocol::frame::Kind;
use tokio::io::{AsyncRead, AsyncWrite};

use super::context::Context;
use super::exchange::Exchange;
use super::stream::{Abort, Chunk};
use super::{attend, command};
use crate::reply::Exit;
use crate::request::Exec;

/// Runs a command to its end. If the stream ends earlier, the command's process group is killed.
pub async fn exec<R, W>(context: &Context, request: Exec, exchange: &mut Exchange<R, W>) -> Result<Exit, Abort>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let running = command::start(context, request, &mut exchange.input).await?;
    attend::attend(running, exchange, &AtomicBool::new(false), &mut Nowhere).await
}

/// Drops the output of a command whose stream is lost: the command must not wait for a reader.
struct Nowhere;

impl attend::Output for Nowhere {
    async fn send_chunk(&mut self, _: &mut Chunk, _: Kind, _: usize) -> Result<(), Abort> {
        Ok(())
    }
}
