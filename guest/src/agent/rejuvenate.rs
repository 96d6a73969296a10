//! The operation `rejuvenate`: makes a copy a machine of its own. It renews first what must not be the same in two machines.

use std::fs::File;
use std::io;
use std::sync::Arc;

use rustix::ioctl::{self, NoArg, Opcode, Setter, opcode};

use super::context::Context;
use super::{clock, shares};
use crate::reply::{Code, ErrorReply, Kept, Rejuvenated};
use crate::request::Rejuvenate;
use crate::system::{cgroup, network};

/// `RNDADDENTROPY`: mixes bytes into the kernel's pool and counts them as entropy (random(4)).
const ADD_ENTROPY: Opcode = opcode::write::<[i32; 2]>(b'R', 3);
/// `RNDRESEEDCRNG`: makes the kernel's generator take a new key from the pool at once, and every process's own generator (vDSO) with it.
const RESEED: Opcode = opcode::none(b'R', 7);

/// Renews what identifies the machine, then thaws its commands and opens the gate. If randomness or the clock cannot be renewed, the
/// machine stays frozen.
pub async fn rejuvenate(context: &Arc<Context>, request: Rejuvenate) -> Result<Rejuvenated, ErrorReply> {
    if !context.gate.is_restored() {
        return Err(ErrorReply::new(
            Code::BadRequest,
            "this machine is not a copy that still has the identity of its original",
        ));
    }
    let modes = request.shares.clone();
    let mut done = renew(context, request)?;
    shares::resume_copy(context).await;
    if !modes.is_empty() {
        done.note("shares", shares::set_modes(modes).await);
        if let Some(told) = context.rejuvenated().as_mut() {
            told.clone_from(&done);
        }
    }
    cgroup::thaw_workload().map_err(|error| ErrorReply::io("thaw", &error))?;
    context.gate.open();
    Ok(done)
}

/// Renews what identifies the machine; the identity files must have been prepared.
pub fn renew(context: &Context, request: Rejuvenate) -> Result<Rejuvenated, ErrorReply> {
    let identity = context.identity_files();
    let identity = identity.as_ref().ok_or_else(|| {
        ErrorReply::new(Code::BadRequest, "the identity files were not opened before this machine was copied")
    })?;
    let random = identity.random().and_then(|random| reseed(random, &request.seed));
    random.map_err(|error| ErrorReply::io("random", &error))?;
    let clock_step_ms = clock::set(request.now_ms).map_err(|error| ErrorReply::io("clock", &error))?;
    let mut done = Rejuvenated { renewed: vec!["random", "clock"], kept: Vec::new(), clock_step_ms };
    done.note("hostname", identity.rename(&request.hostname));
    done.note("machine-id", identity.renew_machine_id(&request.machine_id));
    // No program has run in a machine made from a template: none can tell that it is a copy.
    if request.config.is_none() {
        done.note("generation", identity.renew_generation(&request.generation));
    }
    if let Some(mac) = request.mac {
        done.note("mac", network::set_hardware_address(mac));
    }
    // The secrets were given to the original; the host sends those of the copy again.
    context.secrets().forget();
    let begins = request.config.is_some();
    let mut config = context.config();
    if let Some(own) = request.config {
        *config = own;
    }
    config.env.extend(request.env);
    drop(config);
    *context.rejuvenated() = (!begins).then(|| done.clone());
    Ok(done)
}

impl Rejuvenated {
    fn note(&mut self, what: &'static str, renewed: io::Result<()>) {
        match renewed {
            Ok(()) => self.renewed.push(what),
            Err(error) => self.kept.push(Kept { what, why: error.to_string() }),
        }
    }
}

/// `struct rand_pool_info` (random(4)) around one seed.
#[repr(C)]
struct Entropy {
    bits: i32,
    bytes: i32,
    seed: [u8; 32],
}

fn reseed(random: &File, seed: &[u8; 32]) -> io::Result<()> {
    let entropy = Entropy { bits: 256, bytes: 32, seed: *seed };
    // SAFETY: the kernel reads the two numbers and as many bytes after them as the second says, which is all of `entropy`.
    unsafe { ioctl::ioctl(random, Setter::<ADD_ENTROPY, Entropy>::new(entropy)) }?;
    // SAFETY: takes no argument.
    unsafe { ioctl::ioctl(random, NoArg::<RESEED>::new()) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_requests_are_those_of_linux() {
        assert_eq!((ADD_ENTROPY, RESEED), (0x4008_5203, 0x5207));
    }

    #[test]
    fn says_what_was_kept_and_why() {
        let mut done = Rejuvenated { renewed: vec!["random"], kept: Vec::new(), clock_step_ms: -5 };
        done.note("hostname", Ok(()));
        done.note("machine-id", Err(io::Error::other("not a regular file")));
        let expected = serde_json::json!({
            "renewed": ["random", "hostname"],
            "kept": [{"what": "machine-id", "why": "not a regular file"}],
            "clockStepMs": -5,
        });
        assert_eq!(serde_json::to_value(done).unwrap(), expected);
    }
}
