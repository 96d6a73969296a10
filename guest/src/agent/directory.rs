//! The operations on names: list a directory, make one, move and remove.

use std::ffi::OsString;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use machinen_protocol::frame::HEADER;
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncWrite};

use super::exchange::Exchange;
use super::files;
use super::stream::{Abort, CHUNK};
use super::threads::{FILES, Outgoing};
use crate::file_names;
use crate::reply::{Code, Done, EntryCount, ErrorReply, Stat};
use crate::request;

/// One line of `list`.
#[derive(Serialize)]
struct Line {
    #[serde(serialize_with = "file_names::serialize")]
    name: OsString,
    #[serde(flatten)]
    stat: Stat,
}

/// Sends a line of JSON for each entry of a directory, in no particular order. An entry that vanishes meanwhile is left out.
pub async fn list<R, W>(request: request::List, exchange: &mut Exchange<R, W>) -> Result<EntryCount, Abort>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    FILES.send(exchange, move |outgoing| entries(&request.path, outgoing)).await
}

fn entries(path: &Path, outgoing: &mut Outgoing) -> Result<EntryCount, ErrorReply> {
    let failed = |error: io::Error| ErrorReply::io(path, &error);
    let directory = fs::read_dir(path).map_err(failed)?;
    outgoing.opened().map_err(failed)?;
    let (mut lines, mut entries) = (vec![0; HEADER], 0);
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
            lines = outgoing.hand_on(lines).map_err(failed)?;
            lines.clear();
            lines.resize(HEADER, 0);
        }
    }
    outgoing.hand_on(lines).map_err(failed)?;
    Ok(EntryCount { entries })
}

/// Makes a directory. With `recursive` it also makes the directories above it, and a directory that exists already is no error.
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

/// Removes a file, a link or an empty directory; with `recursive` also a directory with all that is in it. Links are not followed.
pub fn remove(request: &request::Remove) -> Result<Done, ErrorReply> {
    let path = &request.path;
    let failed = |error: io::Error| ErrorReply::io(path, &error);
    let is_directory = fs::symlink_metadata(path).map_err(failed)?.is_dir();
    if is_directory && fs::canonicalize(path).map_err(failed)? == Path::new("/") {
        return Err(ErrorReply::new(Code::BadRequest, "the root directory cannot be removed"));
    }
    let removed = match (is_directory, request.recursive) {
        (false, _) => fs::remove_file(path),
        (true, false) => fs::remove_dir(path),
        (true, true) => fs::remove_dir_all(path),
    };
    removed.map_err(failed)?;
    Ok(Done {})
}
