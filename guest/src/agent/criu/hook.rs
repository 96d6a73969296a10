//! What CRIU calls between dumping and letting the processes go: this program itself, as its action script.

use std::env;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use super::images;

const ACTION: &str = "CRTOOLS_SCRIPT_ACTION";
const IMAGES: &str = "CRTOOLS_IMAGE_DIR";

/// Where the `n`th name CRIU made is kept, beside the images.
pub fn kept(n: usize) -> String {
    format!("remap.{n}")
}

/// Whether it was CRIU that started this program.
pub fn is_called() -> bool {
    env::var_os(ACTION).is_some()
}

/// Keeps the files CRIU is about to remove the names of. A failure fails the dump.
pub fn main() -> ExitCode {
    if env::var_os(ACTION).is_some_and(|action| action != "post-dump") {
        return ExitCode::SUCCESS;
    }
    match keep() {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn keep() -> io::Result<()> {
    let directory = PathBuf::from(env::var_os(IMAGES).unwrap_or_default());
    for (n, name) in images::link_remaps(&directory)?.into_iter().enumerate() {
        fs::hard_link(name, directory.join(kept(n)))?;
    }
    Ok(())
}
