//! The kernel's console: the last resort for messages. Nothing is printed in normal operation, a serial character is slow.

use std::io::{self, Write};

use machinen_protocol::names::INIT;
use rustix::fs::{Mode, OFlags};

use super::step::Failed;

/// Points descriptors 0, 1 and 2 at the console of the new root. The ones the kernel gave belong to the initramfs; one of those in
/// any process makes every CRIU dump of it fail ("Can't lookup mount").
pub fn reopen() -> io::Result<()> {
    let console = rustix::fs::open("/dev/console", OFlags::RDWR | OFlags::NOCTTY, Mode::empty())?;
    rustix::stdio::dup2_stdin(&console)?;
    rustix::stdio::dup2_stdout(&console)?;
    rustix::stdio::dup2_stderr(&console)?;
    // Opened while 0 to 2 were taken, so this is never one of them; dropping it closes the spare.
    Ok(())
}

/// Writes one line, in init's name, and waits until it has left the machine.
pub fn say(message: &str) {
    // Opened afresh: when a boot step failed, descriptor 2 may be anything.
    let Ok(mut console) = std::fs::OpenOptions::new().write(true).open("/dev/console") else { return };
    // Nothing can be done about a console that does not take the message.
    let _ = console.write_all(format!("{INIT}{message}\n").as_bytes());
    let _ = rustix::termios::tcdrain(&console);
}

/// Says why this guest cannot go on, and resets it.
pub fn give_up(failed: &Failed) -> ! {
    say(&failed.to_string());
    reset()
}

/// Restarts the machine, which ends the VM: the VMM runs with reboots off, and a guest without ACPI has no other way out.
pub fn reset() -> ! {
    // It returns only where the caller may not do it, and then there is nothing better than to end.
    let _ = rustix::system::reboot(rustix::system::RebootCommand::Restart);
    std::process::exit(1)
}
