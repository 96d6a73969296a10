//! `machinen-shim`: the supervisor of one VM (docs/protocol.md, section 5).
//!
//! ```text
//! supervisor     the life of a VM, from plan to exit record; everything below is called from there
//!   start        its beginning, in six steps
//!   plan         what the starter wants        owner        stdin and stdout, the way back to the starter
//!   files        sparse copies                 process      the VMM, and helpers
//!   entry, replace  the registry's record      cleanup      what is removed at the end
//!   transcript, log, tail                      what the guest and the VMM print
//!   shares, share_control                      the server of the files that the guest shares
//!   network      forwarded ports, and gvproxy when it is needed
//!   vsock, guest_ports, proxy                  sockets <-> channel (section 2)
//!   doorbell, lifecycle, agent, frame          what the shim itself says to the guest and hears from it
//!   control      the control socket            state        what all of these share
//!   capture, undo                              a conversation there: copies of a stopped VM, or nothing
//!   memory, private_memory, parallel_copy      the guest's memory, and copies of it
//! ```
//!
//! Parents and pipes: the shim is the parent of the VMM, which dies with it (PDEATHSIG); its starter holds the shim's stdin. One thread
//! does everything except waiting for the owner and the copies: a blocked disk must not block the guest.

mod accept;
mod agent;
mod capture;
mod cleanup;
mod clock;
mod control;
mod digest;
mod doorbell;
mod entry;
mod error;
mod event;
mod failed;
mod files;
mod frame;
mod guest_ports;
mod identity;
mod lifecycle;
mod line;
mod log;
mod memory;
mod network;
mod operation;
mod owner;
mod parallel_copy;
mod peer_closed;
mod plan;
mod private_memory;
mod process;
mod proxy;
mod push_pull;
mod replace;
mod share_control;
mod shares;
mod start;
mod state;
mod stop;
mod supervisor;
mod tail;
mod transcript;
mod tsc;
mod undo;
mod vsock;

use std::process::ExitCode;

fn main() -> ExitCode {
    process::restrict();
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    match arguments.as_slice() {
        [] => supervisor::main(),
        [verb] if verb == "tsc-khz" => {
            println!("{}", tsc::khz());
            ExitCode::SUCCESS
        }
        [verb, files @ ..] if verb == "digest" && !files.is_empty() => digest::main(files),
        [verb, arguments @ ..] if verb == "push" => push_pull::push(arguments),
        [verb, arguments @ ..] if verb == "pull" => push_pull::pull(arguments),
        _ => {
            eprintln!(
                "usage: machinen-shim            (the plan is read from stdin)\n       machinen-shim tsc-khz\n       \
                 machinen-shim digest <file>...\n       machinen-shim push <request> follow|link <path> <name> <exclude>...\n       \
                 machinen-shim pull <request> directory|file <path> <limit>"
            );
            ExitCode::from(2)
        }
    }
}
