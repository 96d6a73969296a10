//! A command in a terminal of its own, with or without a client that shows it.

use std::io;
use std::os::fd::AsFd;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::sync::{Notify, mpsc, watch};

use super::pty::Pty;
use super::screen::Screen;
use super::size::Size;
use crate::agent::attend::{Input, Steered};
use crate::agent::process::Process;
use crate::agent::stream::{Abort, CHUNK};
use crate::reply::{Code, ErrorReply, Exit, SessionInfo};
use crate::system::cgroup;

/// How many pieces of output may wait for a client before the command has to wait.
const AHEAD: usize = 4;
/// How many bytes are read from the terminal after the command has ended. Children that hold the terminal may go on writing without end.
const MOST_LEFT: usize = 256 * 1024;
/// How long a command may take to end after SIGHUP before it is killed.
const GRACE: Duration = Duration::from_secs(1);

pub struct Session {
    /// `None`: the command ends with its client.
    pub name: Option<String>,
    argv: Vec<String>,
    created_ms: u64,
    process: Process,
    view: Mutex<View>,
    /// The number of the client that is attached now, or was last.
    turn: watch::Sender<u64>,
    hung_up: Notify,
    exit: watch::Sender<Option<Exit>>,
}

struct View {
    /// `None` once the command has ended: other processes in this terminal have lost it then.
    pty: Option<Arc<Pty>>,
    size: Size,
    /// Kept for sessions that can be joined.
    screen: Option<Screen>,
    client: Option<mpsc::Sender<Bytes>>,
}

impl Session {
    pub fn new(
        name: Option<String>,
        argv: Vec<String>,
        created_ms: u64,
        size: Size,
        pty: Pty,
        process: Process,
    ) -> Self {
        let screen = name.is_some().then(|| Screen::new(size));
        let view = Mutex::new(View { pty: Some(Arc::new(pty)), size, screen, client: None });
        let (turn, exit) = (watch::Sender::new(0), watch::Sender::new(None));
        Self { name, argv, created_ms, process, view, turn, hung_up: Notify::new(), exit }
    }

    fn view(&self) -> MutexGuard<'_, View> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pty(&self) -> Option<Arc<Pty>> {
        self.view().pty.clone()
    }

    pub fn pid(&self) -> Pid {
        self.process.pid
    }

    /// How the command ended; `None` until all its output has been passed on.
    pub fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Waits until the command has ended and all its output has been passed on.
    pub async fn ended(&self) -> Exit {
        let mut exit = self.exit.subscribe();
        // Waiting cannot fail, because the session itself owns the sender.
        let ended = exit.wait_for(Option::is_some).await.ok().and_then(|exit| *exit);
        ended.unwrap_or(LOST)
    }

    /// What the host is told of the session; `None` if it has no name.
    pub fn info(&self) -> Option<SessionInfo> {
        let view = self.view();
        Some(SessionInfo {
            name: self.name.clone()?,
            pid: self.process.pid.as_raw_pid(),
            argv: self.argv.clone(),
            created_ms: self.created_ms,
            attached: view.client.is_some(),
            columns: view.size.columns.get(),
            rows: view.size.rows.get(),
            ended: self.exit(),
        })
    }

    /// Hangs the session up, as a modem does that loses its line.
    pub fn hang_up(&self) {
        self.hung_up.notify_one();
    }

    /// Carries the command's output until it has ended.
    pub async fn run(&self) {
        let Some(pty) = self.pty() else { return };
        let exit = tokio::select! {
            carried = self.carry(&pty) => carried,
            () = self.hung_up.notified() => self.end(&pty).await,
        };
        self.view().pty = None;
        self.exit.send_replace(Some(exit.unwrap_or(LOST)));
    }

    async fn carry(&self, pty: &Pty) -> io::Result<Exit> {
        let mut buffer = vec![0; CHUNK];
        let exit = {
            let mut wait = pin!(self.process.wait());
            loop {
                tokio::select! {
                    biased;
                    exit = &mut wait => break exit?,
                    n = pty.read(&mut buffer) => self.pass(&buffer[..n?]).await,
                }
            }
        };
        let mut left = MOST_LEFT;
        while left > 0 {
            let Ok(n @ 1..) = pty.try_read(&mut buffer) else { break };
            left = left.saturating_sub(n);
            self.pass(&buffer[..n]).await;
        }
        Ok(exit)
    }

    /// Shows output to the client, and waits for a slow client unless another takes its place.
    async fn pass(&self, output: &[u8]) {
        let (client, mut turn) = {
            let mut view = self.view();
            if let Some(screen) = &mut view.screen {
                screen.process(output);
            }
            // Only the client of this moment gets this output; the next one sees it on the screen.
            (view.client.clone(), self.turn.subscribe())
        };
        if let Some(client) = client {
            tokio::select! {
                // A client that has left meanwhile gets nothing.
                _ = client.send(Bytes::copy_from_slice(output)) => {}
                _ = turn.changed() => {}
            }
        }
    }

    /// Sends SIGHUP to the command and to the foreground process group, as the kernel would. Afterwards kills what is left of the session.
    async fn end(&self, pty: &Pty) -> io::Result<Exit> {
        // The session was hung up while the last of its output was being shown.
        if self.process.is_reaped() {
            return self.process.wait().await;
        }
        self.process.signal(libc::SIGHUP);
        if let Ok(foreground) = rustix::termios::tcgetpgrp(pty.slave()) {
            let _ = rustix::process::kill_process_group(foreground, Signal::HUP);
            // A stopped process handles SIGHUP only after SIGCONT.
            let _ = rustix::process::kill_process_group(foreground, Signal::CONT);
        }
        self.process.signal(libc::SIGCONT);
        // Its output is drained, so that a full terminal does not keep it from ending.
        let drained = async {
            let mut buffer = vec![0; CHUNK];
            while pty.read(&mut buffer).await.is_ok() {}
            std::future::pending::<()>().await;
        };
        tokio::select! {
            _ = tokio::time::timeout(GRACE, self.process.ended()) => {}
            () = drained => {}
        }
        // No other session can have this number before the command is reaped.
        let others = kill_session(self.process.pid);
        self.process.signal(libc::SIGKILL);
        let exit = self.process.wait().await?;
        others.map(|()| exit)
    }

    /// Sets the size of terminal and screen.
    fn set_size(&self, view: &mut View, size: Size) -> Result<(), Abort> {
        let size = if view.screen.is_some() { Screen::limit(size) } else { size };
        view.size = size;
        if let Some(screen) = &mut view.screen {
            screen.resize(size);
        }
        let resized = view.pty.as_ref().map_or(Ok(()), |pty| pty.resize(size));
        resized.map_err(|error| Abort::io("terminal", &error))
    }

    /// Attaches a client with a window of that size. Returns the bytes that show the screen, and the client, which gets all further output.
    pub fn join(self: &Arc<Self>, size: Size, steal: bool) -> Result<(Vec<u8>, Client), Abort> {
        let mut view = self.view();
        if view.client.is_some() && !steal {
            return Err(ErrorReply::new(Code::SessionInUse, "another client is attached to the session").into());
        }
        if view.pty.is_some() {
            self.set_size(&mut view, size)?;
        }
        let (sender, output) = mpsc::channel(AHEAD);
        view.client = Some(sender);
        self.turn.send_modify(|turn| *turn += 1);
        let turn = self.turn.subscribe();
        let number = *turn.borrow();
        let replay = view.screen.as_ref().map(Screen::replay).unwrap_or_default();
        Ok((replay, Client { session: Arc::clone(self), output, turn, number }))
    }
}

