//! `/init` of the initramfs. Everything it does is in `init` (until the root is switched) and `agent` (from then on).

fn main() -> std::process::ExitCode {
    machinen_guest::init::main()
}
