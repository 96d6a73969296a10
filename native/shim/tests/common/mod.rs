//! Runs a shim with a fake VMM, and talks to it. Every wait is bounded.

// Each test file uses only a part.
#![allow(dead_code)]
// A helper that fails fails its test.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// The longest that a test waits for anything.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub fn fake_vmm() -> String {
    env!("CARGO_BIN_EXE_fake-vmm").to_owned()
}

/// A plan whose VMM is `argv`, in a directory of its own.
pub fn plan(home: &Path, argv: &[&str]) -> Value {
    let dir = home.join("vm");
    std::fs::create_dir_all(&dir).unwrap();
    let path = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    json!({
        "version": 1, "id": "test", "dir": dir, "files": [],
        "vmm": {"argv": argv, "env": {"FROM_PLAN": "1"}},
        "channel": {"fd": 3, "vsockPath": path("vsock.sock"), "resume": false},
        "console": {"fd": 4, "logPath": path("console.log"), "maxBytes": 1_000_000},
        "outputLogPath": path("output.log"), "vmmLogPath": path("vmm.log"),
        "controlPath": path("control.sock"), "entryPath": home.join("entry.json"),
        "entry": {"version": 1, "id": "test", "state": "booting", "detached": false},
        "cleanup": [], "detached": false, "graceMs": 10_000, "exitRecordPath": home.join("exit.json")
    })
}

/// A running shim. Dropping it kills the shim, and its VMM with it.
pub struct Shim {
    pub home: TempDir,
    pub child: Child,
    pub stdin: Option<ChildStdin>,
    events: Receiver<Value>,
}

impl Drop for Shim {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A shim that has not got its plan yet.
pub fn spawn(home: TempDir) -> Shim {
    spawn_as(home, Command::new(SHIM))
}

pub const SHIM: &str = env!("CARGO_BIN_EXE_machinen-shim");

/// As `spawn`, by a command that becomes the shim.
pub fn spawn_as(home: TempDir, mut command: Command) -> Shim {
    let mut child = command.current_dir("/").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let (events, receiver) = channel();
    let stdout = BufReader::new(child.stdout.take().unwrap());
    std::thread::spawn(move || {
        for line in stdout.lines().map_while(Result::ok) {
            let _ = events.send(serde_json::from_str(&line).unwrap());
        }
    });
    let stdin = child.stdin.take();
    Shim { home, child, stdin, events: receiver }
}

/// Starts a fake VMM with these arguments, after a change to its plan.
pub fn start_with(arguments: &[&str], change: impl FnOnce(&mut Value)) -> Shim {
    start_as(Command::new(SHIM), arguments, change)
}

/// As `start_with`, by a command that becomes the shim.
pub fn start_as(command: Command, arguments: &[&str], change: impl FnOnce(&mut Value)) -> Shim {
    let home = tempfile::tempdir().unwrap();
    let vmm = fake_vmm();
    let argv: Vec<&str> = std::iter::once(vmm.as_str()).chain(arguments.iter().copied()).collect();
    let mut plan = plan(home.path(), &argv);
    change(&mut plan);
    let mut shim = spawn_as(home, command);
    shim.send(&format!("{plan}\n"));
    shim
}

pub fn start(arguments: &[&str]) -> Shim {
    let shim = start_with(arguments, |_| ());
    assert_eq!(shim.event()["event"], "started");
    shim
}

/// Starts a fake VMM as `start` does, and waits until the guest has rung.
pub fn start_ready(arguments: &[&str]) -> Shim {
    let shim = start(arguments);
    shim.until(|shim| shim.status()["ready"] == true);
    shim
}

impl Shim {
    pub fn send(&mut self, text: &str) {
        // The shim may refuse the plan before it has read all of it.
        let _ = self.stdin.as_mut().unwrap().write_all(text.as_bytes());
    }

    /// The next event.
    pub fn event(&self) -> Value {
        self.events.recv_timeout(PATIENCE).expect("an event")
    }

    /// Waits for the exit record, after which no file and no other event may follow.
    pub fn exited(&mut self) -> Value {
        let event = self.event();
        assert_eq!(event["event"], "exited", "{event}");
        assert!(self.ended().success());
        self.assert_nothing_left();
        let record = std::fs::read(self.home.path().join("exit.json")).unwrap();
        assert_eq!(serde_json::from_slice::<Value>(&record).unwrap(), event["exit"]);
        event["exit"].clone()
    }

    /// Waits for the failure, after which no file may be left.
    pub fn failed(&mut self) -> Value {
        let event = self.event();
        assert_eq!(event["event"], "failed", "{event}");
        assert_eq!(self.ended().code(), Some(1));
        event
    }

    pub fn assert_nothing_left(&self) {
        assert!(!self.path("").exists(), "the directory is left");
        assert!(!self.home.path().join("entry.json").exists(), "the entry is left");
        assert!(!self.home.path().join("entry.json.tmp").exists(), "half an entry is left");
    }

    /// Waits for the process to end, which closes its stdout.
    pub fn ended(&mut self) -> ExitStatus {
        match self.events.recv_timeout(PATIENCE) {
            Err(RecvTimeoutError::Disconnected) => self.child.wait().unwrap(),
            other => panic!("not the end: {other:?}"),
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.home.path().join("vm").join(name)
    }

    pub fn entry(&self) -> Value {
        serde_json::from_slice(&std::fs::read(self.home.path().join("entry.json")).unwrap()).unwrap()
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        rustix::process::kill_process(rustix::process::Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits for a condition of which no event tells.
    pub fn until(&self, done: impl Fn(&Self) -> bool) {
        let since = Instant::now();
        while !done(self) {
            assert!(since.elapsed() < PATIENCE, "it did not happen");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// A control connection on which `request` was sent.
    pub fn control(&self, request: &str) -> BufReader<UnixStream> {
        let mut stream = connect(&self.path("control.sock"));
        stream.write_all(request.as_bytes()).unwrap();
        stream.write_all(b"\n").unwrap();
        BufReader::new(stream)
    }

    pub fn status(&self) -> Value {
        line(&mut self.control(r#"{"op":"status"}"#))
    }

    /// A connection to a guest port, before the answer.
    pub fn connect(&self, port: u32) -> UnixStream {
        let mut stream = connect(&self.path("vsock.sock"));
        stream.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
        stream
    }

    /// A connection to a guest port that accepts.
    pub fn dial(&self, port: u32) -> UnixStream {
        let mut stream = self.connect(port);
        let mut greeting = Vec::new();
        while greeting.last() != Some(&b'\n') {
            let mut byte = [0];
            stream.read_exact(&mut byte).expect("a greeting");
            greeting.push(byte[0]);
        }
        assert!(greeting.starts_with(b"OK "), "{greeting:?}");
        stream
    }

    /// A listener for the guest's calls to a port of its host.
    pub fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.path(&format!("vsock.sock_{port}"))).unwrap()
    }
}

fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// The next JSON line.
pub fn line(from: &mut impl BufRead) -> Value {
    let mut line = String::new();
    from.read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"))
}

pub fn rest(from: &mut impl Read) -> Vec<u8> {
    let mut rest = Vec::new();
    from.read_to_end(&mut rest).unwrap();
    rest
}

/// Whether a process exists and is not a zombie.
pub fn lives(pid: &Value) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('Z')))
}
