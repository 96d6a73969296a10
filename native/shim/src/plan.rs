//! The plan: everything that a VM consists of on the host, as the starter has decided it (`src/machine/ShimPlan.ts`).

use crate::error::Error;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufRead, ErrorKind};
use std::net::SocketAddr;
use std::os::fd::RawFd;
use std::path::{Component, Path, PathBuf};

/// The longest plan that is read, in bytes.
const MAX_PLAN: u64 = 4 << 20;
/// The descriptor numbers that a plan may use: not the standard ones, and below every usual limit.
const FDS: std::ops::RangeInclusive<RawFd> = 3..=255;
/// The most forwarded ports. Each takes a descriptor of gvproxy.
const MAX_FORWARDS: usize = 128;
/// The most shares; as `maxLiveMounts` of `src/machine/mountOptions.ts`.
const MAX_SHARES: usize = 64;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Plan {
    version: u32,
    /// The VM's directory, removed at the end.
    pub dir: PathBuf,
    pub files: Vec<FileCopy>,
    pub vmm: Command,
    /// `None`: the VMM serves `vsock.sock` itself.
    pub channel: Option<Channel>,
    pub console: Console,
    pub output_log_path: PathBuf,
    pub vmm_log_path: PathBuf,
    pub control_path: PathBuf,
    pub entry_path: PathBuf,
    pub entry: Map<String, Value>,
    pub cleanup: Vec<PathBuf>,
    pub detached: bool,
    pub grace_ms: u64,
    pub exit_record_path: Option<PathBuf>,
    pub memory: Option<Memory>,
    #[serde(default)]
    pub inherit: Vec<Inherit>,
    pub network: Option<Network>,
    pub shares: Option<Shares>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct FileCopy {
    pub from: PathBuf,
    pub to: PathBuf,
    /// The size to which the copy is extended with a hole, in bytes.
    pub size: Option<u64>,
}

/// The directories and files of the host that the guest shares, and the program that serves them.
#[derive(Debug, Deserialize)]
pub struct Shares {
    /// The number in the VMM of its end of the stream of requests.
    pub fd: RawFd,
    #[serde(flatten)]
    pub server: Command,
    pub parts: Vec<Share>,
    /// The server's state as a saved machine has it.
    pub state: Option<PathBuf>,
}

/// A directory or file that the guest knows by its tag. The server gets it as it is here.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Share {
    tag: String,
    path: PathBuf,
    read_only: bool,
    /// Which user of the guest the files' owner is.
    #[serde(skip_serializing_if = "Option::is_none")]
    uid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    gid: Option<u32>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Command {
    pub argv: Vec<String>,
    pub env: BTreeMap<String, String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Channel {
    pub fd: RawFd,
    pub vsock_path: PathBuf,
    /// Whether the guest was running before.
    pub resume: bool,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Console {
    pub fd: RawFd,
    pub log_path: PathBuf,
    /// The size in bytes at which this log and the output's log are rotated.
    pub max_bytes: u64,
}

/// The guest's memory, if it is a file, and its descriptor number in the VMM.
#[derive(Debug, Deserialize)]
#[serde(untagged, rename_all_fields = "camelCase")]
pub enum Memory {
    New {
        fd: RawFd,
        size_bytes: u64,
    },
    /// A file that the VMM maps privately, and that is never written to.
    File {
        fd: RawFd,
        from: PathBuf,
    },
}

impl Memory {
    pub fn fd(&self) -> RawFd {
        match self {
            Memory::New { fd, .. } | Memory::File { fd, .. } => *fd,
        }
    }
}

/// A file that is open for reading in the VMM.
#[derive(Debug, Deserialize)]
pub struct Inherit {
    pub fd: RawFd,
    pub path: PathBuf,
}

/// The guest's network card, and the program that serves it.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Network {
    /// The number in the VMM of the listener of the card's other end.
    pub fd: RawFd,
    /// The program that serves the card, started when it is needed (gvproxy/main.go).
    pub gvproxy: Command,
    #[serde(default)]
    pub forwards: Vec<Forward>,
}

/// A forwarded port: clients of this host address are connected to the guest's port.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Forward {
    pub host: SocketAddr,
    pub guest_port: u16,
}

impl Plan {
    /// Reads the plan's line. `None`: the starter has closed the pipe, or died, before it had sent all of it.
    pub fn read(input: impl BufRead) -> Result<Option<Self>, Error> {
        let failed = |error: io::Error| Error::io("unusable plan", error);
        let mut line = Vec::new();
        input.take(MAX_PLAN + 1).read_until(b'\n', &mut line).map_err(failed)?;
        if line.last() != Some(&b'\n') {
            if line.len() as u64 > MAX_PLAN {
                return Err(failed(ErrorKind::FileTooLarge.into()));
            }
            return Ok(None);
        }
        let plan: Plan = serde_json::from_slice(&line).map_err(|error| failed(error.into()))?;
        plan.check().map_err(|what| failed(io::Error::new(ErrorKind::InvalidInput, what)))?;
        Ok(Some(plan))
    }

    fn check(&self) -> Result<(), &'static str> {
        if self.version != 1 {
            return Err("unknown version");
        }
        if self.vmm.argv.is_empty() || self.network.as_ref().is_some_and(|network| network.gvproxy.argv.is_empty()) {
            return Err("a command is empty");
        }
        if self.network.as_ref().is_some_and(|network| network.forwards.len() > MAX_FORWARDS) {
            return Err("too many forwards");
        }
        let mut taken = BTreeSet::new();
        if !self.fds().all(|fd| FDS.contains(&fd) && taken.insert(fd)) {
            return Err("descriptors out of range or equal");
        }
        if let Some(shares) = &self.shares {
            shares.check()?;
        }
        // Paths that are removed recursively must be absolute, without `..`, and not the root.
        if !std::iter::once(&self.dir).chain(&self.cleanup).all(|path| removable(path)) {
            return Err("dir and cleanup must be absolute paths without dots");
        }
        Ok(())
    }

    /// The numbers of all descriptors that the VMM inherits.
    fn fds(&self) -> impl Iterator<Item = RawFd> {
        std::iter::once(self.console.fd)
            .chain(self.channel.as_ref().map(|channel| channel.fd))
            .chain(self.memory.as_ref().map(Memory::fd))
            .chain(self.network.as_ref().map(|network| network.fd))
            .chain(self.shares.as_ref().map(|shares| shares.fd))
            .chain(self.inherit.iter().map(|inherit| inherit.fd))
    }

    /// The path of the socket for the guest's ports.
    pub fn vsock_path(&self) -> PathBuf {
        self.channel.as_ref().map_or_else(|| self.dir.join("vsock.sock"), |channel| channel.vsock_path.clone())
    }
}

