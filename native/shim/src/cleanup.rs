//! What is left of a VM on the host, and its removal.

use crate::plan::Plan;
use std::path::Path;

/// Removes everything the plan names, the VM's directory last. What is gone already, or cannot be removed, does not keep the rest.
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
    // Not followed: a link is removed, not what it points to.
    let is_dir = path.symlink_metadata().is_ok_and(|metadata| metadata.is_dir());
    let _ = if is_dir { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
}
