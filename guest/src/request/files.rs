//! Requests about files.

use std::path::PathBuf;

use serde::Deserialize;

use crate::file_names;

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

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Watch {
    /// A directory.
    #[serde(deserialize_with = "file_names::deserialize")]
    pub path: PathBuf,
    #[serde(default)]
    pub recursive: bool,
}
