//! Measures where the boot time goes. A mark costs one reading of the clock; the marks are printed only if the kernel command line asks for
//! it.

use std::fmt::Write;
use std::fs;

use rustix::time::{ClockId, Timespec, clock_gettime};

use super::console;

/// On the kernel command line: print the phases once the guest is ready.
const DEBUG_OPTION: &str = "machinen.debug";

/// Names and times since the machine's clock started.
#[derive(Debug)]
pub struct Phases(Vec<(&'static str, Timespec)>);

impl Phases {
    pub fn start() -> Self {
        let mut phases = Self(Vec::with_capacity(16));
        phases.mark("init");
        phases
    }

    /// Marks the end of the phase `name`.
    pub fn mark(&mut self, name: &'static str) {
        self.0.push((name, clock_gettime(ClockId::Monotonic)));
    }

    /// Prints one line with all phases in milliseconds, if asked for. Needs /proc.
    pub fn print_if_asked(&self) {
        let asked =
            fs::read_to_string("/proc/cmdline").is_ok_and(|line| line.split_whitespace().any(|w| w == DEBUG_OPTION));
        if !asked {
            return;
        }
        let mut line = String::from("phases");
        for (name, time) in &self.0 {
            // Writing to a string cannot fail.
            let _ = write!(
                line,
                " {name}={}.{:03}",
                time.tv_sec * 1000 + time.tv_nsec / 1_000_000,
                time.tv_nsec / 1000 % 1000
            );
        }
        console::say(&line);
    }
}
