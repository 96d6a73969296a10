//! Removes what is left of a VM on the host.

use crate::plan::Plan;
use std::path::Path;

/// Removes everything that the plan names, the VM's directory last. A file that is gone already, or cannot be removed, does not keep the
/// others.
pub fn run(plan: &Plan) {
    for path in &plan.cleanup {
        remove(path);
    }
    remove(&plan.entry_path);
    if let Some(channel) = &plan.channel {
        remove(&channel.vsock_path);
    }
    remove(&plan.control_path);
    remove(&plan.dir);
}

/// Removes a file, or a directory with everything in it.
pub fn remove(path: &Path) {
    // Symbolic links are not followed: the link is removed, not its target.
    let is_dir = path.symlink_metadata().is_ok_and(|metadata| metadata.is_dir());
    let _ = if is_dir { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
}
