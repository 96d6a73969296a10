//! Requests, parsed and checked before anything is done. After `parse` no string holds a NUL byte, so none can be cut short on its
//! way to the kernel.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::reply::{Code, ErrorReply};

/// The operation a stream asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    Exec(Exec),
    Main(Main),
    Write(Write),
    Read(Read),
    Push(Push),
    Pull(Pull),
    Stat(Stat),
    Stats,
    Kill(Kill),
    Hostname(Hostname),
    Poweroff,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Exec {
    pub argv: Vec<String>,
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    pub cwd: Option<String>,
    #[serde(default)]
    pub stdin: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Main {
    #[serde(default)]
    pub stdin: bool,
    #[serde(default)]
    pub detach: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Write {
    pub path: String,
    pub mode: Option<u32>,
    #[serde(default)]
    pub append: bool,
    #[serde(default)]
    pub recursive: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Read {
    pub path: String,
    #[serde(default)]
    pub offset: u64,
    pub length: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Push {
    pub path: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Pull {
    pub path: String,
    #[serde(default)]
    pub excludes: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Stat {
    pub path: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Kill {
    pub pid: i32,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Hostname {
    pub hostname: String,
}

/// Longest host name Linux takes (`__NEW_UTS_LEN`).
const MAX_HOSTNAME: usize = 64;

impl Request {
    /// Reads the payload of a `request` frame.
    pub fn parse(json: &[u8]) -> Result<Self, ErrorReply> {
        #[derive(Deserialize)]
        struct Op {
            op: String,
        }
        let Op { op } = from_json(json)?;
        let request = match op.as_str() {
            "exec" => Self::Exec(from_json(json)?),
            "main" => Self::Main(from_json(json)?),
            "write" => Self::Write(from_json(json)?),
            "read" => Self::Read(from_json(json)?),
            "push" => Self::Push(from_json(json)?),
            "pull" => Self::Pull(from_json(json)?),
            "stat" => Self::Stat(from_json(json)?),
            "stats" => Self::Stats,
            "kill" => Self::Kill(from_json(json)?),
            "hostname" => Self::Hostname(from_json(json)?),
            "poweroff" => Self::Poweroff,
            // The name is the peer's: quoted, and not at any length.
            other => {
                let name: String = other.chars().take(64).collect();
                return Err(ErrorReply::new(Code::OpUnknown, format!("unknown operation {name:?}")));
            }
        };
        request.check()?;
        Ok(request)
    }

    fn check(&self) -> Result<(), ErrorReply> {
        match self {
            Self::Exec(exec) => exec.check(),
            Self::Write(Write { path, mode, .. }) => {
                if mode.is_some_and(|mode| mode > 0o7777) {
                    return bad("mode has bits beyond 07777");
                }
                check_path(path)
            }
            Self::Read(Read { path, .. }) | Self::Push(Push { path }) | Self::Stat(Stat { path }) => check_path(path),
            Self::Pull(Pull { path, excludes }) => {
                excludes.iter().try_for_each(|pattern| no_nul("excludes", pattern))?;
                check_path(path)
            }
            Self::Hostname(Hostname { hostname }) => check_hostname(hostname),
            Self::Main(_) | Self::Kill(_) | Self::Stats | Self::Poweroff => Ok(()),
        }
    }
}

impl Exec {
    /// Whether this can be a command at all.
    pub fn check(&self) -> Result<(), ErrorReply> {
        if self.argv.first().is_none_or(String::is_empty) {
            return bad("argv needs a command");
        }
        self.argv.iter().try_for_each(|argument| no_nul("argv", argument))?;
        for (key, value) in &self.env {
            if key.is_empty() || key.contains('=') {
                return bad(format!("env has the impossible name {key:?}"));
            }
            no_nul("env", key)?;
            no_nul("env", value)?;
        }
        self.cwd.as_deref().map_or(Ok(()), |cwd| no_nul("cwd", cwd))
    }
}

fn check_hostname(hostname: &str) -> Result<(), ErrorReply> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.' || byte == b'_';
    if hostname.is_empty() || hostname.len() > MAX_HOSTNAME || !hostname.bytes().all(plain) {
        return bad("hostname must be 1 to 64 letters, digits, '.', '-' or '_'");
    }
    Ok(())
}

fn check_path(path: &str) -> Result<(), ErrorReply> {
    if !path.starts_with('/') {
        return bad("path must be absolute");
    }
    no_nul("path", path)
}

fn no_nul(field: &str, text: &str) -> Result<(), ErrorReply> {
    if text.contains('\0') { bad(format!("{field} contains a NUL byte")) } else { Ok(()) }
}

fn bad<T>(message: impl Into<String>) -> Result<T, ErrorReply> {
    Err(ErrorReply::new(Code::BadRequest, message))
}

fn from_json<T: DeserializeOwned>(json: &[u8]) -> Result<T, ErrorReply> {
    serde_json::from_slice(json).map_err(|error| ErrorReply::new(Code::BadRequest, format!("request: {error}")))
}
