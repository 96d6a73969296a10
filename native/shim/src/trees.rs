//! The host's end of copies to and from a guest: trees of this host as tar, in the data frames of a stream.

use std::ffi::OsString;
use std::process::ExitCode;

use machinen_archive::{Error, Source, Target};

use crate::operation;

/// `push <request> <path> <name> <exclude>...`: a directory's contents, or a file by that name, sent to a guest.
pub fn push(arguments: &[OsString]) -> ExitCode {
    report(texts(arguments).and_then(|texts| {
        let [request, path, name, excludes @ ..] = texts.as_slice() else { return Err(usage()) };
        let source = Source::open(path, excludes).map_err(|error| Error::Io { path: path.clone(), error })?;
        operation::send(request, |pieces| source.named(name).pack(pieces))
    }))
}

/// `pull <request> <directory>`: what a guest sends is not trusted, and belongs to who calls this.
pub fn pull(arguments: &[OsString]) -> ExitCode {
    report(texts(arguments).and_then(|texts| {
        let [request, directory] = texts.as_slice() else { return Err(usage()) };
        let target = Target::open(directory).map_err(|error| Error::Io { path: directory.clone(), error })?;
        operation::receive(request, |data| target.for_caller().unpack(data))
    }))
}

fn texts(arguments: &[OsString]) -> Result<Vec<String>, Error> {
    arguments.iter().map(|argument| argument.clone().into_string().map_err(|_| usage())).collect()
}

fn usage() -> Error {
    Error::Refused("these are not the arguments of a copy".into())
}

fn report(done: Result<u64, Error>) -> ExitCode {
    match done {
        Ok(_) => ExitCode::SUCCESS,
        Err(failed) => {
            eprintln!("{failed}");
            ExitCode::FAILURE
        }
    }
}
