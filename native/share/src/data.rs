//! What is in files.

use std::os::fd::OwnedFd;

use rustix::fs::{FallocateFlags, OFlags, fcntl_getfl};
use rustix::io::Errno;

use crate::abi::{self, flag};
use crate::handle::Handle;
use crate::privilege;
use crate::reply::{Answer, done, low, reply, with_room};
use crate::request::{MAX_DATA, Request};
use crate::server::Server;

impl Server {
    pub(crate) fn read(&self, mut request: Request<'_>) -> Answer {
        let asked: abi::ReadIn = request.take()?;
        let handle = self.handle(&request, asked.handle)?;
        let mut data = with_room((asked.size as usize).min(MAX_DATA));
        let mut length = 0;
        while length < data.len() {
            match rustix::io::pread(&handle.file, &mut data[length..], asked.offset + length as u64) {
                Ok(0) => break,
                Ok(n) => length += n,
                Err(Errno::INTR) => {}
                Err(errno) if length == 0 => return Err(errno),
                Err(_) => break,
            }
        }
        data.truncate(length);
        Ok(Some(data))
    }

    pub(crate) fn write(&self, mut request: Request<'_>) -> Answer {
        let asked: abi::WriteIn = request.take()?;
        let data = request.data(asked.size)?;
        let handle = self.handle(&request, asked.handle)?;
        let elsewhere = self.not_appending(&handle, asked.write_flags)?;
        let file = elsewhere.as_ref().unwrap_or(&handle.file);
        let write = || {
            let mut length = 0;
            while length < data.len() {
                match rustix::io::pwrite(file, &data[length..], asked.offset + length as u64) {
                    Ok(n) => length += n,
                    Err(Errno::INTR) => {}
                    Err(errno) if length == 0 => return Err(errno),
                    Err(_) => break,
                }
            }
            Ok(length)
        };
        let length = if asked.write_flags & flag::WRITE_KILL_SUIDGID != 0 {
            privilege::without_fsetid(write)?
        } else {
            write()?
        };
        // The guest's kernel knows that it has changed.
        handle.node.trust.set_told(0);
        reply(abi::WriteOut { size: low(length as u64), padding: 0 })
    }

    /// What a mapping has changed the guest's kernel writes by any handle. By one that appends, Linux would write it at the file's end whatever
    /// the offset: then by this file.
    fn not_appending(&self, handle: &Handle, flags: u32) -> Result<Option<OwnedFd>, Errno> {
        if flags & flag::WRITE_CACHE == 0 || !fcntl_getfl(&handle.file)?.contains(OFlags::APPEND) {
            return Ok(None);
        }
        self.reopen(&handle.node, OFlags::WRONLY).map(Some)
    }

    pub(crate) fn fsync(&self, mut request: Request<'_>) -> Answer {
        let asked: abi::FsyncIn = request.take()?;
        let handle = self.handle(&request, asked.handle)?;
        if asked.flags & flag::FSYNC_DATA != 0 {
            rustix::fs::fdatasync(&handle.file)?;
        } else {
            rustix::fs::fsync(&handle.file)?;
        }
        done()
    }

    pub(crate) fn fallocate(&self, mut request: Request<'_>) -> Answer {
        let asked: abi::FallocateIn = request.take()?;
        let flags = FallocateFlags::from_bits(asked.mode).ok_or(Errno::OPNOTSUPP)?;
        let handle = self.handle(&request, asked.handle)?;
        rustix::fs::fallocate(&handle.file, flags, asked.offset, asked.length)?;
        handle.node.trust.set_told(0);
        done()
    }

    pub(crate) fn seek(&self, mut request: Request<'_>) -> Answer {
        let asked: abi::SeekIn = request.take()?;
        let to = match asked.whence.cast_signed() {
            libc::SEEK_DATA => rustix::fs::SeekFrom::Data(asked.offset),
            libc::SEEK_HOLE => rustix::fs::SeekFrom::Hole(asked.offset),
            _ => return Err(Errno::INVAL),
        };
        // Files are read and written at offsets that are given: where the description stands does not matter.
        reply(abi::SeekOut { offset: rustix::fs::seek(&self.handle(&request, asked.handle)?.file, to)? })
    }

    pub(crate) fn copy_range(&self, mut request: Request<'_>) -> Answer {
        let asked: abi::CopyRangeIn = request.take()?;
        let (from, to) = (self.handle(&request, asked.handle_in)?, self.handle_of(asked.node_out, asked.handle_out)?);
        let length = usize::try_from(asked.length.min(1 << 30)).map_err(|_| Errno::INVAL)?;
        let (mut from_offset, mut to_offset) = (asked.offset_in, asked.offset_out);
        let copied =
            rustix::fs::copy_file_range(&from.file, Some(&mut from_offset), &to.file, Some(&mut to_offset), length)?;
        to.node.trust.set_told(0);
        reply(abi::WriteOut { size: low(copied as u64), padding: 0 })
    }

    pub(crate) fn syncfs(&self, request: Request<'_>) -> Answer {
        let root = self.node(request.header.node)?;
        rustix::fs::syncfs(self.reopen(&root, OFlags::RDONLY)?)?;
        done()
    }
}
