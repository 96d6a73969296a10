//! A guest's side of the program: speaks FUSE messages with it.

#![allow(clippy::unwrap_used, dead_code, reason = "a test that cannot go on fails, and each uses some of this")]

pub mod kernel;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command};

use machinen_protocol::share::SYNC_MORE;
use machinen_share::abi::{
    self, CreateIn, CreateOut, EntryOut, InHeader, InitIn, InitOut, OpenIn, OpenOut, OutHeader, ReadIn, opcode,
};
use serde_json::{Value, json};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

const PROGRAM: &str = env!("CARGO_BIN_EXE_machinen-share");

/// The program, with both of its connections. It is ended with the test.
pub struct Program {
    pub child: Child,
    pub guest: UnixStream,
    pub control: BufReader<UnixStream>,
    unique: u64,
    /// What nobody asked for, by code.
    pub notices: Vec<(i32, Vec<u8>)>,
    is_caught_up: bool,
}

impl Program {
    /// Starts it without a plan.
    pub fn start() -> Self {
        Self::start_by(Command::new(PROGRAM), None)
    }

    /// As a user and its group.
    pub fn start_as(user: Option<u32>) -> Self {
        let mut command = Command::new(PROGRAM);
        if let Some(user) = user {
            command.uid(user).gid(user);
        }
        Self::start_by(command, None)
    }

    /// By what the shell does before, in a user namespace whose only user is this one, as root.
    pub fn start_in_namespace(before: &str) -> Self {
        let mut command = Command::new("unshare");
        command.args(["-Ur", "sh", "-ec", &format!("{before}; exec {PROGRAM}")]);
        Self::start_by(command, None)
    }

