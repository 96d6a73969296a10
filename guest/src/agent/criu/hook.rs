//! CRIU's action script, which is this program itself. CRIU calls it after dumping and before it lets the processes go.

use std::env;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use super::images;

const ACTION: &str = "CRTOOLS_SCRIPT_ACTION";
const IMAGES: &str = "CRTOOLS_IMAGE_DIR";

/// The name, in the images' directory, under which the `n`th file is kept that CRIU gave a temporary name.
pub fn kept(n: usize) -> String {
    format!("remap.{n}")
}

/// Whether CRIU has started this program.
pub fn is_called() -> bool {
    env::var_os(ACTION).is_some()
}

/// Links the files whose temporary names CRIU is about to remove. A failure fails the dump.
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
