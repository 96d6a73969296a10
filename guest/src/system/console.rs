//! The kernel's console, the last resort for messages. Nothing is printed in normal operation, because a serial console is slow.

use std::io::{self, Write};

use machinen_protocol::names::INIT;
use rustix::fs::{Mode, OFlags};

use super::step::Failed;

/// Points descriptors 0, 1 and 2 at the console of the new root. The kernel's own belong to the initramfs, and one of those in any process
/// makes every CRIU dump of it fail ("Can't lookup mount").
pub fn reopen() -> io::Result<()> {
    let console = rustix::fs::open("/dev/console", OFlags::RDWR | OFlags::NOCTTY, Mode::empty())?;
    rustix::stdio::dup2_stdin(&console)?;
    rustix::stdio::dup2_stdout(&console)?;
    rustix::stdio::dup2_stderr(&console)?;
    // Opened while 0 to 2 were taken, so this is never one of them; dropping it closes the spare.
    Ok(())
}

/// Writes one line with init's name, and waits until it has left the machine.
pub fn say(message: &str) {
    // Opened anew, because descriptor 2 may be anything when a boot step has failed.
    let Ok(mut console) = std::fs::OpenOptions::new().write(true).open("/dev/console") else { return };
    // If the console does not take the message, nothing else can report it.
    let _ = console.write_all(format!("{INIT}{message}\n").as_bytes());
    let _ = rustix::termios::tcdrain(&console);
}

/// Prints why this guest cannot go on, and resets the machine.
pub fn give_up(failed: &Failed) -> ! {
    say(&failed.to_string());
    reset()
}

/// Restarts the machine, which ends the VM: the VMM runs with reboots off, and a guest without ACPI has no other way out.
pub fn reset() -> ! {
    // It returns only if the caller may not reset the machine; then this process ends.
    let _ = rustix::system::reboot(rustix::system::RebootCommand::Restart);
    std::process::exit(1)
}