impl Shares {
    fn check(&self) -> Result<(), &'static str> {
        if self.server.argv.is_empty() {
            return Err("a command is empty");
        }
        let mut tags = BTreeSet::new();
        let is_plain = |tag: &str| Path::new(tag).components().eq([Component::Normal(tag.as_ref())]);
        let distinct = self.parts.iter().all(|part| is_plain(&part.tag) && tags.insert(part.tag.as_str()));
        if !distinct || self.parts.len() > MAX_SHARES {
            return Err("shares must have different plain names, and not too many");
        }
        if !self.parts.iter().map(|part| &part.path).chain(&self.state).all(|path| path.is_absolute()) {
            return Err("shares must have absolute paths");
        }
        Ok(())
    }
}

/// Whether a path is absolute, without `..` and not the root, so that it may be removed with everything below it.
pub fn removable(path: &Path) -> bool {
    path.is_absolute()
        && path.file_name().is_some()
        && path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn plan(change: impl FnOnce(&mut Value)) -> Result<Option<Plan>, Error> {
        let mut plan = json!({
            "version": 1, "id": "a", "dir": "/vms/a", "files": [], "vmm": {"argv": ["qemu"], "env": {}}, "channel": null,
            "console": {"fd": 4, "logPath": "/vms/a/console.log", "maxBytes": 1000}, "outputLogPath": "/o", "vmmLogPath": "/v",
            "controlPath": "/c", "entryPath": "/e", "entry": {}, "cleanup": [], "detached": false, "graceMs": 1000
        });
        change(&mut plan);
        Plan::read(format!("{plan}\n").as_bytes())
    }

    #[test]
    fn a_minimal_plan_is_accepted() {
        let plan = plan(|_| ()).unwrap().unwrap();
        assert_eq!(plan.vsock_path(), Path::new("/vms/a/vsock.sock"));
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(plan(|plan| plan["version"] = json!(2)).is_err());
        assert!(plan(|plan| plan["vmm"]["argv"] = json!([])).is_err());
        assert!(plan(|plan| plan["console"]["fd"] = json!(2)).is_err());
        assert!(plan(|plan| plan["channel"] = json!({"fd": 4, "vsockPath": "/s", "resume": false})).is_err());
        assert!(plan(|plan| plan["graceMs"] = json!(-1)).is_err());
        for fd in [-1, 2, 4, 256] {
            assert!(plan(|plan| plan["memory"] = json!({"fd": fd, "sizeBytes": 4096})).is_err(), "{fd}");
            assert!(plan(|plan| plan["memory"] = json!({"fd": fd, "from": "/m"})).is_err(), "{fd}");
            assert!(plan(|plan| plan["inherit"] = json!([{"fd": fd, "path": "/p"}])).is_err(), "{fd}");
        }
        assert!(plan(|plan| plan["inherit"] = json!([{"fd": 5, "path": "/p"}, {"fd": 5, "path": "/q"}])).is_err());
        assert!(plan(|plan| plan["memory"] = json!({"fd": 5})).is_err());
        assert!(plan(|plan| plan["memory"] = json!({"fd": 5, "sizeBytes": -1})).is_err());
        for dir in ["/", "a", "/a/..", "/a/../b", ""] {
            assert!(plan(|plan| plan["dir"] = json!(dir)).is_err(), "{dir}");
            assert!(plan(|plan| plan["cleanup"] = json!([dir])).is_err(), "{dir}");
        }
    }

    #[test]
    fn shares_are_plain_names_of_absolute_paths() {
        let shares = |fd: i32, parts: Value, state: Value| {
            plan(|plan| plan["shares"] = json!({"fd": fd, "argv": ["s"], "env": {}, "parts": parts, "state": state}))
        };
        let part = |tag: &str, path: &str| json!({"tag": tag, "path": path, "readOnly": true, "uid": 7});
        assert!(shares(8, json!([part("x", "/srv"), part("y", "/srv")]), json!("/state")).is_ok());
        assert!(shares(8, json!([part("x", "srv")]), json!(null)).is_err());
        assert!(shares(8, json!([part("x", "/srv")]), json!("state")).is_err());
        assert!(shares(8, json!([part("x", "/srv"), part("x", "/other")]), json!(null)).is_err());
        assert!(shares(4, json!([part("x", "/srv")]), json!(null)).is_err());
        for tag in ["", ".", "..", "a/b", "/", "/a", "a/", "a/.."] {
            assert!(shares(8, json!([part(tag, "/srv")]), json!(null)).is_err(), "{tag}");
        }
        let many: Vec<_> = (0..=MAX_SHARES).map(|n| part(&format!("t{n}"), "/srv")).collect();
        assert!(shares(8, json!(many[1..]), json!(null)).is_ok());
        assert!(shares(8, json!(many), json!(null)).is_err());
        assert!(plan(|plan| plan["shares"] = json!({"fd": 8, "argv": [], "env": {}, "parts": []})).is_err());
    }

    #[test]
    fn memory_is_new_or_a_file() {
        let memory = |json| plan(|plan| plan["memory"] = json).unwrap().unwrap().memory.unwrap();
        assert!(matches!(memory(json!({"fd": 5, "sizeBytes": 7})), Memory::New { fd: 5, size_bytes: 7 }));
        assert!(matches!(memory(json!({"fd": 5, "from": "/m"})), Memory::File { fd: 5, .. }));
    }

    #[test]
    fn a_plan_without_its_end_is_none() {
        assert!(Plan::read(&b""[..]).unwrap().is_none());
        assert!(Plan::read(&b"{\"version\":1"[..]).unwrap().is_none());
    }

    #[test]
    fn endless_lines_are_refused() {
        assert!(Plan::read(io::BufReader::new(io::repeat(b' '))).is_err());
    }
}
