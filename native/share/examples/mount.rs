//! `mount DIRECTORY MOUNTPOINT [ro]`: serves a directory to this machine's own kernel, so that a file system's tests can be run on it. Ends when
//! it is unmounted.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use machinen_share::owner::Owners;
use machinen_share::request::MAX_REQUEST;
use machinen_share::server::{Options, Server, prepare_thread};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let valid = Duration::from_secs(args.get(4).and_then(|s| s.parse().ok()).unwrap_or(0));
    let options = Options { read_only: args.get(3).is_some_and(|arg| arg == "ro"), owners: Owners::of_this_process(), valid };
    let server = Arc::new(Server::new(Path::new(&args[1]), options).unwrap());
    let device = Arc::new(open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).unwrap());
    let data = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions", device.as_raw_fd());
    let data = std::ffi::CString::new(data).unwrap();
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let (server, device) = (Arc::clone(&server), Arc::clone(&device));
            std::thread::spawn(move || serve(&server, &device))
        })
        .collect();
    mount("share", &args[2], "fuse", MountFlags::NOSUID | MountFlags::NODEV, Some(data.as_c_str())).unwrap();
    for thread in threads {
        thread.join().unwrap();
    }
}

fn serve(server: &Server, device: &OwnedFd) {
    prepare_thread().unwrap();
    let mut buffer = vec![0; MAX_REQUEST];
    loop {
        match rustix::io::read(device, &mut buffer[..]) {
            Ok(n) => {
                if let Some(answer) = server.answer(&buffer[..n]) {
                    match rustix::io::write(device, &answer) {
                        Ok(_) | Err(Errno::NOENT) => {}
                        Err(error) => eprintln!("answer to {:?}: {error}", &buffer[..40]),
                    }
                }
            }
            Err(Errno::INTR | Errno::NOENT) => {}
            Err(Errno::PERM) => std::thread::sleep(Duration::from_millis(1)),
            Err(_) => return,
        }
    }
}
