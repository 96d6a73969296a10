//! A pseudo-terminal of which the agent holds both ends. So it stays a terminal, even when its last user has closed it, until its command
//! has ended.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::OFlags;
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::size::Size;

pub struct Pty {
    master: AsyncFd<OwnedFd>,
    slave: OwnedFd,
}

impl Pty {
    pub fn open(size: Size) -> io::Result<Self> {
        // NOCTTY, because the agent must not get a controlling terminal.
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        unlockpt(&master)?;
        let slave = ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        rustix::fs::fcntl_setfl(&master, OFlags::RDWR | OFlags::NONBLOCK)?;
        // SAFETY: an OwnedFd is the same open descriptor for as long as it lives.
        let master = unsafe { AsyncFd::register_with_interest(master, Interest::READABLE | Interest::WRITABLE)? };
        let pty = Self { master, slave };
        pty.resize(size)?;
        Ok(pty)
    }

    /// The end that the command uses.
    pub fn slave(&self) -> BorrowedFd<'_> {
        self.slave.as_fd()
    }

    /// Sets the terminal's size. If it changes, the kernel sends SIGWINCH to the programs in the foreground.
    pub fn resize(&self, Size { columns, rows }: Size) -> io::Result<()> {
        let size = Winsize { ws_row: rows.get(), ws_col: columns.get(), ws_xpixel: 0, ws_ypixel: 0 };
        Ok(tcsetwinsize(&self.slave, size)?)
    }

    /// Waits for output.
    pub async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut ready = self.master.readable().await?;
            if let Ok(read) = ready.try_io(|master| Ok(rustix::io::read(master, &mut *buffer)?)) {
                return read;
            }
        }
    }

    /// Reads without waiting. `WouldBlock` means that everything written so far has been read, because the kernel is asked each time.
    pub fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(self.master.get_ref(), buffer)?)
    }

    pub async fn writable(&self) {
        // An error is ignored here, because writing reports it again.
        if let Ok(mut ready) = self.master.writable().await {
            ready.retain_ready();
        }
    }

    pub fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        self.master.try_io(Interest::WRITABLE, |master| Ok(rustix::io::write(master, bytes)?))
    }
}
