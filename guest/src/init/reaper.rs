//! What pid 1 does after it has started the agent: it reaps orphans.

use rustix::process::{WaitOptions, WaitStatus, wait};

use crate::system::console::{reset, say};

/// Reaps orphans until the agent ends, and resets the machine then: without the agent, the host cannot reach it.
pub fn reap_until_agent_ends(agent: i32) -> ! {
    loop {
        match wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if pid.as_raw_pid() == agent => {
                say(&format!("agent: {}", describe(status)));
                reset()
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                say(&format!("wait: {error}"));
                reset()
            }
        }
    }
}

fn describe(status: WaitStatus) -> String {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => format!("exited with code {code}"),
        (_, Some(signal)) => format!("killed by signal {signal}"),
        _ => format!("ended with status {status:?}"),
    }
}
