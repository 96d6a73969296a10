//! The program under this machine's own kernel: what a local file system does, a share does.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use common::kernel::{Mounted, missing};
use rustix::fs::{AtFlags, CWD, FlockOperation, Mode, OFlags, XattrFlags, flock};

/// Each test in a thread of its own, which has a mount namespace: with the host's directory and the share of it.
fn mounted(test: fn(&Path, &Path)) {
    if let Some(why) = missing() {
        println!("skipped: {why}");
        return;
    }
    let test = move || {
        let dir = tempfile::tempdir().unwrap();
        let mounted = Mounted::new(&[("work", dir.path(), false)]);
        test(dir.path(), &mounted.path("work"));
    };
    std::thread::spawn(test).join().unwrap();
}

/// A program of the host, which sees no share.
fn run(directory: &Path, command: &str) -> String {
    let output = Command::new("sh").args(["-ec", command]).current_dir(directory).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn an_open_file_is_that_file_whatever_happens_to_its_name() {
    mounted(|host, share| {
        fs::write(share.join("file"), "first").unwrap();
        let open = OpenOptions::new().read(true).write(true).open(share.join("file")).unwrap();
        run(host, "mv file elsewhere; printf other > file");
        open.set_len(3).unwrap();
        open.set_permissions(fs::Permissions::from_mode(0o600)).unwrap();
        open.set_modified(std::time::UNIX_EPOCH).unwrap();
        assert_eq!(fs::read(host.join("elsewhere")).unwrap(), b"fir");
        assert_eq!(fs::metadata(host.join("elsewhere")).unwrap().mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(host.join("elsewhere")).unwrap().mtime(), 0);
        assert_eq!(fs::read(host.join("file")).unwrap(), b"other");
        fs::write(share.join("new"), "new").unwrap();
        fs::rename(share.join("new"), share.join("elsewhere")).unwrap();
        open.write_at(b"still", 0).unwrap();
        assert_eq!((open.metadata().unwrap().nlink(), open.metadata().unwrap().len()), (0, 5));
        assert_eq!(fs::read(share.join("elsewhere")).unwrap(), b"new");
        fs::remove_file(share.join("file")).unwrap();
        assert!(!host.join("file").exists());
    });
}

#[test]
fn a_nameless_file_gets_a_name() {
    mounted(|host, share| {
        let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
        let mut file = File::from(rustix::fs::open(share, flags, Mode::from_raw_mode(0o640)).unwrap());
        file.write_all(b"text").unwrap();
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        rustix::fs::linkat(CWD, path, CWD, share.join("named"), AtFlags::SYMLINK_FOLLOW).unwrap();
        assert_eq!(fs::read(host.join("named")).unwrap(), b"text");
        assert_eq!(fs::metadata(host.join("named")).unwrap().mode() & 0o777, 0o640);
        fs::hard_link(share.join("named"), share.join("again")).unwrap();
        assert_eq!(fs::metadata(share.join("again")).unwrap().ino(), file.metadata().unwrap().ino());
    });
}

#[test]
fn a_mapping_is_written_where_it_is_though_the_file_appends() {
    mounted(|host, share| {
        fs::write(share.join("file"), vec![b'.'; 8192]).unwrap();
        let file = OpenOptions::new().read(true).append(true).open(share.join("file")).unwrap();
        // SAFETY: a new mapping of a file that is as long, and ends before the file does.
        unsafe {
            let (protection, number) = (libc::PROT_READ | libc::PROT_WRITE, file.as_raw_fd());
            let map = libc::mmap(std::ptr::null_mut(), 8192, protection, libc::MAP_SHARED, number, 0);
            assert_ne!(map, libc::MAP_FAILED);
            map.cast::<u8>().add(5000).write(b'x');
            assert_eq!(libc::msync(map, 8192, libc::MS_SYNC), 0);
            assert_eq!(libc::munmap(map, 8192), 0);
        }
        let bytes = fs::read(host.join("file")).unwrap();
        assert_eq!((bytes.len(), bytes[5000], bytes[0]), (8192, b'x', b'.'));
    });
}

#[test]
fn locks_are_the_hosts() {
    mounted(|host, share| {
        let file = File::create(share.join("file")).unwrap();
        flock(&file, FlockOperation::LockExclusive).unwrap();
        assert_eq!(run(host, "flock -n file true || echo taken"), "taken\n");
        drop(file);
        let file = File::options().write(true).open(share.join("file")).unwrap();
        rustix::fs::fcntl_lock(&file, FlockOperation::LockExclusive).unwrap();
        let other = File::options().write(true).open(host.join("file")).unwrap();
        let mut lock = libc::flock {
            l_type: libc::c_short::try_from(libc::F_WRLCK).unwrap(),
            l_whence: 0,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        // SAFETY: the structure is the command's.
        assert_eq!(unsafe { libc::fcntl(other.as_raw_fd(), libc::F_OFD_SETLK, &raw mut lock) }, -1);
        drop(file);
        // SAFETY: as above.
        assert_eq!(unsafe { libc::fcntl(other.as_raw_fd(), libc::F_OFD_SETLK, &raw mut lock) }, 0);
    });
}

#[test]
fn fifos_sockets_attributes_and_names_of_any_bytes() {
    mounted(|host, share| {
        run(share, "mkfifo fifo; echo through > fifo & cat fifo > out; wait");
        assert_eq!(fs::read(host.join("out")).unwrap(), b"through\n");
        let _listener = std::os::unix::net::UnixListener::bind(share.join("socket")).unwrap();
        std::os::unix::net::UnixStream::connect(share.join("socket")).unwrap();
        assert!(fs::metadata(host.join("socket")).unwrap().file_type().is_socket());
        let name = OsStr::from_bytes(b"\xff\x01\n* name");
        fs::write(share.join(name), "").unwrap();
        assert!(host.join(name).exists());
        let out = share.join("out");
        rustix::fs::setxattr(&out, "user.kept", b"value", XattrFlags::CREATE).unwrap();
        let mut value = [0; 16];
        assert_eq!(rustix::fs::getxattr(host.join("out"), "user.kept", &mut value[..]).unwrap(), 5);
        assert!(rustix::fs::setxattr(&out, "trusted.no", b"value", XattrFlags::empty()).is_err());
        std::os::unix::fs::symlink("out", share.join("link")).unwrap();
        assert_eq!(fs::read(share.join("link")).unwrap(), b"through\n");
    });
}

#[test]
fn other_users_have_what_their_groups_allow_and_writes_end_set_user_id() {
    mounted(|host, share| {
        run(host, "mkdir group; chgrp 50 group; chmod 2775 group; printf x > suid; chmod 6777 suid");
        let as_user = |command: &str| {
            let as_user = ["--reuid=1000", "--regid=1000", "--groups=50", "sh", "-ec", command];
            Command::new("setpriv").args(as_user).current_dir(share).status().unwrap().success()
        };
        // The directory is on the way to the share.
        fs::set_permissions(host, fs::Permissions::from_mode(0o755)).unwrap();
        fs::set_permissions(share.parent().unwrap().parent().unwrap(), fs::Permissions::from_mode(0o1777)).unwrap();
        assert!(as_user("echo made > group/file"));
        let made = fs::metadata(host.join("group/file")).unwrap();
        assert_eq!((made.uid(), made.gid()), (1000, 50));
        assert!(!as_user("echo no > not-there"));
        assert!(as_user("echo more >> suid"));
        assert_eq!(fs::metadata(host.join("suid")).unwrap().mode() & 0o6000, 0);
    });
}

#[test]
fn large_files_and_large_directories() {
    mounted(|host, share| {
        let mut file =
            OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(share.join("large")).unwrap();
        file.seek(SeekFrom::Start(5 << 30)).unwrap();
        file.write_all(b"far").unwrap();
        assert_eq!(rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(0)).unwrap() >> 30, 5);
        assert!(fs::metadata(host.join("large")).unwrap().blocks() < 1000);
        let mut end = String::new();
        file.seek(SeekFrom::End(-3)).unwrap();
        file.read_to_string(&mut end).unwrap();
        assert_eq!(end, "far");
        fs::create_dir(share.join("many")).unwrap();
        (0..3000).for_each(|n| drop(File::create(host.join(format!("many/{n}"))).unwrap()));
        let names: std::collections::HashSet<_> =
            fs::read_dir(share.join("many")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names.len(), 3000);
        fs::remove_dir_all(share.join("many")).unwrap();
        assert!(!host.join("many").exists());
    });
}
