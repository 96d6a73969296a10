//! The operation `watch`: reports changes below a directory, by inotify(7). It reads directories, which may block, so it has a thread of
//! its own.

mod changes;
mod directories;
mod tree;

use machinen_protocol::frame::Kind;
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;

use self::changes::Lines;
use self::tree::Tree;
use super::exchange::Exchange;
use super::stream::Abort;
use super::threads::{self, WATCHES};
use crate::reply::Done;
use crate::request::Watch;

/// Sends changes until the directory is gone.
pub async fn watch<R, W>(request: Watch, exchange: &mut Exchange<R, W>) -> Result<Done, Abort>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let Exchange { input, output, .. } = exchange;
    let tree = WATCHES.run(input, move || Tree::open(&request)).await??;
    output.send_json(Kind::Started, &Done {}).await?;
    let (pieces, mut leaving) = mpsc::channel(1);
    // Dropping this end of the pipe wakes the thread.
    let (gone, _wanted) = pipe_with(PipeFlags::CLOEXEC).map_err(|errno| Abort::io("watch", &errno.into()))?;
    let watching = WATCHES.start(move || tree.follow(&gone, &mut Lines::new(pieces))).await?;
    let carrying = async {
        while let Some(piece) = leaving.recv().await {
            output.send(Kind::Data, &piece).await?;
        }
        Ok::<_, Abort>(())
    };
    tokio::select! {
        () = input.closed() => return Err(Abort::Gone),
        carried = carrying => carried?,
    }
    threads::finished(watching).await??;
    output.send(Kind::Eof, &[]).await?;
    Ok(Done {})
}
