//! `mount DIRECTORY MOUNTPOINT [rw|ro] [SECONDS]`: serves a directory to this machine's own kernel, as MOUNTPOINT/share, so that a file system's
//! tests can be run on it. Ends when it is unmounted.

#![allow(clippy::unwrap_used, reason = "a tool for tests: what fails ends it")]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use machinen_share::outlet::Outlet;
use machinen_share::request::MAX_REQUEST;
use machinen_share::server::{Server, prepare_thread};
use machinen_share::share::{Share, Source};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};

/// /dev/fuse, which takes one message in each write.
struct Device(OwnedFd);

impl Outlet for Device {
    fn send(&self, message: &[u8]) -> io::Result<()> {
        match rustix::io::write(&self.0, message) {
            // The caller was interrupted, and its request is gone.
            Ok(_) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let valid = Duration::from_secs(args.get(4).and_then(|seconds| seconds.parse().ok()).unwrap_or(0));
    let read_only = args.get(3).is_some_and(|arg| arg == "ro");
    let path = args[1].clone().into();
    let share = Share::open(&Source { tag: "share".to_owned(), path, read_only, uid: None, gid: None }).unwrap();
    let device = Arc::new(Device(open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).unwrap()));
    let server = Arc::new(Server::new(vec![share], valid, Arc::clone(&device) as Arc<dyn Outlet>).unwrap());
    let number = device.0.as_raw_fd();
    let data = format!("fd={number},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions");
    let data = std::ffi::CString::new(data).unwrap();
    mount("share", &args[2], "fuse", MountFlags::NOSUID | MountFlags::NODEV, Some(data.as_c_str())).unwrap();
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let (server, device) = (Arc::clone(&server), Arc::clone(&device));
            std::thread::spawn(move || serve(&server, &device))
        })
        .collect();
    let watching = {
        let (server, device) = (Arc::clone(&server), Arc::clone(&device));
        std::thread::spawn(move || {
            // What the kernel does not know it need not forget.
            server.watch(false, |message| rustix::io::write(&device.0, message).map(drop).or(Ok(())))
        })
    };
    for thread in threads {
        thread.join().unwrap();
    }
    server.stop_watching();
    watching.join().unwrap().unwrap();
}

fn serve(server: &Server, device: &Device) {
    prepare_thread().unwrap();
    let mut buffer = vec![0; MAX_REQUEST];
    loop {
        match rustix::io::read(&device.0, &mut buffer[..]) {
            Ok(length) => {
                if let Some(answer) = server.answer(&buffer[..length]) {
                    server.send(&answer).unwrap();
                }
            }
            Err(Errno::INTR | Errno::NOENT) => {}
            Err(_) => return,
        }
    }
}
