//! Secrets: values that commands get in their environment when they name them. They are kept only in memory and overwritten when they are
//! forgotten, and no copy of the machine has them. Freed buffers of the channel through which they came may still hold them until that
//! memory is used again.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::reply::{Code, ErrorReply};
use crate::request::{self, Secret};

/// The limit of all names and values together, more than a command's environment can take.
const MAX_BYTES: usize = 1 << 20;

/// The secrets that the host has given to this guest.
#[derive(Default)]
pub struct Secrets(BTreeMap<String, Secret>);

/// Result of `secrets`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StoredSecrets {
    /// How many secrets there are now.
    stored: usize,
    /// Names that were skipped, because no variable can have them.
    skipped: Vec<String>,
}

impl Secrets {
    /// Stores secrets. With `forget`, those that there are go first. A refused request changes nothing.
    pub fn take(&mut self, request: request::Secrets) -> Result<StoredSecrets, ErrorReply> {
        let (fine, skipped): (Vec<_>, Vec<_>) = request.values.into_iter().partition(|(name, _)| is_name(name));
        let size = |(name, value): (&String, &Secret)| name.len() + value.len();
        let stay = if request.forget { &BTreeMap::new() } else { &self.0 };
        let bytes = stay.iter().map(size).chain(fine.iter().map(|(name, value)| size((name, value)))).sum::<usize>();
        if bytes > MAX_BYTES {
            return Err(ErrorReply::new(
                Code::BadRequest,
                format!("{bytes} bytes of secrets; there is room for {MAX_BYTES}"),
            ));
        }
        if request.forget {
            self.forget();
        }
        self.0.extend(fine);
        Ok(StoredSecrets { stored: self.0.len(), skipped: skipped.into_iter().map(|(name, _)| name).collect() })
    }

    pub fn forget(&mut self) {
        self.0.clear();
    }

    /// The secrets with these names, as variables.
    pub fn named(&self, names: &[String]) -> Result<Vec<(String, Secret)>, ErrorReply> {
        let named = names.iter().map(|name| {
            let unknown = || ErrorReply::new(Code::SecretUnknown, format!("this guest has no secret {name:?}"));
            Ok((name.clone(), self.0.get(name).ok_or_else(unknown)?.clone()))
        });
        named.collect()
    }

    /// All names there are.
    pub fn names(&self) -> Vec<String> {
        self.0.keys().cloned().collect()
    }
}

/// Whether a shell can have a variable of this name.
fn is_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    name.bytes().all(plain) && name.bytes().next().is_some_and(|first| !first.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_what_a_shell_can_use() {
        for name in ["A", "_", "a1_B"] {
            assert!(is_name(name), "{name}");
        }
        for name in ["", "1A", "A-B", "A B", "Ä", "A="] {
            assert!(!is_name(name), "{name}");
        }
    }

    #[test]
    fn only_what_is_asked_for_is_given() {
        let json = br#"{"op":"secrets","values":{"A":"1","B":"2"}}"#;
        let request::Request::Secrets(request) = request::Request::parse(json).unwrap() else { panic!() };
        let secrets = Secrets(request.values);
        let named = secrets.named(&["B".into()]).unwrap();
        assert_eq!(named.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect::<Vec<_>>(), [("B", "2")]);
        assert!(secrets.named(&[]).unwrap().is_empty());
        assert_eq!(secrets.named(&["A".into(), "C".into()]).unwrap_err().code, Code::SecretUnknown);
    }

    #[test]
    fn a_refused_request_forgets_nothing() {
        let parsed = |json: String| match request::Request::parse(json.as_bytes()).unwrap() {
            request::Request::Secrets(request) => request,
            _ => panic!(),
        };
        let mut secrets = Secrets::default();
        secrets.take(parsed(r#"{"op":"secrets","values":{"A":"1"}}"#.to_owned())).unwrap();
        let large = "x".repeat(MAX_BYTES);
        let refused = secrets.take(parsed(format!(r#"{{"op":"secrets","forget":true,"values":{{"B":"{large}"}}}}"#)));
        assert_eq!(refused.unwrap_err().code, Code::BadRequest);
        assert_eq!(secrets.names(), ["A"]);
        // What goes makes room.
        let most = "x".repeat(MAX_BYTES - 1);
        secrets.take(parsed(format!(r#"{{"op":"secrets","forget":true,"values":{{"B":"{most}"}}}}"#))).unwrap();
        assert_eq!(secrets.names(), ["B"]);
    }

    #[test]
    fn no_message_holds_a_value() {
        for json in [r#"{"op":"secrets","values":"hunter2"}"#, r#"{"op":"secrets","values":{"A":["hunter2"]}}"#] {
            let refused = request::Request::parse(json.as_bytes()).unwrap_err();
            assert!(!refused.message.contains("hunter2"), "{}", refused.message);
        }
        let json = br#"{"op":"secrets","values":{"A":"hunter2"}}"#;
        assert!(!format!("{:?}", request::Request::parse(json).unwrap()).contains("hunter2"));
    }
}