    fn start_by(mut command: Command, descriptors: Option<u64>) -> Self {
        let (guest, stream) = UnixStream::pair().unwrap();
        let (control, its_control) = UnixStream::pair().unwrap();
        let (stream_fd, control_fd) = (stream.as_raw_fd(), its_control.as_raw_fd());
        // SAFETY: the closure makes system calls and nothing else. The first copies are above the numbers that are wanted.
        unsafe {
            command.pre_exec(move || {
                let copy = |fd: i32, command: i32, to: i32| match libc::fcntl(fd, command, to) {
                    -1 => Err(std::io::Error::last_os_error()),
                    copy => Ok(copy),
                };
                let stream = copy(stream_fd, libc::F_DUPFD_CLOEXEC, 10)?;
                let control = copy(control_fd, libc::F_DUPFD_CLOEXEC, 10)?;
                if let Some(most) = descriptors {
                    let limit = libc::rlimit { rlim_cur: most, rlim_max: most };
                    libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
                }
                if libc::dup2(stream, 3) < 0 || libc::dup2(control, 4) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let child = command.spawn().unwrap();
        Self { child, guest, control: BufReader::new(control), unique: 0, notices: Vec::new(), is_caught_up: false }
    }

    /// Starts it with shares, each a tag, a path and whether it is read-only, and begins a connection.
    pub fn serving(shares: &[(&str, &Path, bool)]) -> Self {
        Self::start().serve(shares)
    }

    /// With so many descriptors at most.
    pub fn limited(descriptors: u64, shares: &[(&str, &Path, bool)]) -> Self {
        Self::start_by(Command::new(PROGRAM), Some(descriptors)).serve(shares)
    }

    fn serve(self, shares: &[(&str, &Path, bool)]) -> Self {
        let mut program = self;
        let answer = program.ask(&plan(shares));
        assert_eq!(answer["ok"], true, "{answer}");
        program.init();
        program
    }

    pub fn init(&mut self) -> InitOut {
        // This guest opens directories.
        let flags = !u32::try_from(abi::init::NO_OPENDIR_SUPPORT).unwrap();
        let init = InitIn { major: abi::MAJOR, minor: abi::MINOR, max_readahead: 1 << 17, flags };
        let extension = abi::InitInExtension { flags2: u32::MAX, ..abi::InitInExtension::default() };
        let body = [init.as_bytes(), extension.as_bytes()].concat();
        as_structure(&self.call(opcode::INIT, 0, &body).unwrap())
    }

    /// Sends a line of the control connection and returns the answer.
    pub fn ask(&mut self, line: &Value) -> Value {
        self.control.get_mut().write_all(format!("{line}\n").as_bytes()).unwrap();
        let mut answer = String::new();
        self.control.read_line(&mut answer).unwrap();
        serde_json::from_str(&answer).unwrap()
    }

    /// Sends a request as the guest's root and returns its number.
    pub fn send(&mut self, opcode: u32, node: u64, body: &[u8]) -> u64 {
        self.unique += 2;
        let len = u32::try_from(size_of::<InHeader>() + body.len()).unwrap();
        let header = InHeader { len, opcode, unique: self.unique, node, pid: 1, ..InHeader::default() };
        self.guest.write_all(&[header.as_bytes(), body].concat()).unwrap();
        self.unique
    }

    /// The next answer: whose it is, and what follows its header, or the errno.
    pub fn receive(&mut self) -> (u64, Result<Vec<u8>, i32>) {
        loop {
            let (header, body) = self.message();
            if header.unique != 0 {
                return (header.unique, if header.error == 0 { Ok(body) } else { Err(-header.error) });
            }
            self.notice(header.error, body);
        }
    }

    /// Waits until the guest has been told something with that code.
    pub fn wait_for_notice(&mut self, code: i32) -> Vec<u8> {
        loop {
            if let Some(place) = self.notices.iter().position(|(found, _)| *found == code) {
                return self.notices.remove(place).1;
            }
            let (header, body) = self.message();
            assert_eq!(header.unique, 0);
            self.notice(header.error, body);
        }
    }

    /// Waits until a copy has been told everything that changed.
    pub fn wait_until_caught_up(&mut self) {
        while !self.is_caught_up {
            let (header, body) = self.message();
            assert_eq!(header.unique, 0);
            self.notice(header.error, body);
        }
    }

    fn notice(&mut self, code: i32, body: Vec<u8>) {
        if code == abi::notify::SYNC {
            let number: u64 = as_structure(&body);
            self.is_caught_up |= number & SYNC_MORE == 0;
            self.acknowledge(number);
        } else {
            self.notices.push((code, body));
        }
    }

    /// As the guest's relay does when its kernel has taken all notices before.
    fn acknowledge(&mut self, number: u64) {
        let header = InHeader { len: 40, opcode: opcode::NOTIFY_REPLY, node: number, ..InHeader::default() };
        self.guest.write_all(header.as_bytes()).unwrap();
    }

    fn message(&mut self) -> (OutHeader, Vec<u8>) {
        let mut header = [0; size_of::<OutHeader>()];
        self.guest.read_exact(&mut header).unwrap();
        let header: OutHeader = as_structure(&header);
        let mut body = vec![0; header.len as usize - size_of::<OutHeader>()];
        self.guest.read_exact(&mut body).unwrap();
        (header, body)
    }

    /// Sends a request and returns its answer.
    pub fn call(&mut self, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        let unique = self.send(opcode, node, body);
        let (answered, answer) = self.receive();
        assert_eq!(answered, unique);
        answer
    }

    pub fn lookup(&mut self, parent: u64, name: &str) -> Result<EntryOut, i32> {
        let found: EntryOut = self.call(opcode::LOOKUP, parent, &text(name)).map(|body| as_structure(&body))?;
        // So a guest is told that it may believe it.
        if found.node == 0 { Err(libc::ENOENT) } else { Ok(found) }
    }

    /// The file at a path below the root, whose first part is a tag.
    pub fn walk(&mut self, path: &str) -> Result<EntryOut, i32> {
        let mut found = EntryOut { node: abi::ROOT, ..EntryOut::default() };
        for name in path.split('/') {
            found = self.lookup(found.node, name)?;
        }
        Ok(found)
    }

    pub fn open(&mut self, node: u64, flags: i32) -> Result<u64, i32> {
        let body = OpenIn { flags: flags.cast_unsigned(), open_flags: 0 };
        self.call(opcode::OPEN, node, body.as_bytes()).map(|body| as_structure::<OpenOut>(&body).handle)
    }

    pub fn create(&mut self, parent: u64, name: &str, flags: i32) -> Result<CreateOut, i32> {
        let body = CreateIn { flags: flags.cast_unsigned(), mode: 0o644, ..CreateIn::default() };
        self.call(opcode::CREATE, parent, &[body.as_bytes(), &text(name)].concat()).map(|body| as_structure(&body))
    }

    pub fn read(&mut self, node: u64, handle: u64, offset: u64, size: u32) -> Result<Vec<u8>, i32> {
        let body = ReadIn { handle, offset, size, ..ReadIn::default() };
        self.call(opcode::READ, node, body.as_bytes())
    }

    pub fn write(&mut self, node: u64, handle: u64, offset: u64, data: &[u8]) -> Result<Vec<u8>, i32> {
        let size = u32::try_from(data.len()).unwrap();
        let body = abi::WriteIn { handle, offset, size, ..abi::WriteIn::default() };
        self.call(opcode::WRITE, node, &[body.as_bytes(), data].concat())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn plan(shares: &[(&str, &Path, bool)]) -> Value {
    let share = |(tag, path, read_only): &(&str, &Path, bool)| json!({"tag": tag, "path": path, "readOnly": read_only});
    json!({"version": 1, "shares": shares.iter().map(share).collect::<Vec<_>>()})
}

/// A name as a request has it.
pub fn text(name: &str) -> Vec<u8> {
    [name.as_bytes(), b"\0"].concat()
}

pub fn as_structure<T: FromBytes + KnownLayout + Immutable>(bytes: &[u8]) -> T {
    T::read_from_prefix(bytes).unwrap().0
}

/// The names that an answer to READDIR has.
pub fn names(mut entries: &[u8]) -> Vec<String> {
    let mut names = Vec::new();
    while !entries.is_empty() {
        let (entry, rest) = abi::Dirent::read_from_prefix(entries).unwrap();
        let length = entry.name_len as usize;
        names.push(String::from_utf8_lossy(&rest[..length]).into_owned());
        entries = &entries[(size_of::<abi::Dirent>() + length).next_multiple_of(8)..];
    }
    names
}
