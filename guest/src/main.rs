//! `/init` of the initramfs: `init` until the root is in place, `agent` from then on.

use std::process::ExitCode;

use machinen_guest::agent::{self, criu_hook};
use machinen_guest::init;
use machinen_guest::system::console::give_up;
use machinen_protocol::names::INIT;

/// Returns only if it is not pid 1.
fn main() -> ExitCode {
    // CRIU starts this program as its action script.
    if criu_hook::is_called() {
        return criu_hook::main();
    }
    if std::process::id() != 1 {
        eprintln!("{INIT}runs as pid 1 of a machinen guest only");
        return ExitCode::FAILURE;
    }
    match init::boot(agent::run) {
        Ok(never) => match never {},
        Err(failed) => give_up(&failed),
    }
}
