//! What this process gives up before it serves a guest, so that a guest that gets it to do what it likes has its shares and nothing else.

mod paths;
mod rights;
mod seccomp;

use crate::share::Share;

/// Confines the calling thread, and those it starts later. What is not served yet is to be opened before.
///
/// Says which confinements are in force: `landlock` (only the shares can be opened, the read-only ones not for writing), `mounts` (read-only shares
/// are mounts that are), `seccomp` (only the system calls that serving takes). Other rights are given up on every kernel.
///
/// # Errors
/// A right that could not be given up, though the kernel knows it.
pub fn confine(shares: &[Share]) -> std::io::Result<Vec<&'static str>> {
    let mut confinements = Vec::new();
    rights::reduce()?;
    if paths::restrict(shares)? {
        confinements.push("landlock");
    }
    let mut read_only = shares.iter().filter(|share| share.read_only);
    if shares.iter().any(|share| share.read_only) && read_only.all(|share| share.is_sealed) {
        confinements.push("mounts");
    }
    if seccomp::filter(shares.iter().any(|share| !share.read_only))? {
        confinements.push("seccomp");
    }
    Ok(confinements)
}

#[cfg(test)]
mod tests {
    use std::ffi::CString;
    use std::fs;
    use std::os::unix::ffi::OsStrExt;
    use std::path::{Path, PathBuf};

