//! Requests about the machine as a whole.

use std::collections::BTreeMap;

use serde::de::Error;
use serde::{Deserialize, Deserializer};
use zeroize::Zeroizing;

use super::check::{bad, check_env, check_hostname, check_path, no_nul};
use crate::config::GuestConfig;
use crate::reply::ErrorReply;

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
    /// Whether locks on files of shared directories may be lost in a copy.
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
    /// Shared directories, which may be read-only in one copy and writable in another.
    #[serde(default)]
    pub shares: Vec<ShareMode>,
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
    /// Whether locks on files of shared directories may be lost in a copy.
    #[serde(default)]
    pub lazy_umount: bool,
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

/// A shared directory or file, by where it is mounted.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ShareMode {
    pub guest: String,
    pub read_only: bool,
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

impl Rejuvenate {
    pub fn check(&self) -> Result<(), ErrorReply> {
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
        self.shares.iter().try_for_each(|share| check_path(&share.guest))?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reply::Code;
    use crate::request::Request;

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
}
