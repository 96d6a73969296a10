//! Requests, parsed and checked before anything is done. After `parse` no string holds a NUL byte, so none can be cut short on its
//! way to the kernel.

mod check;
mod commands;
mod files;
mod machine;

use machinen_protocol::names::{CLOCK, POWER_OFF};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use self::check::{bad, check_hostname, check_path, no_nul};
pub use self::commands::{Exec, Main, Pty, SessionKill};
pub use self::files::{Image, List, Mkdir, Pull, Push, Read, Remove, Rename, Stat, Watch, Write};
pub use self::machine::{
    Clock, Destination, Dump, Freeze, Hostname, Rejuvenate, Revive, Secret, Secrets, ShareMode, Tunnel,
};
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
            Self::SessionKill(kill) => kill.check(),
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

fn from_json<T: DeserializeOwned>(json: &[u8]) -> Result<T, ErrorReply> {
    serde_json::from_slice(json).map_err(|error| ErrorReply::new(Code::BadRequest, format!("request: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_freeze_needs_no_fields() {
        let parsed = Request::parse(br#"{"op":"freeze"}"#).unwrap();
        assert_eq!(parsed, Request::Freeze(Freeze { sync: false, lazy_umount: false, timeout_ms: None }));
        assert!(Request::parse(br#"{"op":"freeze","timeoutMs":-1}"#).is_err());
    }
}
