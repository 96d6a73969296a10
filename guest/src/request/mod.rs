//! Requests, parsed and checked before anything is done. After `parse` no string holds a NUL byte, so none can be cut short on its
//! way to the kernel.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use machinen_protocol::names::{CLOCK, POWER_OFF};
use serde::de::{DeserializeOwned, Error};
use serde::{Deserialize, Deserializer};
use zeroize::Zeroizing;

use crate::config::GuestConfig;
use crate::file_names;
use crate::reply::{Code, ErrorReply};

/// The operation a stream asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    Exec(Exec),
    Pty(Pty),
    Sessions,
    SessionKill(SessionKill),
    Main(Main),
    Write(Write),
    Read(Read),
    Push(Push),
    Pull(Pull),
    Image(Image),
    Stat(Stat),
    List(List),
    Mkdir(Mkdir),
    Rename(Rename),
    Remove(Remove),
    Secrets(Secrets),
    Stats,
    Hostname(Hostname),
    Clock(Clock),
    Freeze(Freeze),
    Rejuvenate(Rejuvenate),
    Dump(Dump),
    Revive(Revive),
    Detach,
    Tunnel(Tunnel),
    Watch(Watch),
    Poweroff,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Exec {
    pub argv: Vec<String>,
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    pub cwd: Option<String>,
    pub user: Option<String>,
    #[serde(default)]
    pub stdin: bool,
    /// Names of secrets that are to be variables.
    #[serde(default)]
    pub secrets: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Pty {
    /// Empty: a login shell.
    #[serde(default)]
    pub argv: Vec<String>,
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    pub cwd: Option<String>,
    pub user: Option<String>,
    /// Names of secrets that are to be variables.
    #[serde(default)]
    pub secrets: Vec<String>,
    pub columns: u16,
    pub rows: u16,
    /// The name of the session, which outlives the stream. If there is a session of this name, it is joined.
    pub session: Option<String>,
    /// Whether to take the session from a client that is attached.
    #[serde(default)]
    pub steal: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct SessionKill {
    pub session: String,
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
    #[serde(deserialize_with = "file_names::deserialize")]
    pub path: PathBuf,
    pub mode: Option<u32>,
    #[serde(default)]
    pub append: bool,
    #[serde(default)]
    pub recursive: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Read {
    #[serde(deserialize_with = "file_names::deserialize")]
    pub path: PathBuf,
    #[serde(default)]
    pub offset: u64,
    pub length: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Push {
    #[serde(deserialize_with = "file_names::deserialize")]
    pub path: PathBuf,
    /// Whether the path is that of one file; otherwise it is the directory to unpack into.
    #[serde(default)]
    pub file: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Pull {
    #[serde(deserialize_with = "file_names::deserialize")]
    pub path: PathBuf,
    /// A symbolic link stands for what it leads to.
    #[serde(default)]
    pub follow: bool,
    #[serde(default)]
    pub excludes: Vec<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Image {
    /// The latest modification time of an entry, in seconds since 1970; later ones are set to it. So files that a build wrote do not tell
    /// when.
    pub newest: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Stat {
    #[serde(deserialize_with = "file_names::deserialize")]
    pub path: PathBuf,
    /// A symbolic link stands for what it leads to.
    #[serde(default)]
    pub follow: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct List {
    #[serde(deserialize_with = "file_names::deserialize")]
    pub path: PathBuf,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Mkdir {
    #[serde(deserialize_with = "file_names::deserialize")]
    pub path: PathBuf,
    pub mode: Option<u32>,
    #[serde(default)]
    pub recursive: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Rename {
    #[serde(deserialize_with = "file_names::deserialize")]
    pub from: PathBuf,
    #[serde(deserialize_with = "file_names::deserialize")]
    pub to: PathBuf,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Remove {
    #[serde(deserialize_with = "file_names::deserialize")]
    pub path: PathBuf,
    #[serde(default)]
    pub recursive: bool,
}

/// A value that is overwritten when it is dropped, and that is printed nowhere.
#[derive(Clone, PartialEq, Eq, Deserialize)]
pub struct Secret(Zeroizing<String>);

impl std::ops::Deref for Secret {
    type Target = String;

    fn deref(&self) -> &String {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret")
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Secrets {
    #[serde(default)]
    pub values: BTreeMap<String, Secret>,
    /// Whether to forget the secrets that there are before.
    #[serde(default)]
    pub forget: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Hostname {
    pub hostname: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Clock {
    pub now_ms: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Freeze {
    #[serde(default)]
    pub sync: bool,
    /// Whether files that are open on shared directories may be lost in a copy.
    #[serde(default)]
    pub lazy_umount: bool,
    pub timeout_ms: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Rejuvenate {
    #[serde(deserialize_with = "seed")]
    pub seed: [u8; 32],
    pub now_ms: u64,
    pub hostname: String,
    pub machine_id: String,
    pub generation: String,
    /// The address of the machine's network card, if it has one.
    #[serde(default, deserialize_with = "mac")]
    pub mac: Option<[u8; 6]>,
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Replaces the machine's configuration. It is given for a copy of a machine that has run no command, which begins here.
    pub config: Option<GuestConfig>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Dump {
    /// Whether to close established TCP connections instead of saving them.
    #[serde(default)]
    pub tcp_close: bool,
    pub timeout_ms: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Revive {
    /// Whether to restore memory only when it is touched.
    #[serde(default)]
    pub lazy: bool,
    #[serde(flatten)]
    pub identity: Rejuvenate,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Tunnel {
    pub to: Destination,
}

/// A listener in this guest.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Destination {
    /// A TCP port on the loopback interface.
    Port(u16),
    /// The path of a unix socket.
    Path(String),
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Watch {
    /// A directory.
    #[serde(deserialize_with = "file_names::deserialize")]
    pub path: PathBuf,
    #[serde(default)]
    pub recursive: bool,
}

/// The longest host name that Linux takes (`__NEW_UTS_LEN`).
const MAX_HOSTNAME: usize = 64;
const MAX_SESSION_NAME: usize = 64;

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
            "pty" => Self::Pty(from_json(json)?),
            "sessions" => Self::Sessions,
            "session-kill" => Self::SessionKill(from_json(json)?),
            "main" => Self::Main(from_json(json)?),
            "write" => Self::Write(from_json(json)?),
            "read" => Self::Read(from_json(json)?),
            "push" => Self::Push(from_json(json)?),
            "pull" => Self::Pull(from_json(json)?),
            "image" => Self::Image(from_json(json)?),
            "stat" => Self::Stat(from_json(json)?),
            "list" => Self::List(from_json(json)?),
            "mkdir" => Self::Mkdir(from_json(json)?),
            "rename" => Self::Rename(from_json(json)?),
            "remove" => Self::Remove(from_json(json)?),
            // The error does not say what is wrong, because the parser would quote the value.
            "secrets" => Self::Secrets(from_json(json).or_else(|_| bad("the secrets are not names and texts"))?),
            "stats" => Self::Stats,
            "hostname" => Self::Hostname(from_json(json)?),
            CLOCK => Self::Clock(from_json(json)?),
            "freeze" => Self::Freeze(from_json(json)?),
            "rejuvenate" => Self::Rejuvenate(from_json(json)?),
            "dump" => Self::Dump(from_json(json)?),
            "revive" => Self::Revive(from_json(json)?),
            "detach" => Self::Detach,
            "tunnel" => Self::Tunnel(from_json(json)?),
            "watch" => Self::Watch(from_json(json)?),
            POWER_OFF => Self::Poweroff,
            // The name comes from the peer, so it is quoted and cut.
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
            Self::Pty(pty) => pty.check(),
            Self::SessionKill(SessionKill { session }) => check_session(session),
            Self::Write(Write { path, mode, .. }) | Self::Mkdir(Mkdir { path, mode, .. }) => {
                if mode.is_some_and(|mode| mode > 0o7777) {
                    return bad("mode has bits beyond 07777");
                }
                check_path(path)
            }
            Self::Read(Read { path, .. })
            | Self::Push(Push { path, .. })
            | Self::Stat(Stat { path, .. })
            | Self::List(List { path })
            | Self::Remove(Remove { path, .. })
            | Self::Watch(Watch { path, .. }) => check_path(path),
            Self::Rename(Rename { from, to }) => check_path(from).and_then(|()| check_path(to)),
            Self::Secrets(Secrets { values, .. }) => values.values().try_for_each(|value| no_nul("a secret", value)),
            Self::Pull(Pull { path, excludes, .. }) => {
                excludes.iter().try_for_each(|pattern| no_nul("excludes", pattern))?;
                check_path(path)
            }
            Self::Hostname(Hostname { hostname }) => check_hostname(hostname),
            Self::Rejuvenate(rejuvenate) => rejuvenate.check(),
            Self::Revive(revive) => revive.identity.check(),
            Self::Tunnel(Tunnel { to: Destination::Port(0) }) => bad("nothing listens on port 0"),
            Self::Tunnel(Tunnel { to: Destination::Path(path) }) => check_path(path),
            Self::Main(_)
            | Self::Image(_)
            | Self::Sessions
            | Self::Tunnel(_)
            | Self::Stats
            | Self::Clock(_)
            | Self::Freeze(_)
            | Self::Dump(_)
            | Self::Detach
            | Self::Poweroff => Ok(()),
        }
    }
}

impl Exec {
    /// Checks what can be checked before the command is looked up.
    pub fn check(&self) -> Result<(), ErrorReply> {
        if self.argv.first().is_none_or(String::is_empty) {
            return bad("argv needs a command");
        }
        self.argv.iter().try_for_each(|argument| no_nul("argv", argument))?;
        check_env(&self.env)?;
        self.user.as_deref().map_or(Ok(()), |user| no_nul("user", user))?;
        self.cwd.as_deref().map_or(Ok(()), |cwd| no_nul("cwd", cwd))
    }
}

impl Pty {
    fn check(&self) -> Result<(), ErrorReply> {
        if self.argv.first().is_some_and(String::is_empty) {
            return bad("argv needs a command, or to be empty for a login shell");
        }
        if self.columns == 0 || self.rows == 0 {
            return bad("a terminal has at least one column and one row");
        }
        self.argv.iter().try_for_each(|argument| no_nul("argv", argument))?;
        check_env(&self.env)?;
        self.cwd.as_deref().map_or(Ok(()), |cwd| no_nul("cwd", cwd))?;
        self.user.as_deref().map_or(Ok(()), |user| no_nul("user", user))?;
        self.session.as_deref().map_or(Ok(()), check_session)
    }
}

impl Rejuvenate {
    fn check(&self) -> Result<(), ErrorReply> {
        if self.now_ms == 0 {
            return bad("nowMs must be the time");
        }
        check_hostname(&self.hostname)?;
        if self.machine_id.len() != 32 || !self.machine_id.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return bad("machineId must be 32 hexadecimal digits");
        }
        let plain = |byte: u8| byte.is_ascii_hexdigit() || byte == b'-';
        if self.generation.len() != 36 || !self.generation.bytes().all(plain) {
            return bad("generation must be a UUID");
        }
        self.config.as_ref().map_or(Ok(()), check_config)?;
        check_env(&self.env)
    }
}

fn check_config(config: &GuestConfig) -> Result<(), ErrorReply> {
    config.cmd.iter().try_for_each(|argument| no_nul("config.cmd", argument))?;
    config.user.iter().try_for_each(|user| no_nul("config.user", user))?;
    config.cwd.iter().try_for_each(check_path)?;
    check_env(&config.env)
}

fn check_env(env: &BTreeMap<String, String>) -> Result<(), ErrorReply> {
    for (key, value) in env {
        if key.is_empty() || key.contains('=') {
            return bad(format!("env has the impossible name {key:?}"));
        }
        no_nul("env", key)?;
        no_nul("env", value)?;
    }
    Ok(())
}

/// 64 hexadecimal digits. The message does not repeat them: a seed is a secret.
fn seed<'de, D: Deserializer<'de>>(deserializer: D) -> Result<[u8; 32], D::Error> {
    let text = String::deserialize(deserializer)?;
    let mut seed = [0; 32];
    if text.len() != 64 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(D::Error::custom("seed must be 64 hexadecimal digits"));
    }
    for (at, byte) in seed.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * at..2 * at + 2], 16).map_err(D::Error::custom)?;
    }
    Ok(seed)
}

/// Six pairs of hexadecimal digits with colons between them.
fn mac<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<[u8; 6]>, D::Error> {
    let Some(text) = Option::<String>::deserialize(deserializer)? else { return Ok(None) };
    let octets: Option<Vec<u8>> = text
        .split(':')
        .map(|pair| u8::from_str_radix(pair, 16).ok().filter(|_| pair.len() == 2 && !pair.starts_with('+')))
        .collect();
    let octets = octets.and_then(|octets| <[u8; 6]>::try_from(octets).ok());
    octets
        .map(Some)
        .ok_or_else(|| D::Error::custom("mac must be six pairs of hexadecimal digits with colons between them"))
}

fn check_hostname(hostname: &str) -> Result<(), ErrorReply> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.' || byte == b'_';
    if hostname.is_empty() || hostname.len() > MAX_HOSTNAME || !hostname.bytes().all(plain) {
        return bad("hostname must be 1 to 64 letters, digits, '.', '-' or '_'");
    }
    Ok(())
}

/// The rules of VM names, without paths.
fn check_session(name: &str) -> Result<(), ErrorReply> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
    let begins = name.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    if !begins || name.len() > MAX_SESSION_NAME || !name.bytes().all(plain) {
        return bad(
            "a session's name is 1 to 64 letters, digits, '_', '.' or '-', and begins with one of the first three",
        );
    }
    Ok(())
}

fn check_path(path: impl AsRef<Path>) -> Result<(), ErrorReply> {
    let path = path.as_ref();
    if !path.is_absolute() {
        return bad("path must be absolute");
    }
    if path.as_os_str().as_encoded_bytes().contains(&0) { bad("path contains a NUL byte") } else { Ok(()) }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn rejuvenate(field: &str, value: serde_json::Value) -> Result<Request, ErrorReply> {
        let mut request = serde_json::json!({
            "op": "rejuvenate",
            "seed": "00ff".repeat(16),
            "nowMs": 1_700_000_000_000_u64,
            "hostname": "copy",
            "machineId": "0123456789abcdef0123456789abcdef",
            "generation": "6f2c1a52-7c0e-4a53-9d0e-0a1b2c3d4e5f",
            "env": {"A": "1"},
        });
        request[field] = value;
        Request::parse(request.to_string().as_bytes())
    }

    #[test]
    fn reads_the_seed() {
        let Request::Rejuvenate(parsed) = rejuvenate("env", serde_json::json!({})).unwrap() else { panic!() };
        assert_eq!(parsed.seed, <[u8; 32]>::try_from([0, 255].repeat(16)).unwrap());
    }

    #[test]
    fn refuses_what_is_no_identity() {
        let digits = |n: usize| serde_json::Value::from("é0".repeat(n / 3));
        let wrong = [
            ("seed", "00".repeat(31).into()),
            ("seed", "+f".repeat(32).into()),
            ("seed", digits(64)),
            ("seed", 7.into()),
            ("nowMs", 0.into()),
            ("nowMs", (-1).into()),
            ("nowMs", 1.5.into()),
            ("hostname", "".into()),
            ("hostname", "a b".into()),
            ("machineId", "0".repeat(31).into()),
            ("machineId", "g".repeat(32).into()),
            ("machineId", digits(32)),
            ("generation", "0".repeat(35).into()),
            ("generation", "../".repeat(12).into()),
            ("env", serde_json::json!({"": "1"})),
            ("env", serde_json::json!({"A=B": "1"})),
            ("env", serde_json::json!({"A": "\0"})),
            ("config", 7.into()),
            ("config", serde_json::json!({"cmd": "true"})),
            ("config", serde_json::json!({"cmd": ["a\0b"]})),
            ("config", serde_json::json!({"env": {"A=B": "1"}})),
            ("config", serde_json::json!({"cwd": "here"})),
            ("config", serde_json::json!({"user": "\0"})),
        ];
        for (field, value) in wrong {
            let refused = rejuvenate(field, value.clone()).unwrap_err();
            assert_eq!(refused.code, Code::BadRequest, "{field}: {value}");
        }
    }

    #[test]
    fn refuses_what_is_no_terminal() {
        let pty = |field: &str, value: serde_json::Value| {
            let mut request = serde_json::json!({"op": "pty", "columns": 80, "rows": 24});
            request[field] = value;
            Request::parse(request.to_string().as_bytes())
        };
        let Request::Pty(parsed) = pty("session", "build.1".into()).unwrap() else { panic!() };
        assert_eq!((parsed.argv.len(), parsed.session.as_deref(), parsed.steal), (0, Some("build.1"), false));
        let wrong = [
            ("columns", 0.into()),
            ("rows", 0.into()),
            ("columns", 65_536.into()),
            ("rows", (-1).into()),
            ("argv", serde_json::json!([""])),
            ("argv", serde_json::json!(["a\0b"])),
            ("env", serde_json::json!({"": "1"})),
            ("cwd", "\0".into()),
            ("session", "".into()),
            ("session", "-n".into()),
            ("session", "a/b".into()),
            ("session", "ü".into()),
            ("session", "x".repeat(65).into()),
        ];
        for (field, value) in wrong {
            assert_eq!(pty(field, value.clone()).unwrap_err().code, Code::BadRequest, "{field}: {value}");
        }
    }

    #[test]
    fn a_freeze_needs_no_fields() {
        let parsed = Request::parse(br#"{"op":"freeze"}"#).unwrap();
        assert_eq!(parsed, Request::Freeze(Freeze { sync: false, lazy_umount: false, timeout_ms: None }));
        assert!(Request::parse(br#"{"op":"freeze","timeoutMs":-1}"#).is_err());
    }
}
