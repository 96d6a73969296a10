//! Names that both ends know.

/// Begins every line that init, or the agent where init left off, says on the console: the shim tells by it why a guest ended.
pub const INIT: &str = "machinen-init: ";

/// The operations that the shim itself asks for.
pub const POWER_OFF: &str = "poweroff";
pub const CLOCK: &str = "clock";
