//! Names of files in JSON. A name may be any bytes, but JSON is text. A byte that is not part of UTF-8 is written as an unpaired surrogate,
//! U+DC00 plus the byte, as Python's `surrogateescape` does. So every name has exactly one text and every text one name, and the host can
//! ask for every name that it was told.

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use serde::de::{Deserializer, Error, Visitor};
use serde::ser::{Error as _, Serialize, Serializer};
use serde_json::value::RawValue;

/// Serializes a name, with serde's `serialize_with`.
pub fn serialize<S: Serializer>(name: &impl AsRef<OsStr>, serializer: S) -> Result<S::Ok, S::Error> {
    let bytes = name.as_ref().as_bytes();
    if let Ok(text) = str::from_utf8(bytes) {
        return serializer.serialize_str(text);
    }
    let mut json = String::from("\"");
    for chunk in bytes.utf8_chunks() {
        let text = serde_json::to_string(chunk.valid()).map_err(S::Error::custom)?;
        json.push_str(&text[1..text.len() - 1]);
        chunk.invalid().iter().for_each(|byte| json.push_str(&format!("\\udc{byte:02x}")));
    }
    json.push('"');
    RawValue::from_string(json).map_err(S::Error::custom)?.serialize(serializer)
}

/// Serializes an optional name.
pub fn serialize_some<S: Serializer>(name: &Option<PathBuf>, serializer: S) -> Result<S::Ok, S::Error> {
    match name {
        Some(name) => serialize(name, serializer),
        None => serializer.serialize_none(),
    }
}

/// Deserializes a path, with serde's `deserialize_with`.
pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
    struct Text;

    impl Visitor<'_> for Text {
        type Value = PathBuf;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a path")
        }

        fn visit_str<E: Error>(self, text: &str) -> Result<PathBuf, E> {
            Ok(text.into())
        }

        fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<PathBuf, E> {
            name_of(bytes).ok_or_else(|| E::custom("a path with a surrogate that stands for no byte"))
        }
    }

    // As bytes, because the text of a name need not be UTF-8.
    deserializer.deserialize_bytes(Text)
}

/// The bytes of a name from the text that JSON had, in which a lone surrogate is three bytes (WTF-8).
fn name_of(text: &[u8]) -> Option<PathBuf> {
    let mut name = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some(chunk) = rest.utf8_chunks().next() {
        name.extend_from_slice(chunk.valid().as_bytes());
        rest = &rest[chunk.valid().len()..];
        if chunk.invalid().is_empty() {
            break;
        }
        // U+DC80 to U+DCFF: below, a byte is part of UTF-8.
        let &[0xed, high @ 0xb2..=0xb3, low @ 0x80..=0xbf, ..] = rest else { return None };
        name.push((high & 1) << 6 | low & 0x3f | 0x80);
        rest = &rest[3..];
    }
    Some(std::ffi::OsString::from_vec(name).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(serde::Serialize, serde::Deserialize, Debug, PartialEq)]
    struct Named {
        #[serde(with = "super")]
        name: PathBuf,
    }

    #[test]
    fn every_name_comes_back_as_it_was() {
        let names: [&[u8]; 8] = [
            b"",
            b"plain",
            "ä€😀\n\"\\".as_bytes(),
            b"\xff",
            b"a\x80b\xfe",
            b"\xed\xb3\xbf",
            b"\xc3",
            b"\xf0\x9f\x98 x",
        ];
        let every: Vec<Vec<u8>> = (1..=255).map(|byte| vec![b'x', byte, b'y']).collect();
        for bytes in names.into_iter().chain(every.iter().map(Vec::as_slice)) {
            let named = Named { name: OsStr::from_bytes(bytes).into() };
            let json = serde_json::to_vec(&named).unwrap();
            assert!(str::from_utf8(&json).is_ok());
            assert_eq!(serde_json::from_slice::<Named>(&json).unwrap(), named, "{}", String::from_utf8_lossy(&json));
        }
        assert_eq!(
            serde_json::to_string(&Named { name: OsStr::from_bytes(b"a\xff").into() }).unwrap(),
            r#"{"name":"a\udcff"}"#
        );
    }

    #[test]
    fn surrogates_that_stand_for_no_byte_are_refused() {
        for text in [r"\ud800", r"\udc41", r"\udfff", r"\udbff", r"a\udc7f"] {
            assert!(serde_json::from_str::<Named>(&format!("{{\"name\":\"{text}\"}}")).is_err(), "{text}");
        }
        assert!(serde_json::from_str::<Named>(r#"{"name":7}"#).is_err());
    }
}
