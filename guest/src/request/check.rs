//! Checks of what several requests have.

use std::collections::BTreeMap;
use std::path::Path;

use crate::reply::{Code, ErrorReply};

/// The longest host name that Linux takes (`__NEW_UTS_LEN`).
const MAX_HOSTNAME: usize = 64;

pub fn check_env(env: &BTreeMap<String, String>) -> Result<(), ErrorReply> {
    for (key, value) in env {
        if key.is_empty() || key.contains('=') {
            return bad(format!("env has the impossible name {key:?}"));
        }
        no_nul("env", key)?;
        no_nul("env", value)?;
    }
    Ok(())
}

pub fn check_hostname(hostname: &str) -> Result<(), ErrorReply> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.' || byte == b'_';
    if hostname.is_empty() || hostname.len() > MAX_HOSTNAME || !hostname.bytes().all(plain) {
        return bad("hostname must be 1 to 64 letters, digits, '.', '-' or '_'");
    }
    Ok(())
}

pub fn check_path(path: impl AsRef<Path>) -> Result<(), ErrorReply> {
    let path = path.as_ref();
    if !path.is_absolute() {
        return bad("path must be absolute");
    }
    if path.as_os_str().as_encoded_bytes().contains(&0) { bad("path contains a NUL byte") } else { Ok(()) }
}

pub fn no_nul(field: &str, text: &str) -> Result<(), ErrorReply> {
    if text.contains('\0') { bad(format!("{field} contains a NUL byte")) } else { Ok(()) }
}

pub fn bad<T>(message: impl Into<String>) -> Result<T, ErrorReply> {
    Err(ErrorReply::new(Code::BadRequest, message))
}
