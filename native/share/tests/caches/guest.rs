//! This machine's own kernel as the guest: a share is mounted where only the test's thread and its children see it. The test's children are the
//! host's other processes; what the test itself does to the shared directory would be the server's own doing.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use machinen_share::outlet::Outlet;
use machinen_share::request::MAX_REQUEST;
use machinen_share::server::{Server, prepare_thread};
use machinen_share::share::{Share, Source};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount};
use rustix::thread::{UnshareFlags, set_no_new_privs, unshare_unsafe};
use tempfile::TempDir;

const HOUR: Duration = Duration::from_secs(3600);
/// A change that is not seen by then is not seen at all.
const BOUND: Duration = Duration::from_secs(10);
const OPCODES: usize = 64;

struct Device {
    file: OwnedFd,
    requests: [AtomicU64; OPCODES],
    /// Held: no notice is taken.
    notices: Mutex<()>,
}

impl Outlet for Device {
    fn send(&self, message: &[u8]) -> io::Result<()> {
        match rustix::io::write(&self.file, message) {
            Ok(_) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

pub struct Guest {
    pub host: PathBuf,
    /// The same directory, as the guest sees it.
    pub share: PathBuf,
    mounted: TempDir,
    device: Arc<Device>,
}

/// A file system in memory, where many files are made and removed quickly.
pub const MEMORY: &str = "/dev/shm";

/// A directory for a test to share; anyone may use it.
pub fn directory(within: &Path) -> TempDir {
    let dir = tempfile::tempdir_in(within).unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    dir
}

impl Guest {
    /// Serves `host` as the user of that number.
    pub fn new(host: &Path, user: u32) -> Self {
        Self::valid_for(host, user, HOUR)
    }

    pub fn valid_for(host: &Path, user: u32, valid: Duration) -> Self {
        // SAFETY: only the mount namespace is this thread's own from now on.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
        let mounted = tempfile::tempdir().unwrap();
        let file = open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let number = file.as_raw_fd();
        let data = format!("fd={number},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions");
        let data = CString::new(data).unwrap();
        mount("share", mounted.path(), "fuse", MountFlags::empty(), Some(data.as_c_str())).unwrap();
        let device =
            Arc::new(Device { file, requests: [const { AtomicU64::new(0) }; OPCODES], notices: Mutex::default() });
        let (path, outlet) = (host.to_owned(), Arc::clone(&device));
        let (started, is_started) = mpsc::channel();
        thread::spawn(move || {
            become_user(user);
            let source = Source { tag: "share".to_owned(), path, read_only: false, uid: None, gid: None };
            let way = Arc::clone(&outlet) as Arc<dyn Outlet>;
            let server = Arc::new(Server::new(vec![Share::open(&source).unwrap()], valid, way).unwrap());
            started.send(()).unwrap();
            serve(&server, &outlet);
        });
        is_started.recv().unwrap();
        let share = mounted.path().join("share");
        Self { host: host.to_owned(), share, mounted, device }
    }

    /// What another process of the host does, in the shared directory.
    pub fn on_host(&self, command: &str) {
        run(&self.host, command);
    }

    /// What a program in the guest does, in the shared directory. Its output.
    pub fn in_guest(&self, command: &str) -> String {
        run(&self.share, command)
    }

    /// Requests since the last time this was asked, by opcode.
    pub fn requests(&self) -> BTreeMap<usize, u64> {
        let counts = self.device.requests.iter().map(|count| count.swap(0, Ordering::Relaxed));
        counts.enumerate().filter(|(_, count)| *count > 0).collect()
    }

    /// While this is held the guest takes no notices.
    pub fn hold_notices(&self) -> MutexGuard<'_, ()> {
        self.device.notices.lock().unwrap()
    }

    /// Waits until the guest sees what the host did, which `is_seen` looks for. There is no event for that.
    pub fn sees(&self, what: &str, mut is_seen: impl FnMut() -> bool) {
        let start = Instant::now();
        while !is_seen() {
            assert!(start.elapsed() < BOUND, "{what} is not seen");
            thread::yield_now();
        }
        println!("{what}: seen after {:?}", start.elapsed());
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        unmount(self.mounted.path(), UnmountFlags::DETACH).unwrap();
    }
}

fn run(directory: &Path, command: &str) -> String {
    let output = Command::new("sh").args(["-ec", command]).current_dir(directory).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// This thread and those it starts, as the server of an ordinary user is started.
fn become_user(user: u32) {
    if user == 0 {
        return;
    }
    set_no_new_privs(true).unwrap();
    // SAFETY: plain numbers. The calls of libc would change all threads; these change this one.
    unsafe {
        assert_eq!(libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>()), 0);
        assert_eq!(libc::syscall(libc::SYS_setresgid, user, user, user), 0);
        assert_eq!(libc::syscall(libc::SYS_setresuid, user, user, user), 0);
    }
}

fn serve(server: &Server, device: &Device) {
    thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| work(server, device))).collect();
        // What the kernel does not know it need not forget.
        scope.spawn(|| {
            server.watch(false, |message| {
                drop(device.notices.lock());
                rustix::io::write(&device.file, message).map(drop).or(Ok(()))
            })
        });
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        server.stop_watching();
    });
}

fn work(server: &Server, device: &Device) {
    prepare_thread().unwrap();
    let mut buffer = vec![0; MAX_REQUEST];
    loop {
        match rustix::io::read(&device.file, &mut buffer[..]) {
            Ok(length) => {
                device.requests[usize::from(buffer[4]) % OPCODES].fetch_add(1, Ordering::Relaxed);
                if let Some(answer) = server.answer(&buffer[..length]) {
                    server.send(&answer).unwrap();
                }
            }
            Err(Errno::INTR | Errno::NOENT) => {}
            Err(_) => return,
        }
    }
}

/// Why these tests cannot run here, if so.
pub fn missing() -> Option<&'static str> {
    if !rustix::process::geteuid().is_root() {
        return Some("only root may mount without a helper");
    }
    if fs::metadata("/dev/fuse").is_err() {
        return Some("there is no /dev/fuse");
    }
    if fs::metadata(MEMORY).is_err() {
        return Some("there is no /dev/shm");
    }
    None
}
