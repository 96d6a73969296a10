//! The host's end of copies to and from a guest: trees of this host as tar in the data frames of a stream.

use std::ffi::OsString;
use std::process::ExitCode;

use machinen_archive::{Error as ArchiveError, Source, Target};

use crate::error::Error;
use crate::operation::{self, CopyError};

/// The exit code when a guest sends more than the caller takes.
const TOO_LARGE: u8 = 3;

/// `push <request> <follow|link> <path> <name> <exclude>...`: sends a directory's contents, or a file under the name `<name>`, to a guest.
pub fn push(arguments: &[OsString]) -> ExitCode {
    let [request, links, path, name, excludes @ ..] = arguments else { return report(Err(usage())) };
    report(texts(excludes).and_then(|excludes| {
        let (request, name) = (text(request)?, text(name)?);
        let source =
            Source::open(path, &excludes, links == "follow").map_err(|error| Error::io(path.display(), error))?;
        operation::send(&request, |chunks| source.named(&name).pack(chunks))
    }))
}

/// `pull <request> <directory|file> <path> <limit>`: unpacks what a guest sends, up to `<limit>` bytes, into a directory or as one file.
/// The archive is not trusted, and all files belong to the caller.
pub fn pull(arguments: &[OsString]) -> ExitCode {
    let [request, kind, path, limit] = arguments else { return report(Err(usage())) };
    report(text(request).and_then(|request| {
        let limit = text(limit)?.parse().map_err(|_| usage())?;
        let opened = if kind == "file" { Target::file(path) } else { Target::open(path) };
        let target = opened.map_err(|error| Error::io(path.display(), error))?;
        operation::receive(&request, limit, |data| target.for_caller().unpack(data))
    }))
}

fn texts(arguments: &[OsString]) -> Result<Vec<String>, CopyError> {
    arguments.iter().map(text).collect()
}

fn text(argument: &OsString) -> Result<String, CopyError> {
    argument.clone().into_string().map_err(|_| usage())
}

fn usage() -> CopyError {
    ArchiveError::Refused("these are not the arguments of a copy".into()).into()
}

fn report(done: Result<(), CopyError>) -> ExitCode {
    let Err(error) = done else { return ExitCode::SUCCESS };
    eprintln!("{error}");
    if matches!(error, CopyError::TooLarge(_)) { ExitCode::from(TOO_LARGE) } else { ExitCode::FAILURE }
}
