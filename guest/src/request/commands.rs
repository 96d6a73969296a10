//! Requests that start commands or have to do with their sessions.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::check::{bad, check_env, no_nul};
use crate::reply::ErrorReply;

const MAX_SESSION_NAME: usize = 64;

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
    pub fn check(&self) -> Result<(), ErrorReply> {
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

impl SessionKill {
    pub fn check(&self) -> Result<(), ErrorReply> {
        check_session(&self.session)
    }
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

#[cfg(test)]
mod tests {
    use crate::reply::Code;
    use crate::request::Request;

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
}