/// The result of a command that could not be waited for: it counts as killed.
const LOST: Exit = Exit::Signal { signal: libc::SIGKILL, oom_killed: false };

/// Kills all processes that are still in the session of that command.
fn kill_session(leader: Pid) -> io::Result<()> {
    // Repeated, to find the processes that were forked meanwhile.
    for _ in 0..8 {
        let mut found = false;
        for pid in cgroup::workload_pids()?.into_iter().filter_map(Pid::from_raw).filter(|pid| *pid != leader) {
            // Opened before the session is read, so that both are about the same process.
            let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { continue };
            if rustix::process::getsid(Some(pid)) == Ok(leader) {
                found |= pidfd_send_signal(process.as_fd(), Signal::KILL).is_ok();
            }
        }
        if !found {
            break;
        }
    }
    Ok(())
}

/// A client of a session.
pub struct Client {
    session: Arc<Session>,
    output: mpsc::Receiver<Bytes>,
    turn: watch::Receiver<u64>,
    number: u64,
}

/// The next event of a client.
pub enum Seen {
    Output(Bytes),
    /// All output has been seen.
    Ended(Exit),
    /// Another client has taken the session.
    Taken,
}

impl Client {
    /// Waits until another client has taken the session.
    pub fn taken(&self) -> impl Future<Output = ()> + use<> {
        let (mut turn, number) = (self.turn.clone(), self.number);
        async move {
            // Waiting cannot fail, because the session owns the sender.
            let _ = turn.wait_for(|turn| *turn != number).await;
        }
    }

    pub async fn next(&mut self) -> Seen {
        if *self.turn.borrow() != self.number {
            return Seen::Taken;
        }
        tokio::select! {
            biased;
            Some(output) = self.output.recv() => Seen::Output(output),
            _ = self.turn.wait_for(|turn| *turn != self.number) => Seen::Taken,
            exit = self.session.ended() => match self.output.try_recv() {
                Ok(output) => Seen::Output(output),
                Err(_) => Seen::Ended(exit),
            },
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if *self.turn.borrow() == self.number {
            self.session.view().client = None;
        }
    }
}

/// The input of a session.
pub struct TerminalInput(pub Arc<Session>);

impl Input for TerminalInput {
    async fn writable(&self) {
        if let Some(pty) = self.0.pty() {
            pty.writable().await;
        }
    }

    fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        self.0.pty().ok_or(io::ErrorKind::BrokenPipe)?.try_write(bytes)
    }
}

impl Steered for Session {
    fn signal(&self, signal: i32) {
        self.process.signal(signal);
    }

    fn resize(&self, columns: u16, rows: u16) -> Result<(), Abort> {
        let Some(size) = Size::new(columns, rows) else {
            return Err(Abort::bad("a terminal has at least one column and one row"));
        };
        self.set_size(&mut self.view(), size)
    }
}
