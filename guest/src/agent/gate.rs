//! The gate at which operations wait while the machine is being copied and, in a copy, until that has become a machine of its own. A
//! command that is started into the frozen control group would freeze before its exec, for which the agent waits; so commands wait before
//! they are started.

use tokio::sync::watch;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Open,
    /// A freeze holds the gate closed.
    Held,
    /// The session of the freeze has ended, so this machine is a copy.
    Restored,
}

/// Says whether operations may begin.
#[derive(Debug)]
pub struct Gate(watch::Sender<State>);

impl Gate {
    pub fn new() -> Self {
        Self(watch::Sender::new(State::Open))
    }

    /// A gate for a machine that is a copy from its start.
    pub fn closed() -> Self {
        Self(watch::Sender::new(State::Restored))
    }

    /// Waits until the gate is open.
    pub async fn passed(&self) {
        // Waiting cannot fail, because the gate itself owns the sender.
        let _ = self.0.subscribe().wait_for(|state| *state == State::Open).await;
    }

    /// Closes the gate. Returns false if it was closed already.
    #[must_use]
    pub fn hold(&self) -> bool {
        self.0.send_if_modified(|state| {
            let open = *state == State::Open;
            if open {
                *state = State::Held;
            }
            open
        })
    }

    /// Must be called at every new session. A freeze that is still held then belongs to an older session, so the machine is a copy.
    pub fn new_session(&self) {
        self.0.send_if_modified(|state| {
            let held = *state == State::Held;
            if held {
                *state = State::Restored;
            }
            held
        });
    }

    /// Whether this machine is a copy that has not been rejuvenated yet.
    pub fn is_restored(&self) -> bool {
        *self.0.borrow() == State::Restored
    }

    /// Opens the gate for all operations that wait.
    pub fn open(&self) {
        self.0.send_replace(State::Open);
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::{Context, Waker};

    use super::*;

    fn lets_through(gate: &Gate) -> bool {
        pin!(gate.passed()).poll(&mut Context::from_waker(Waker::noop())).is_ready()
    }

    #[test]
    fn is_held_by_one_freeze_at_a_time() {
        let gate = Gate::new();
        assert!(lets_through(&gate));
        assert!(gate.hold());
        assert!(!lets_through(&gate));
        assert!(!gate.hold());
        gate.open();
        assert!(lets_through(&gate));
        assert!(gate.hold());
    }

    #[test]
    fn a_session_after_the_freeze_makes_a_copy_of_it_until_it_is_opened() {
        let gate = Gate::new();
        gate.new_session();
        assert!(!gate.is_restored());
        assert!(gate.hold());
        assert!(!gate.is_restored());
        for _ in 0..2 {
            gate.new_session();
            assert!(gate.is_restored());
            assert!(!gate.hold());
            assert!(!lets_through(&gate));
        }
        gate.open();
        assert!(!gate.is_restored());
        assert!(lets_through(&gate));
    }

    #[tokio::test]
    async fn wakes_those_who_wait() {
        let gate = Gate::new();
        assert!(gate.hold());
        tokio::join!(gate.passed(), gate.passed(), async { gate.open() });
    }
}
