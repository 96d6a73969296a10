//! This machine's own kernel as the guest of the program: a relay carries the messages between /dev/fuse and the program, as the guest's agent does.

use std::ffi::CString;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;

use machinen_share::abi::{self, InHeader, OutHeader, opcode};
use machinen_share::request::MAX_REQUEST;
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use zerocopy::{FromBytes, IntoBytes};

use super::{Program, plan};

pub struct Mounted {
    place: tempfile::TempDir,
    _program: Program,
}

/// Why no file system can be mounted here, if so.
pub fn missing() -> Option<&'static str> {
    if !rustix::process::geteuid().is_root() {
        return Some("only root may mount");
    }
    if !Path::new("/dev/fuse").exists() {
        return Some("there is no /dev/fuse");
    }
    None
}

impl Mounted {
    /// Mounts shares where only this thread and its children see them.
    pub fn new(shares: &[(&str, &Path, bool)]) -> Self {
        // SAFETY: only the mount namespace is this thread's own from now on.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
        let mut program = Program::start();
        let answer = program.ask(&plan(shares));
        assert_eq!(answer["ok"], true, "{answer}");
        let place = tempfile::tempdir().unwrap();
        let device = Arc::new(open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).unwrap());
        let number = device.as_raw_fd();
        let data = format!("fd={number},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions");
        let data = CString::new(data).unwrap();
        mount("share", place.path(), "fuse", MountFlags::empty(), Some(data.as_c_str())).unwrap();
        relay(&device, &program);
        Self { place, _program: program }
    }

    pub fn path(&self, path: &str) -> PathBuf {
        self.place.path().join(path)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = unmount(self.place.path(), UnmountFlags::DETACH);
    }
}

fn relay(device: &Arc<OwnedFd>, program: &Program) {
    let requests = Arc::new(Mutex::new(program.guest.try_clone().unwrap()));
    let (from, to) = (Arc::clone(device), Arc::clone(&requests));
    thread::spawn(move || {
        let mut buffer = vec![0; MAX_REQUEST];
        loop {
            match rustix::io::read(&from, &mut buffer[..]) {
                Ok(length) => {
                    if to.lock().unwrap().write_all(&buffer[..length]).is_err() {
                        return;
                    }
                }
                Err(Errno::INTR | Errno::NOENT) => {}
                Err(_) => return,
            }
        }
    });
    let (notices, taken) = mpsc::channel::<Vec<u8>>();
    let to = Arc::clone(device);
    // The kernel may take locks for a notice that a caller holds who waits for an answer.
    thread::spawn(move || {
        for notice in taken {
            let header = OutHeader::read_from_prefix(&notice).unwrap().0;
            if header.error != abi::notify::SYNC {
                let _ = rustix::io::write(&to, &notice);
                continue;
            }
            let node = u64::from_ne_bytes(notice[16..24].try_into().unwrap());
            let reply = InHeader { len: 40, opcode: opcode::NOTIFY_REPLY, node, ..InHeader::default() };
            let _ = requests.lock().unwrap().write_all(reply.as_bytes());
        }
    });
    let (mut from, to) = (program.guest.try_clone().unwrap(), Arc::downgrade(device));
    thread::spawn(move || {
        let mut header = [0; 16];
        while from.read_exact(&mut header).is_ok() {
            let length = OutHeader::read_from_prefix(&header).unwrap().0.len as usize;
            let mut message = vec![0; length];
            message[..16].copy_from_slice(&header);
            from.read_exact(&mut message[16..]).unwrap();
            let Some(device) = to.upgrade() else { return };
            if message[8..16] == [0; 8] {
                let _ = notices.send(message);
            } else {
                // The caller may be gone.
                let _ = rustix::io::write(&*device, &message);
            }
        }
    });
}
