//! The terminals of this machine.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use super::session::Session;
use crate::reply::{Code, Done, ErrorReply, SessionInfo, SessionList};

/// How many sessions a machine has at most, with those that have ended.
const MOST: usize = 64;

/// Every terminal: those of running commands, and those of ended sessions whose end no client has seen yet.
#[derive(Default)]
pub struct Terminals {
    all: Mutex<Vec<Arc<Session>>>,
    /// Names of sessions whose commands are being started.
    starting: watch::Sender<BTreeSet<String>>,
}

/// A reserved name: no other operation can start a session of this name.
pub struct Reserved<'a> {
    name: String,
    terminals: &'a Terminals,
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        self.terminals.starting.send_if_modified(|names| names.remove(&self.name));
    }
}

impl Terminals {
    fn all(&self) -> MutexGuard<'_, Vec<Arc<Session>>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, name: &str) -> Option<Arc<Session>> {
        self.all().iter().find(|session| session.name.as_deref() == Some(name)).cloned()
    }

    /// Returns the session, or reserves the name if there is none. Waits while another operation starts a session of this name.
    pub async fn find_or_reserve(&self, name: &str) -> (Option<Arc<Session>>, Option<Reserved<'_>>) {
        // Waiting cannot fail, because the table itself owns the sender.
        let _ = self.starting.subscribe().wait_for(|names| !names.contains(name)).await;
        if let Some(session) = self.find(name) {
            return (Some(session), None);
        }
        self.starting.send_if_modified(|names| names.insert(name.to_owned()));
        (None, Some(Reserved { name: name.to_owned(), terminals: self }))
    }

    pub fn add(&self, session: Arc<Session>) {
        self.all().push(session);
    }

    pub fn remove(&self, session: &Arc<Session>) {
        self.all().retain(|other| !Arc::ptr_eq(other, session));
    }

    /// The sessions, oldest first.
    pub fn list(&self) -> SessionList {
        SessionList { sessions: self.infos() }
    }

    fn infos(&self) -> Vec<SessionInfo> {
        self.all().iter().filter_map(|session| session.info()).collect()
    }

    /// Ends a session. When this returns, all its processes are gone.
    pub async fn kill(&self, name: &str) -> Result<Done, ErrorReply> {
        let Some(session) = self.find(name) else {
            return Err(ErrorReply::new(Code::SessionNotFound, format!("there is no session {name:?}")));
        };
        session.hang_up();
        session.ended().await;
        self.remove(&session);
        Ok(Done {})
    }

    /// Fails if there is a terminal: the agent holds its other end, so CRIU cannot save the processes without the agent.
    pub fn refuse_open(&self) -> Result<(), ErrorReply> {
        let all = self.all();
        let Some(open) = all.iter().find(|session| session.exit().is_none()) else { return Ok(()) };
        let pid = open.pid().as_raw_pid();
        let what = match &open.name {
            Some(name) => format!("terminal session {name:?} is open"),
            None => format!("process {pid} has a terminal that is open"),
        };
        Err(ErrorReply::new(
            Code::Criu,
            format!("{what}: CRIU cannot save a terminal without the agent, which holds it"),
        ))
    }

    /// Makes room for the sessions that are being started.
    pub fn make_room(&self) -> Result<(), ErrorReply> {
        let mut all = self.all();
        if all.iter().filter(|session| session.name.is_some()).count() + self.starting.borrow().len() <= MOST {
            return Ok(());
        }
        match all.iter().position(|session| session.exit().is_some()) {
            Some(ended) => drop(all.remove(ended)),
            None => return Err(ErrorReply::new(Code::Busy, format!("there are {MOST} sessions already"))),
        }
        Ok(())
    }
}
