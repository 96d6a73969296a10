//! The operations on names: what is in a directory, making, moving and removing.

use std::ffi::OsString;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde::Serialize;
use tokio::io::AsyncWrite;
use tokio::task::spawn_blocking;

use super::files;
use super::operation::Exchange;
use super::stream::{Abort, CHUNK};
use crate::frame::Kind;
use crate::names;
use crate::reply::{Archived, Code, Done, ErrorReply, Stat};
use crate::request;

/// One line of `list`.
#[derive(Serialize)]
struct Line {
    #[serde(serialize_with = "names::serialize")]
    name: OsString,
    #[serde(flatten)]
    stat: Stat,
}

/// Sends a line of JSON for everything in a directory, in no order. What vanishes meanwhile is left out.
pub async fn list<R, W>(path: &Path, exchange: &mut Exchange<R, W>) -> Result<Archived, Abort>
where
    W: AsyncWrite + Unpin,
{
    let failed = |error: io::Error| Abort::io(path, &error);
    let directory = fs::read_dir(path).map_err(failed)?;
    exchange.output.send_json(Kind::Started, &Done {}).await?;
    let (mut lines, mut entries) = (Vec::new(), 0);
    for entry in directory {
        let entry = entry.map_err(failed)?;
        let stat = match files::stat(&entry.path(), false) {
            Err(gone) if gone.code == Code::NotFound => continue,
            stat => stat?,
        };
        let line = Line { name: entry.file_name(), stat };
        serde_json::to_writer(&mut lines, &line).map_err(|error| failed(error.into()))?;
        lines.push(b'\n');
        entries += 1;
        if lines.len() >= CHUNK {
            exchange.output.send(Kind::Data, &lines).await?;
            lines.clear();
        }
    }
    exchange.output.send(Kind::Data, &lines).await?;
    exchange.output.send(Kind::Eof, &[]).await?;
    Ok(Archived { entries })
}

/// Makes a directory; with `recursive` also those above it, and one that is there already is fine.
pub fn make(request: &request::Mkdir) -> Result<Done, ErrorReply> {
    let path = &request.path;
    let made = DirBuilder::new()
        .recursive(request.recursive)
        .create(path)
        .and_then(|()| request.mode.map_or(Ok(()), |mode| fs::set_permissions(path, PermissionsExt::from_mode(mode))));
    made.map_err(|error| ErrorReply::io(&request.path, &error))?;
    Ok(Done {})
}

pub fn rename(request: &request::Rename) -> Result<Done, ErrorReply> {
    let (from, to) = (&request.from, &request.to);
    fs::rename(from, to).map_err(|error| ErrorReply::io(format!("{} to {}", from.display(), to.display()), &error))?;
    Ok(Done {})
}

/// Removes a file, a link or an empty directory; with `recursive` a directory with all that is in it, without following a link.
pub async fn remove(request: request::Remove) -> Result<Done, Abort> {
    let request::Remove { path, recursive } = request;
    let removing = spawn_blocking(move || {
        let failed = |error: io::Error| ErrorReply::io(&path, &error);
        if !fs::symlink_metadata(&path).map_err(failed)?.is_dir() {
            return fs::remove_file(&path).map_err(failed);
        }
        if fs::canonicalize(&path).map_err(failed)? == Path::new("/") {
            return Err(ErrorReply::new(Code::BadRequest, "the root directory cannot be removed"));
        }
        if recursive { fs::remove_dir_all(&path) } else { fs::remove_dir(&path) }.map_err(failed)
    });
    // Only a panic could lose the result, and that ends the whole agent.
    removing.await.map_err(|error| Abort::io("remove", &error.into()))??;
    Ok(Done {})
}
