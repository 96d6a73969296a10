//! What root may do that a guest's user may not.

use rustix::io::Errno;
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

/// Does `work` as somebody whose writing to a file ends its set-user-ID and set-group-ID bits (CAP_FSETID, capabilities(7)).
pub fn without_fsetid<T>(work: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
    let before = capabilities(None)?;
    if !before.effective.contains(CapabilitySet::FSETID) {
        return work();
    }
    let mut without = before;
    without.effective -= CapabilitySet::FSETID;
    set_capabilities(None, without)?;
    let done = work();
    set_capabilities(None, before)?;
    done
}

/// Has the thread pass over permissions, which it may not any more when it has taken another user's id (setfsuid(2)). Taking its own again gives
/// back all it had.
pub fn with_dac_override() -> Result<(), Errno> {
    let mut sets = capabilities(None)?;
    if sets.permitted.contains(CapabilitySet::DAC_OVERRIDE) {
        sets.effective |= CapabilitySet::DAC_OVERRIDE;
        set_capabilities(None, sets)?;
    }
    Ok(())
}
