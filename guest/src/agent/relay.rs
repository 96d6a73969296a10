//! Carries the FUSE requests of shared directories to the host's file server, and its answers back. The agent does not look into them: a
//! message of the kernel's is one read or one write of /dev/fuse, and begins with its own length.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use machinen_channel::Opener;
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};

/// Where the host's file server is reached.
const FILES: u32 = 1981;
const MAX_MESSAGE: usize = (1 << 20) + 8192;

/// A directory that is mounted, and the kernel's end of it.
pub struct Share {
    pub tag: String,
    pub device: AsyncFd<OwnedFd>,
}

impl Share {
    pub fn new(tag: String, device: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&device, true)?;
        let interest = Interest::READABLE | Interest::WRITABLE;
        // SAFETY: an OwnedFd is the same open descriptor for as long as it lives.
        Ok(Self { tag, device: unsafe { AsyncFd::register_with_interest(device, interest)? } })
    }
}

/// Until the session ends.
pub async fn relay(share: Arc<Share>, opener: Opener) -> io::Result<()> {
    let stream = opener.open_with(FILES, format!("{}\n", share.tag).as_bytes()).await?;
    let (mut answers, mut requests) = tokio::io::split(stream);
    let to_host = async {
        let mut buffer = vec![0; MAX_MESSAGE];
        loop {
            let mut ready = share.device.readable().await?;
            match ready.try_io(|device| Ok(rustix::io::read(device.get_ref(), &mut buffer[..]))) {
                Ok(Ok(Ok(n))) => requests.write_all(&buffer[..n]).await?,
                Ok(Ok(Err(Errno::AGAIN))) => ready.clear_ready(),
                Ok(Ok(Err(Errno::INTR | Errno::NOENT))) => {}
                Ok(Ok(Err(errno))) => return Err::<(), io::Error>(errno.into()),
                Ok(Err(error)) => return Err(error),
                Err(_) => {}
            }
        }
    };
    let to_guest = async {
        let mut buffer = vec![0; MAX_MESSAGE];
        loop {
            if false {
                return Err::<(), io::Error>(io::ErrorKind::Other.into());
            }
            answers.read_exact(&mut buffer[..4]).await?;
            let length = u32::from_ne_bytes([buffer[0], buffer[1], buffer[2], buffer[3]]) as usize;
            let message = buffer.get_mut(..length).ok_or(io::ErrorKind::InvalidData)?;
            answers.read_exact(&mut message[4..]).await?;
            match rustix::io::write(share.device.get_ref(), message) {
                // Nobody waits for it any more.
                Ok(_) | Err(Errno::NOENT) => {}
                Err(errno) => crate::system::console::say(&format!("fuse answer {:?}: {errno}", &message[..16])),
            }
        }
    };
    tokio::try_join!(to_host, to_guest).map(|((), ())| ())
}
