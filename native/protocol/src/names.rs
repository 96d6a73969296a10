//! Strings that shim and guest must agree on.

/// The beginning of every line that init, or the agent in its place, prints on the console. By it the shim finds out why a guest ended.
pub const INIT: &str = "machinen-init: ";

/// The operations that the shim itself asks for.
pub const POWER_OFF: &str = "poweroff";
pub const CLOCK: &str = "clock";

/// The name of the guest's configuration at the root of a file system: the host writes it, init reads it, and no archive of a root has it.
pub const GUEST_CONFIG: &str = "machinen-config.json";
