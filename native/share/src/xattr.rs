//! Extended attributes of files.

use std::ffi::CStr;

use rustix::fs::XattrFlags;
use rustix::io::Errno;

use crate::abi;
use crate::node::Node;
use crate::reply::{Answer, done, low, reply};
use crate::request::Request;
use crate::server::Server;

impl Server {
    pub(crate) fn path(node: &Node) -> String {
        format!("/proc/self/fd/{}", node.number())
    }

    pub(crate) fn getxattr(&self, mut request: Request<'_>) -> Answer {
        let asked: abi::GetxattrIn = request.take()?;
        let name = attribute(request.text()?)?;
        let mut value = vec![0; (asked.size as usize).min(65_536)];
        let length = rustix::fs::getxattr(Self::path(&*self.node(request.header.node)?), name, &mut value[..])?;
        sized(asked.size, value, length)
    }

    pub(crate) fn listxattr(&self, mut request: Request<'_>) -> Answer {
        let asked: abi::GetxattrIn = request.take()?;
        let mut names = vec![0; 65_536];
        let length = rustix::fs::listxattr(Self::path(&*self.node(request.header.node)?), &mut names[..])?;
        names.truncate(length);
        let allowed: Vec<u8> = names
            .split_inclusive(|byte| *byte == 0)
            .filter(|name| CStr::from_bytes_with_nul(name).is_ok_and(|name| attribute(name).is_ok()))
            .flatten()
            .copied()
            .collect();
        if asked.size != 0 && allowed.len() > asked.size as usize {
            return Err(Errno::RANGE);
        }
        let length = allowed.len();
        sized(asked.size, allowed, length)
    }

    pub(crate) fn setxattr(&self, mut request: Request<'_>) -> Answer {
        let asked: abi::SetxattrIn = request.take()?;
        let name = attribute(request.text()?)?;
        let value = request.data(asked.size)?;
        let flags = XattrFlags::from_bits(asked.flags).ok_or(Errno::INVAL)?;
        rustix::fs::setxattr(Self::path(&*self.node(request.header.node)?), name, value, flags)?;
        done()
    }

    pub(crate) fn removexattr(&self, mut request: Request<'_>) -> Answer {
        let name = attribute(request.text()?)?;
        rustix::fs::removexattr(Self::path(&*self.node(request.header.node)?), name)?;
        done()
    }
}

/// Attributes that mean the same on both sides, and give no rights on this host.
fn attribute(name: &CStr) -> Result<&CStr, Errno> {
    let bytes = name.to_bytes();
    let allowed = bytes.starts_with(b"user.") || bytes.starts_with(b"system.posix_acl_");
    if allowed { Ok(name) } else { Err(Errno::OPNOTSUPP) }
}

/// An attribute's value, or its size if that was asked for.
fn sized(asked: u32, mut value: Vec<u8>, length: usize) -> Answer {
    if asked == 0 {
        return reply(abi::GetxattrOut { size: low(length as u64), padding: 0 });
    }
    value.truncate(length);
    Ok(Some(value))
}
