//! Rights of the process that serving does not take.

use std::io;

use rustix::io::Errno;
use rustix::process::{DumpableBehavior, Resource, Rlimit, geteuid, set_dumpable_behavior, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set, remove_capability_from_bounding_set,
    set_capabilities, set_no_new_privs, set_thread_groups,
};

/// What it takes to act on files as their owners.
pub const KEPT: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID);

/// Gives them up, for the calling thread and those that it starts.
pub fn reduce() -> io::Result<()> {
    set_no_new_privs(true)?;
    // What the guest's programs had in their files is in this process's memory.
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    if geteuid().is_root() {
        // A file that one of the guest's users makes is made with that user's group alone.
        match set_thread_groups(&[]) {
            // The root of an ordinary user's namespace may not (user_namespaces(7)).
            Ok(()) | Err(Errno::PERM) => {}
            Err(errno) => return Err(errno.into()),
        }
        for capability in (CapabilitySet::all() - KEPT).iter() {
            // A capability that this kernel does not know cannot be had.
            let _ = remove_capability_from_bounding_set(capability);
        }
    }
    clear_ambient_capability_set()?;
    let permitted = capabilities(None)?.permitted & KEPT;
    set_capabilities(None, CapabilitySets { effective: permitted, permitted, inheritable: CapabilitySet::empty() })?;
    Ok(())
}
