//! Landlock: nothing but the shares can be opened.

use std::io;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, RulesetStatus, Scope, make_bitflags,
};
use rustix::fs::FileType;

use crate::node::status;
use crate::share::Share;

/// The oldest that is used: the one before refused every rename from one directory to another.
const OLDEST: ABI = ABI::V2;
/// The newest that is known here. Of older kernels what they have is used.
const NEWEST: ABI = ABI::V6;

/// False: this kernel has no Landlock, or none that can be used.
pub fn restrict(shares: &[Share]) -> io::Result<bool> {
    let Ok(ruleset) =
        Ruleset::default().set_compatibility(CompatLevel::HardRequirement).handle_access(AccessFs::from_all(OLDEST))
    else {
        return Ok(false);
    };
    restrict_by(ruleset, shares).map_err(io::Error::other)
}

fn restrict_by(ruleset: Ruleset, shares: &[Share]) -> Result<bool, RulesetError> {
    let mut created = ruleset
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?;
    for share in shares {
        let is_directory = status(&share.file)
            .is_ok_and(|status| FileType::from_raw_mode(status.stx_mode.into()) == FileType::Directory);
        created = created.add_rule(PathBeneath::new(&share.file, allowed(share.read_only, is_directory)))?;
    }
    Ok(created.restrict_self()?.ruleset != RulesetStatus::NotEnforced)
}

/// Neither are programs run nor devices made.
fn allowed(read_only: bool, is_directory: bool) -> BitFlags<AccessFs> {
    let read = make_bitflags!(AccessFs::{ReadFile});
    let write = make_bitflags!(AccessFs::{WriteFile | Truncate});
    let list = make_bitflags!(AccessFs::{ReadDir});
    let names = make_bitflags!(AccessFs::{
        RemoveDir | RemoveFile | MakeDir | MakeReg | MakeSock | MakeFifo | MakeSym | Refer
    });
    match (read_only, is_directory) {
        (true, false) => read,
        (true, true) => read | list,
        (false, false) => read | write,
        (false, true) => read | write | list | names,
    }
}
