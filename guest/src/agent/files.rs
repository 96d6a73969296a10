//! The operations on single files. They block the agent while the kernel works, which for the page cache is not long; what could
//! wait for ever (a fifo without a peer) is opened so that it fails instead.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use tokio::io::{AsyncRead, AsyncWrite};

use super::operation::Exchange;
use super::stream::{Abort, CHUNK, Chunk};
use crate::frame::Kind;
use crate::reply::{Done, ErrorReply, FileKind, Stat, Transferred};
use crate::request;

/// Permission bits of `st_mode`.
const PERMISSIONS: u32 = 0o7777;

/// Writes a file from the stream. When that fails, a file that was not there before is removed again, unless it was appended to.
pub async fn write<R, W>(request: &request::Write, exchange: &mut Exchange<R, W>) -> Result<Transferred, Abort>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let path = &request.path;
    let failed = |error: io::Error| Abort::io(&request.path, &error);
    if let Some(parent) = path.parent().filter(|_| request.recursive) {
        fs::create_dir_all(parent).map_err(failed)?;
    }
    let (mut file, created) = open_for_writing(request).map_err(failed)?;
    let written = async {
        if let Some(mode) = request.mode {
            file.set_permissions(PermissionsExt::from_mode(mode)).map_err(failed)?;
        }
        exchange.output.send_json(Kind::Started, &Done {}).await?;
        let mut bytes = 0;
        while let Some(piece) = exchange.input.body().await? {
            file.write_all(&piece).map_err(failed)?;
            bytes += piece.len() as u64;
        }
        Ok(Transferred { bytes })
    }
    .await;
    if written.is_err() && created && !request.append {
        // The failure itself is what gets reported.
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
            // `create` for a symbolic link whose target is missing.
            Ok((options.create(true).truncate(!request.append).open(&request.path)?, false))
        }
        opened => Ok((opened?, true)),
    }
}

/// Sends a file, or a part of one.
pub async fn read<R, W>(request: &request::Read, exchange: &mut Exchange<R, W>) -> Result<Transferred, Abort>
where
    W: AsyncWrite + Unpin,
{
    let failed = |error: io::Error| Abort::io(&request.path, &error);
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&request.path);
    let mut file = opened.map_err(failed)?;
    // Opening a directory succeeds; reading one does not.
    if file.metadata().map_err(failed)?.is_dir() {
        return Err(failed(io::Error::from_raw_os_error(libc::EISDIR)));
    }
    if request.offset > 0 {
        file.seek(SeekFrom::Start(request.offset)).map_err(failed)?;
    }
    exchange.output.send_json(Kind::Started, &Done {}).await?;
    let mut chunk = Chunk::new();
    let mut left = request.length.unwrap_or(u64::MAX);
    let mut bytes = 0;
    while left > 0 {
        let wanted = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        let n = match file.read(&mut chunk.payload()[..wanted]) {
            Ok(0) => break,
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(failed(error)),
        };
        exchange.output.send_chunk(&mut chunk, Kind::Data, n).await?;
        bytes += n as u64;
        left -= n as u64;
    }
    exchange.output.send(Kind::Eof, &[]).await?;
    Ok(Transferred { bytes })
}

/// Describes what is at `path`; with `follow` what it leads to, if it is a symbolic link.
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