    use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags, Timestamps, XattrFlags, unlinkat};
    use rustix::io::Errno;

    use super::*;
    use crate::share::Source;

    struct Tree {
        dir: tempfile::TempDir,
        shares: Vec<Share>,
    }

    impl Tree {
        fn path(&self, name: &str) -> PathBuf {
            self.dir.path().join(name)
        }
    }

    /// A share that is read-only, one that is not, a file of its own, and what is beside them. `only` shares those with that tag.
    fn tree(only: &str) -> Tree {
        let dir = tempfile::tempdir().unwrap();
        for name in ["ro", "rw", "beside"] {
            fs::create_dir_all(dir.path().join(name).join("directory")).unwrap();
            fs::write(dir.path().join(name).join("file"), name).unwrap();
        }
        fs::write(dir.path().join("single"), "single").unwrap();
        let sources = [("ro", true), ("rw", false), ("single", true)].map(|(tag, read_only)| Source {
            tag: tag.to_owned(),
            path: dir.path().join(tag),
            read_only,
            uid: None,
            gid: None,
        });
        let shares =
            sources.iter().filter(|source| only.is_empty() || source.tag == only).map(|s| Share::open(s).unwrap());
        let shares = shares.collect();
        Tree { dir, shares }
    }

    /// Confines a thread of its own and has it try something there; nothing if this kernel lacks a confinement, which is said.
    fn confined<T: Send + 'static>(
        tree: Tree,
        needed: &'static [&'static str],
        attempt: impl FnOnce(&Tree) -> T + Send + 'static,
    ) -> Option<T> {
        let attempt = move || {
            let in_force = confine(&tree.shares).unwrap();
            if let Some(missing) = needed.iter().find(|needed| !in_force.contains(needed)) {
                eprintln!("skipped: no {missing} here");
                // The directory cannot be removed from here.
                return (None, tree);
            }
            (Some(attempt(&tree)), tree)
        };
        let (result, _tree) = std::thread::spawn(attempt).join().unwrap();
        result
    }

    fn open(path: impl AsRef<Path>, flags: OFlags) -> Result<(), Errno> {
        rustix::fs::openat(CWD, path.as_ref(), flags | OFlags::CLOEXEC, Mode::from_raw_mode(0o644)).map(drop)
    }

    fn rename(from: PathBuf, to: PathBuf) -> Result<(), Errno> {
        rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::empty())
    }

    #[test]
    fn only_shares_can_be_opened_and_read_only_ones_not_for_writing() {
        let tried = confined(tree(""), &["landlock"], |tree| {
            let (read, write) = (OFlags::RDONLY, OFlags::WRONLY);
            [
                open("/etc/passwd", read),
                open(tree.path("beside/file"), read),
                open(tree.path("beside/new"), write | OFlags::CREATE),
                open(tree.path("ro/file"), write),
                open(tree.path("ro/file"), read | OFlags::TRUNC),
                open(tree.path("ro/new"), write | OFlags::CREATE),
                open(tree.path("single"), write),
                unlinkat(CWD, tree.path("ro/file"), AtFlags::empty()),
                rustix::fs::mkdirat(CWD, tree.path("ro/new"), Mode::empty()),
                rename(tree.path("ro/file"), tree.path("ro/other")),
                open(tree.path("ro/file"), read),
                open(tree.path("ro/directory"), read),
                open(tree.path("single"), read),
                open(tree.path("rw/file"), OFlags::RDWR),
                open(tree.path("rw/new"), write | OFlags::CREATE),
                // From one directory to another, which the first Landlock refused always.
                rename(tree.path("rw/new"), tree.path("rw/directory/new")),
                unlinkat(CWD, tree.path("rw/directory/new"), AtFlags::empty()),
            ]
        });
        if let Some(tried) = tried {
            for (n, tried) in tried.into_iter().enumerate() {
                let refused = matches!(tried, Err(Errno::ACCESS | Errno::ROFS));
                assert_eq!(refused, n < 10, "attempt {n}: {tried:?}");
                assert!(refused || tried.is_ok(), "attempt {n}: {tried:?}");
            }
        }
    }

    /// What Landlock does not know of: attributes.
    #[test]
    fn a_read_only_share_keeps_its_attributes() {
        let change = |tree: &Tree| {
            // As the server does it: from the descriptor that it has of the share.
            let share = &tree.shares[0].file;
            let path = CString::new(tree.path("ro/file").as_os_str().as_bytes()).unwrap();
            [
                rustix::fs::chmodat(share, "file", Mode::from_raw_mode(0o777), AtFlags::empty()),
                rustix::fs::chownat(share, "file", None, None, AtFlags::empty()),
                rustix::fs::utimensat(
                    share,
                    "file",
                    &Timestamps {
                        last_access: rustix::fs::Timespec { tv_sec: 1, tv_nsec: 0 },
                        last_modification: rustix::fs::Timespec { tv_sec: 1, tv_nsec: 0 },
                    },
                    AtFlags::empty(),
                ),
                rustix::fs::setxattr(&path, "user.name", b"value", XattrFlags::empty()),
            ]
        };
        // Beside a share that is not read-only only a mount keeps them; by path the file is the host's.
        if let Some(tried) = confined(tree(""), &["mounts"], change) {
            assert_eq!(tried[..3], [Err(Errno::ROFS); 3]);
        }
        // Alone, system calls that change something are refused whatever they are about.
        if let Some(tried) = confined(tree("ro"), &["seccomp"], change) {
            for tried in tried {
                assert!(matches!(tried, Err(Errno::PERM | Errno::ROFS)), "{tried:?}");
            }
        }
    }

    #[test]
    fn nothing_can_be_run_or_connected_or_signalled() {
        let parent = i64::from(rustix::process::getppid().unwrap().as_raw_pid());
        let attempt = move |_: &Tree| {
            let arguments = [c"true".as_ptr(), std::ptr::null()];
            let address = |pointer: *const *const libc::c_char| pointer as i64;
            let (inet, unix, stream) = (libc::AF_INET.into(), libc::AF_UNIX.into(), libc::SOCK_STREAM.into());
            [
                (libc::SYS_execve, [c"/bin/true".as_ptr() as i64, address(&raw const arguments[0]), 0]),
                (libc::SYS_socket, [inet, stream, 0]),
                (libc::SYS_socket, [unix, stream, 0]),
                (libc::SYS_kill, [parent, 0, 0]),
                (libc::SYS_ptrace, [libc::PTRACE_ATTACH.into(), parent, 0]),
                (libc::SYS_unshare, [libc::CLONE_NEWUSER.into(), 0, 0]),
            ]
            .map(|(call, [one, two, three])| {
                // SAFETY: numbers, and pointers to a string and a list that outlive the call.
                let result = unsafe { libc::syscall(call, one, two, three) };
                if result < 0 { Err(crate::reply::last_errno()) } else { Ok(()) }
            })
        };
        if let Some(tried) = confined(tree(""), &["seccomp"], attempt) {
            assert_eq!(tried, [Err(Errno::PERM); 6]);
        }
    }

    #[test]
    fn few_capabilities_stay() {
        let sets = |status: &str| {
            let set = |line: &str| line.starts_with("Cap").then(|| line.rsplit('\t').next().map(str::to_owned));
            status.lines().filter_map(set).flatten().collect::<Vec<_>>()
        };
        let status = std::thread::spawn(move || {
            let mut status = fs::File::open("/proc/thread-self/status").unwrap();
            rights::reduce().unwrap();
            std::io::read_to_string(&mut status).unwrap()
        });
        let status = status.join().unwrap();
        // Inheritable, permitted, effective, bounding, ambient.
        if rustix::process::geteuid().is_root() {
            let kept = format!("{:016x}", rights::KEPT.bits());
            let none = format!("{:016x}", 0);
            assert_eq!(sets(&status), [none.as_str(), &kept, &kept, &kept, &none]);
        }
        assert!(status.contains("NoNewPrivs:\t1"));
    }
}
