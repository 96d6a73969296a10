//! Shared directories (live mounts) across a snapshot. The host of a copy knows nothing of the files that the original had open there. So
//! no process may hold such a file when a machine is saved, unless the request allows it, and a copy mounts the directories anew.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::context::Context;
use super::threads::blocking;
use crate::config::Share;
use crate::errno;
use crate::reply::{Code, ErrorReply};
use crate::system::shares;
use crate::system::step::Failed;

/// The name of the shares in the answer of `rejuvenate`.
pub const WHAT: &str = "shares";
/// How many holders an error names.
const NAMED: usize = 8;
/// How often a mount is tried again. The kernel has no event for the closing of the last file of a dead mount, and until then the device
/// takes no other mount.
const AGAIN: Duration = Duration::from_millis(250);

/// Fails if a process holds a file on one of the shares. The commands must be frozen.
pub fn refuse_holders(shares: &[Share]) -> Result<(), ErrorReply> {
    let devices: BTreeSet<u64> =
        shares.iter().filter_map(|share| Some(fs::metadata(&share.guest).ok()?.dev())).collect();
    let held = holders(&devices).map_err(|error| ErrorReply::io("/proc", &error))?;
    if held.is_empty() {
        return Ok(());
    }
    let more = held.len().saturating_sub(NAMED);
    let mut message = format!("files on shared directories are in use: {}", held[..held.len() - more].join(", "));
    if more > 0 {
        message.push_str(&format!(", and {more} more"));
    }
    Err(ErrorReply::new(Code::MountBusy, message))
}

/// The processes that hold a file on one of the devices, as `PID (NAME) PATH`.
fn holders(devices: &BTreeSet<u64>) -> io::Result<Vec<String>> {
    let own_namespace = fs::read_link("/proc/self/ns/mnt")?;
    let mut held = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let process = entry?.path();
        let Some(pid) = process.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        // A process that ends meanwhile holds nothing.
        let Some(at) = holds(&process, devices, &own_namespace) else { continue };
        let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
        let name = if pid == std::process::id() { "the guest's agent" } else { name.trim_end() };
        held.push(format!("{pid} ({name}) {at}"));
    }
    Ok(held)
}

/// The first path on one of the devices that the process holds.
fn holds(process: &Path, devices: &BTreeSet<u64>, own_namespace: &Path) -> Option<String> {
    let on_device = |link: &Path| {
        let found = fs::metadata(link).ok()?;
        devices.contains(&found.dev()).then(|| fs::read_link(link).unwrap_or_default().to_string_lossy().into_owned())
    };
    let mut links: Vec<_> = ["cwd", "root", "exe"].map(|link| process.join(link)).into();
    for directory in ["fd", "map_files"] {
        // Kernel threads have neither.
        let entries = fs::read_dir(process.join(directory)).into_iter().flatten();
        links.extend(entries.filter_map(|entry| Some(entry.ok()?.path())));
    }
    links.iter().find_map(|link| on_device(link)).or_else(|| mounted_elsewhere(process, devices, own_namespace))
}

/// A process in a mount namespace of its own holds the shares that are mounted there.
fn mounted_elsewhere(process: &Path, devices: &BTreeSet<u64>, own_namespace: &Path) -> Option<String> {
    if fs::read_link(process.join("ns/mnt")).ok()? == own_namespace {
        return None;
    }
    let mounts = fs::read_to_string(process.join("mountinfo")).ok()?;
    mounts.lines().find_map(|line| mount_on(line, devices)).map(|at| format!("{at} (its own mount)"))
}

/// The mount point of a line of `mountinfo` (proc(5)), if it is on one of the devices.
fn mount_on(line: &str, devices: &BTreeSet<u64>) -> Option<String> {
    let mut fields = line.split(' ').skip(2);
    let (major, minor) = fields.next()?.split_once(':')?;
    let device = rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?);
    devices.contains(&device).then(|| fields.nth(1).unwrap_or_default().to_owned())
}

/// Mounts the shares anew in a copy. `Some`: processes hold files of the original's mounts, and the shares are mounted once those files are
/// closed.
pub async fn renew(context: &Arc<Context>) -> Result<Option<String>, ErrorReply> {
    if context.shares.is_empty() {
        return Ok(None);
    }
    let shares = context.shares.clone();
    let abandoned = blocking(move || shares::abandon(&shares)).await?;
    abandoned.map_err(|error| ErrorReply::io("shared directories", &error))?;
    match mount(context).await {
        Ok(()) => Ok(None),
        Err(failed) if failed.is_busy() => {
            let context = Arc::clone(context);
            tokio::spawn(async move {
                let mounted = while_busy(|| mount(&context)).await;
                if let Some(done) = context.rejuvenated().as_mut() {
                    done.settle(WHAT, mounted.map_err(|failed| io::Error::other(failed.to_string())));
                }
            });
            Ok(Some("mounted once no process holds files of the original's any more".to_owned()))
        }
        Err(failed) => {
            Err(ErrorReply { code: Code::Io, message: failed.to_string(), errno: errno::of(failed.error()) })
        }
    }
}

/// Mounts on a thread, because the host's file system may not answer.
async fn mount(context: &Context) -> Result<(), Failed> {
    let shares = context.shares.clone();
    match blocking(move || shares::mount(&shares)).await {
        Ok(mounted) => mounted,
        Err(reply) => Err(Failed::new("shared directories", io::Error::other(reply.message))),
    }
}

/// Tries again while the device is busy. Any other failure is final.
async fn while_busy<F: Future<Output = Result<(), Failed>>>(mut mount: impl FnMut() -> F) -> Result<(), Failed> {
    loop {
        match mount().await {
            Err(failed) if failed.is_busy() => tokio::time::sleep(AGAIN).await,
            done => return done,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn tried(outcomes: &[Option<io::ErrorKind>]) -> (usize, bool) {
        let mut tries = 0;
        let mounted = while_busy(|| {
            let outcome = outcomes.get(tries).copied().flatten();
            tries += 1;
            std::future::ready(outcome.map_or(Ok(()), |kind| Err(Failed::new("mount", kind.into()))))
        });
        let mounted = mounted.await.is_ok();
        (tries, mounted)
    }

    #[tokio::test]
    async fn only_a_busy_device_is_tried_again() {
        const BUSY: Option<io::ErrorKind> = Some(io::ErrorKind::ResourceBusy);
        assert_eq!(tried(&[BUSY, BUSY, None]).await, (3, true));
        assert_eq!(tried(&[BUSY, Some(io::ErrorKind::NotADirectory), None]).await, (2, false));
    }

    #[test]
    fn finds_what_a_process_holds() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("held");
        let file = fs::File::create(&path).unwrap();
        let devices = BTreeSet::from([file.metadata().unwrap().dev()]);
        let own = fs::read_link("/proc/self/ns/mnt").unwrap();
        assert!(holds(Path::new("/proc/self"), &devices, &own).is_some());
        assert!(holds(Path::new("/proc/self"), &BTreeSet::from([u64::MAX]), &own).is_none());
        assert!(holds(Path::new("/proc/0"), &devices, &own).is_none());
    }

    #[test]
    fn reads_mounts() {
        let line = "36 35 98:7 /mnt1 /mnt/parent rw,noatime master:1 - ext3 /dev/root rw";
        let devices = BTreeSet::from([rustix::fs::makedev(98, 7)]);
        assert_eq!(mount_on(line, &devices).as_deref(), Some("/mnt/parent"));
        assert_eq!(mount_on(line, &BTreeSet::new()), None);
        assert_eq!(mount_on("36 35 x", &devices), None);
    }
}
