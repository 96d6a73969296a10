//! The operations on single files, each on a thread. Opening a fifo without a peer fails instead of waiting for the peer.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use machinen_protocol::frame::HEADER;
use tokio::io::{AsyncRead, AsyncWrite};

use super::exchange::Exchange;
use super::stream::{Abort, CHUNK};
use super::threads::{FILES, Incoming, Outgoing};
use crate::reply::{ErrorReply, FileKind, Stat, Transferred};
use crate::request;

/// Permission bits of `st_mode`.
const PERMISSIONS: u32 = 0o7777;

/// Writes a file from the stream. After a failure a file that is new is removed again, unless it was appended to.
pub async fn write<R, W>(request: request::Write, exchange: &mut Exchange<R, W>) -> Result<Transferred, Abort>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    FILES
        .receive(exchange, move |incoming| take(&request, incoming).map_err(|e| ErrorReply::io(&request.path, &e)))
        .await
}

fn take(request: &request::Write, mut incoming: Incoming) -> io::Result<Transferred> {
    let path = &request.path;
    if let Some(parent) = path.parent().filter(|_| request.recursive) {
        fs::create_dir_all(parent)?;
    }
    let (mut file, created) = open_for_writing(request)?;
    let mut written = || {
        if let Some(mode) = request.mode {
            file.set_permissions(PermissionsExt::from_mode(mode))?;
        }
        incoming.opened();
        let mut bytes = 0;
        while let Some(piece) = incoming.piece()? {
            file.write_all(&piece)?;
            bytes += piece.len() as u64;
        }
        Ok(Transferred { bytes })
    };
    let written = written();
    if written.is_err() && created && !request.append {
        // The failure of writing is reported, not one of removing.
        let _ = fs::remove_file(path);
    }
    written
}

/// The file, and whether it is new.
fn open_for_writing(request: &request::Write) -> io::Result<(File, bool)> {
    let mut options = OpenOptions::new();
    options.write(true).append(request.append).custom_flags(libc::O_NONBLOCK);
    match options.clone().create_new(true).open(&request.path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            // With `create`, because the path may be a symbolic link whose target is missing.
            Ok((options.create(true).truncate(!request.append).open(&request.path)?, false))
        }
        opened => Ok((opened?, true)),
    }
}

/// Sends a file, or a part of one.
pub async fn read<R, W>(request: request::Read, exchange: &mut Exchange<R, W>) -> Result<Transferred, Abort>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    FILES.send(exchange, move |outgoing| give(&request, outgoing).map_err(|e| ErrorReply::io(&request.path, &e))).await
}

fn give(request: &request::Read, outgoing: &mut Outgoing) -> io::Result<Transferred> {
    let mut file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&request.path)?;
    // Opening a directory succeeds; reading one does not.
    if file.metadata()?.is_dir() {
        return Err(io::Error::from_raw_os_error(libc::EISDIR));
    }
    if request.offset > 0 {
        file.seek(SeekFrom::Start(request.offset))?;
    }
    outgoing.opened()?;
    let (mut piece, mut bytes) = (Vec::new(), 0);
    let mut left = request.length.unwrap_or(u64::MAX);
    while left > 0 {
        let wanted = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        piece.resize(HEADER + wanted, 0);
        let n = match file.read(&mut piece[HEADER..]) {
            Ok(0) => break,
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        piece.truncate(HEADER + n);
        piece = outgoing.hand_on(piece)?;
        bytes += n as u64;
        left -= n as u64;
    }
    Ok(Transferred { bytes })
}

/// Describes what is at `path`. With `follow`, a symbolic link stands for its target.
pub fn stat(path: &Path, follow: bool) -> Result<Stat, ErrorReply> {
    let failed = |error: io::Error| ErrorReply::io(path, &error);
    let found = if follow { fs::metadata(path) } else { fs::symlink_metadata(path) }.map_err(failed)?;
    let kind = match found.file_type() {
        kind if kind.is_file() => FileKind::File,
        kind if kind.is_dir() => FileKind::Directory,
        kind if kind.is_symlink() => FileKind::Symlink,
        _ => FileKind::Other,
    };
    let target = (kind == FileKind::Symlink).then(|| fs::read_link(path)).transpose().map_err(failed)?;
    Ok(Stat {
        kind,
        size: found.len(),
        mode: found.mode() & PERMISSIONS,
        mtime_ms: found.mtime().saturating_mul(1000).saturating_add(found.mtime_nsec() / 1_000_000),
        uid: found.uid(),
        gid: found.gid(),
        target,
    })
}
