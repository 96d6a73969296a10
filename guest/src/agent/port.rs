//! The guest's ends of virtio-serial ports, and an asynchronous stream over the channel's.
//!
//! Such a device is no socket. While no host is connected, a read returns 0 (which is not end of file) and poll reports a hang-up. Tokio
//! remembers a hang-up and would call the device readable for ever, so tokio must not see it. Each direction therefore has an epoll
//! instance of its own around the device, and tokio watches that instance, which merely becomes readable whenever something happened.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, netlink, recv, socket_with};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

const PORTS: &str = "/sys/class/virtio-ports";
/// How long to wait for the port. The kernel learns a port's name from the VMM in the background, which takes a moment on a loaded host.
const APPEARS_WITHIN: Duration = Duration::from_secs(10);
/// The netlink group of the kernel's own messages (udev's are in another).
const KERNEL_EVENTS: u32 = 1;

/// The open port.
pub struct Port {
    device: OwnedFd,
    reads: Events,
    writes: Events,
}

/// The character device of the port with that name, which may not have appeared yet.
pub async fn find(name: &str) -> io::Result<String> {
    if let Some(device) = look_for(name)? {
        return Ok(device);
    }
    let appears = async {
        // Listens before looking again, so that no change in between is missed.
        let changes = Changes::listen()?;
        loop {
            if let Some(device) = look_for(name)? {
                return Ok(device);
            }
            changes.next().await?;
        }
    };
    tokio::time::timeout(APPEARS_WITHIN, appears)
        .await
        .unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::NotFound, format!("no virtio port is named {name}"))))
}

fn look_for(name: &str) -> io::Result<Option<String>> {
    match look_among_ports(name) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        found => found,
    }
}

fn look_among_ports(wanted: &str) -> io::Result<Option<String>> {
    for entry in fs::read_dir(PORTS)? {
        let name = entry?.file_name();
        let Some(name) = name.to_str() else { continue };
        if fs::read_to_string(format!("{PORTS}/{name}/name"))?.trim_end() == wanted {
            return Ok(Some(format!("/dev/{name}")));
        }
    }
    Ok(None)
}

/// Events of the kernel's devices. A port that gets its name causes one.
struct Changes(AsyncFd<OwnedFd>);

impl Changes {
    fn listen() -> io::Result<Self> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::NETLINK, SocketType::DGRAM, flags, Some(netlink::KOBJECT_UEVENT))?;
        bind(&socket, &netlink::SocketAddrNetlink::new(0, KERNEL_EVENTS))?;
        // SAFETY: an OwnedFd is the same open descriptor for as long as it lives.
        Ok(Self(unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE)? }))
    }

    /// Waits for an event, and takes all that have come since.
    async fn next(&self) -> io::Result<()> {
        let mut ready = self.0.readable().await?;
        loop {
            match recv(self.0.get_ref(), &mut [0; 1][..], RecvFlags::TRUNC) {
                // Lost events do not matter, because the caller looks for the port whatever an event said.
                Ok(_) | Err(Errno::NOBUFS | Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(errno) => return Err(errno.into()),
            }
        }
        ready.clear_ready();
        Ok(())
    }
}

impl Port {
    /// Opens the port's device.
    pub fn open(device: &str) -> io::Result<Self> {
        let device = rustix::fs::open(device, OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?;
        let reads = Events::new(&device, EventFlags::IN)?;
        let writes = Events::new(&device, EventFlags::OUT)?;
        Ok(Self { device, reads, writes })
    }
}

impl AsyncRead for Port {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            match rustix::io::read(&self.device, buf.initialize_unfilled()) {
                // 0 means that no host is connected; an event comes when one connects.
                Ok(0) | Err(Errno::AGAIN) => ready!(self.reads.poll_next(cx))?,
                Ok(n) => {
                    buf.advance(n);
                    return Poll::Ready(Ok(()));
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Poll::Ready(Err(errno.into())),
            }
        }
    }
}

impl AsyncWrite for Port {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            match rustix::io::write(&self.device, buf) {
                Err(Errno::AGAIN) => ready!(self.writes.poll_next(cx))?,
                Err(Errno::INTR) => {}
                done => return Poll::Ready(done.map_err(io::Error::from)),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// Events of the device in one direction.
struct Events(AsyncFd<OwnedFd>);

impl Events {
    fn new(device: &OwnedFd, direction: EventFlags) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, device, EventData::new_u64(0), direction | EventFlags::ET)?;
        // SAFETY: an OwnedFd is the same open descriptor for as long as it lives.
        let watched = unsafe { AsyncFd::register_with_interest(epoll, Interest::READABLE)? };
        Ok(Self(watched))
    }

    /// Waits until something has happened since the last call. Events are edge-triggered, so the caller must have tried to read or write
    /// first.
    fn poll_next(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut guard = ready!(self.0.poll_read_ready(cx))?;
        let mut event = [epoll::Event { flags: EventFlags::empty(), data: EventData::new_u64(0) }];
        // Consumes the event, so that the instance is not readable until the next one.
        epoll::wait(self.0.as_fd(), event.as_mut_slice(), Some(&rustix::event::Timespec::default()))?;
        guard.clear_ready();
        Poll::Ready(Ok(()))
    }
}
