//! The directory that is mounted: the server's own, with one entry for each share. Nothing in it can be changed.

use std::ffi::CStr;

use rustix::io::Errno;

use crate::abi::{self, Attr, EntryOut, ROOT, opcode};
use crate::coverage::Valid;
use crate::directory;
use crate::nodes::Nodes;
use crate::reply::{Answer, done, reply};
use crate::request::{MAX_DATA, Request};
use crate::server::Server;
use crate::share;

/// The handle that every guest has when it has opened the root; others begin behind it.
const HANDLE: u64 = 0;
const MODE: u32 = 0o040_555;

impl Server {
    pub(crate) fn serve_root(&self, mut request: Request<'_>) -> Answer {
        match request.header.opcode {
            opcode::LOOKUP => reply(self.find_share(request.name()?)?),
            opcode::GETATTR => self.attr_out(self.root_attributes(), true),
            opcode::OPENDIR => reply(abi::OpenOut { handle: HANDLE, ..abi::OpenOut::default() }),
            opcode::RELEASEDIR | opcode::FSYNCDIR | opcode::SYNCFS => done(),
            opcode::READDIR => self.read_root(request, false),
            opcode::READDIRPLUS => self.read_root(request, true),
            opcode::STATFS => reply(abi::StatfsOut { block_size: 4096, name_len: 255, ..abi::StatfsOut::default() }),
            opcode::GETXATTR | opcode::LISTXATTR => Err(Errno::OPNOTSUPP),
            opcode::OPEN => Err(Errno::ISDIR),
            opcode::SETLK | opcode::SETLKW | opcode::GETLK => Err(Errno::BADF),
            opcode::SETATTR | opcode::SYMLINK | opcode::MKNOD | opcode::MKDIR | opcode::UNLINK => Err(Errno::ROFS),
            opcode::RMDIR | opcode::RENAME | opcode::RENAME2 | opcode::LINK => Err(Errno::ROFS),
            opcode::CREATE | opcode::TMPFILE | opcode::SETXATTR | opcode::REMOVEXATTR => Err(Errno::ROFS),
            _ => Err(Errno::NOSYS),
        }
    }

    fn root_attributes(&self) -> Attr {
        Attr { ino: ROOT, mode: MODE, nlink: 2, block_size: 4096, ..Attr::default() }
    }

    fn find_share(&self, tag: &CStr) -> Result<EntryOut, Errno> {
        let place = share::by_tag(&self.shares, tag).ok_or(Errno::NOENT)?;
        let number = Nodes::of_share(place);
        let node = self.node(number)?;
        self.coverage.mark(number, &node);
        let status = node.status()?;
        let attributes = self.coverage.tell(None, b"", number, &node, &status).attributes;
        Ok(self.entry_out(number, &node, &status, Valid { name: true, attributes }))
    }

    fn read_root(&self, mut request: Request<'_>, plus: bool) -> Answer {
        let asked: abi::ReadIn = request.take()?;
        let mut answer = directory::Answer::new((asked.size as usize).min(MAX_DATA));
        let first = usize::try_from(asked.offset).map_err(|_| Errno::INVAL)?;
        for (place, share) in self.shares.iter().enumerate().skip(first) {
            let number = Nodes::of_share(place);
            let node = self.node(number)?;
            let entry = directory::Entry::new(&share.tag, number, node.kind, place as u64 + 1);
            // The guest looks each up: it does so once.
            let added = if plus { answer.add_with_attributes(&entry, EntryOut::default()) } else { answer.add(&entry) };
            if !added {
                break;
            }
        }
        Ok(Some(answer.bytes))
    }
}
