//! What a guest is given: directories and single files of this host, each by a tag.

use std::ffi::{CStr, CString};
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use rustix::fs::{FileType, Mode, OFlags, open};
use rustix::io::Errno;
use serde::Deserialize;

use crate::node::status;
use crate::owner::Owners;
use crate::sealed::sealed;

/// The most shares of a VM.
pub const MOST: usize = 64;

/// A share as it is asked for.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Source {
    pub tag: String,
    pub path: PathBuf,
    pub read_only: bool,
    /// Which of the guest's users and groups stands for the share's owner.
    pub uid: Option<u32>,
    pub gid: Option<u32>,
}

/// A share that has been opened.
#[derive(Debug)]
pub struct Share {
    pub tag: CString,
    pub read_only: bool,
    pub owners: Owners,
    /// The shared directory or file, opened with O_PATH.
    pub file: OwnedFd,
    /// It is reached by a mount that is read-only.
    pub is_sealed: bool,
}

/// Why a share cannot be served.
#[derive(Debug)]
pub struct Refused {
    pub errno: Errno,
    /// The path, or the tag where that is at fault.
    pub what: String,
}

impl Share {
    /// # Errors
    /// A tag that is no name, and what is at the path if it is neither a directory nor a regular file.
    pub fn open(source: &Source) -> Result<Self, Refused> {
        let tag = tag(&source.tag)
            .ok_or_else(|| Refused { errno: Errno::INVAL, what: format!("the tag {:?}", source.tag) })?;
        let refused = |errno| Refused { errno, what: source.path.display().to_string() };
        let file = open(&source.path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(refused)?;
        let status = status(&file).map_err(refused)?;
        if !matches!(FileType::from_raw_mode(status.stx_mode.into()), FileType::Directory | FileType::RegularFile) {
            return Err(refused(Errno::OPNOTSUPP));
        }
        let owners = Owners::new((status.stx_uid, status.stx_gid), (source.uid, source.gid));
        let sealed = if source.read_only { sealed(&file).ok() } else { None };
        let is_sealed = sealed.is_some();
        Ok(Self { tag, read_only: source.read_only, owners, file: sealed.unwrap_or(file), is_sealed })
    }
}

/// A tag is a name in the root directory.
fn tag(tag: &str) -> Option<CString> {
    let is_name = !matches!(tag, "" | "." | "..") && tag.len() <= 255 && !tag.contains('/');
    if is_name { CString::new(tag).ok() } else { None }
}

/// Which share has the tag.
pub fn by_tag(shares: &[Share], tag: &CStr) -> Option<usize> {
    shares.iter().position(|share| *share.tag == *tag)
}
