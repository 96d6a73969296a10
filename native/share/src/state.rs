//! The state of a server in a file, and a server that goes on with it: the guest was copied, and its kernel knows files by their numbers and has
//! files open.
//!
//! The file is text, of JSON lines: one about the whole, then one for each file that the guest knows, for each that it has open, for each name
//! that it believes (`resume`), and for each notice that it may not have got. A file is found again by its path, and is the same if inode, kind
//! and time of birth are (without a time of birth: the device). Another directory at the same path is taken for a directory that is gone,
//! because what is in it matters. What is not found again gives EIO wherever the guest uses its number.

use std::collections::HashMap;
use std::io::{self, BufRead, ErrorKind, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, openat2, readlinkat};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::believed::MOST_NAMES;
use crate::node::Node;
use crate::nodes::Nodes;
use crate::notice::Notice;
use crate::reply::words;
use crate::resume::Belief;
use crate::server::Server;

const VERSION: u32 = 1;
/// The longest line: a path of PATH_MAX bytes, each escaped, and some numbers.
const MAX_LINE: u64 = 64 << 10;

/// How many bytes are told of files that are lost. The shim takes an answer of 1 MiB, in which a byte of a path may be six.
const MOST_TOLD: usize = 128 << 10;

/// The line about the whole.
#[derive(Deserialize, Serialize)]
struct Head {
    version: u32,
    tags: Vec<String>,
    started: bool,
    next_node: u64,
    next_handle: u64,
    devices: Vec<u64>,
    nodes: usize,
    handles: usize,
    /// What the guest believes of names, and the notices that it may not have got.
    names: usize,
    notices: usize,
}

/// A file that the guest knows.
#[derive(Deserialize, Serialize)]
struct SavedNode {
    number: u64,
    lookups: u64,
    share: usize,
    /// From the share, each byte as the character with its number; `None`: it has no name any more.
    path: Option<String>,
    looks: Looks,
    belief: Belief,
}

/// What a file is told by.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
struct Looks {
    device: u64,
    inode: u64,
    kind: u32,
    /// As `Node::born`.
    born: u64,
}

/// A file that the guest has open.
#[derive(Deserialize, Serialize)]
struct SavedHandle {
    number: u64,
    node: u64,
    flags: u32,
}

/// An open file that is no more, or another.
#[derive(Debug, Eq, PartialEq, Serialize)]
pub struct Lost {
    tag: String,
    path: String,
    why: String,
}

impl Server {
    /// Writes the state. No request may be under way.
    ///
    /// # Errors
    /// Those of the file.
    pub fn save(&self, file: impl Write) -> io::Result<()> {
        let mut file = io::BufWriter::new(file);
        let nodes = self.nodes().list();
        let (handles, next_handle) = self.handles().list();
        let (names, notices) = self.coverage.beliefs();
        let roots = self.shares.iter().map(|share| self.path_of(&share.file)).collect::<Result<Vec<_>, _>>()?;
        let head = Head {
            version: VERSION,
            tags: self.shares.iter().map(|share| share.tag.to_string_lossy().into_owned()).collect(),
            started: self.started.load(Ordering::Acquire),
            next_node: self.nodes().next(),
            next_handle,
            devices: self.devices().list(),
            nodes: nodes.len(),
            handles: handles.len(),
            names: names.len(),
            notices: notices.len(),
        };
        line(&mut file, &head)?;
        for (number, lookups, node) in nodes {
            let share = node.identity.share;
            let looks = Looks::of(&node);
            let path = self.path_of(&node).ok().and_then(|path| below(&roots[share], &path));
            // A name may be another file's by now.
            let path = path.filter(|path| self.open_below(share, path).is_ok_and(|found| looks.is(&Looks::of(&found))));
            line(
                &mut file,
                &SavedNode {
                    number,
                    lookups,
                    share,
                    path: path.as_deref().map(escaped),
                    looks,
                    belief: Belief::of(&node),
                },
            )?;
        }
        for (number, handle) in handles {
            let flags = rustix::fs::fcntl_getfl(&handle.file)?.bits();
            line(&mut file, &SavedHandle { number, node: handle.number, flags })?;
        }
        names.iter().try_for_each(|name| line(&mut file, name))?;
        notices.iter().try_for_each(|notice| line(&mut file, notice))?;
        file.flush()
    }

    /// Goes on with a state. Returns what was open and is not any more. An empty file is that of a server that had ended, with which the guest's connection has ended.
    ///
    /// # Errors
    /// Those of the file, and `InvalidData` for what is no state of these shares.
    pub fn load(&self, mut file: impl BufRead) -> io::Result<Vec<Lost>> {
        if file.fill_buf()?.is_empty() {
            return Ok(Vec::new());
        }
        let head: Head = read(&mut file)?;
        let tags = self.shares.iter().map(|share| share.tag.to_string_lossy().into_owned());
        if head.version != VERSION || !tags.eq(head.tags.iter().cloned()) {
            return Err(invalid("the state is of another version, or of other shares"));
        }
        self.devices().go_on_with(head.devices.clone());
        let mut all_lost = Vec::new();
        let mut paths = HashMap::new();
        let mut beliefs = HashMap::new();
        for _ in 0..head.nodes {
            let saved: SavedNode = read(&mut file)?;
            if saved.share >= self.shares.len() {
                return Err(invalid("a file of no share"));
            }
            let path = saved.path.as_deref().map(unescaped).transpose()?;
            beliefs.insert(saved.number, saved.belief);
            let node = path.as_ref().and_then(|path| self.found_again(saved.share, path, &saved.looks));
            self.nodes().go_on_with(saved.number, saved.lookups, node).map_err(|_| invalid("a number is taken"))?;
            if let Some(path) = path {
                paths.insert(saved.number, (saved.share, path));
            }
        }
        self.nodes().go_on_at(head.next_node);
        let mut told = 0;
        for _ in 0..head.handles {
            let saved: SavedHandle = read(&mut file)?;
            let open = self.open_again(&saved);
            if let Err(errno) = &open
                && told < MOST_TOLD
            {
                let lost = self.lost(&head.tags, paths.get(&saved.node), *errno);
                told += lost.path.len() + 100;
                all_lost.push(lost);
            }
            self.handles().go_on_with(saved.number, open.ok()).map_err(|_| invalid("a handle is taken"))?;
        }
        self.handles().go_on_at(head.next_handle);
        self.go_on_believing(&head, beliefs, &mut file)?;
        self.started.store(head.started, Ordering::Release);
        Ok(all_lost)
    }

    /// What is told of a file that was open and is not any more. `at`: its share and path, if it had a name.
    fn lost(&self, tags: &[String], at: Option<&(usize, Vec<u8>)>, errno: Errno) -> Lost {
        let Some((share, path)) = at else {
            return Lost { tag: String::new(), path: String::new(), why: "it had no name any more".to_owned() };
        };
        let why = match self.open_below(*share, path) {
            // Its number is that of a lost file, and there is another one.
            Ok(_) if errno == Errno::IO => "another file has its name".to_owned(),
            Ok(_) => words(errno),
            Err(errno) => words(errno),
        };
        let tag = tags.get(*share).cloned().unwrap_or_default();
        Lost { tag, path: String::from_utf8_lossy(path).into_owned(), why }
    }

    /// The path that leads to a file now, as this process sees it.
    pub(crate) fn path_of(&self, file: impl AsFd) -> Result<Vec<u8>, Errno> {
        let number = file.as_fd().as_raw_fd().to_string();
        readlinkat(&self.descriptors, number, Vec::new()).map(std::ffi::CString::into_bytes)
    }

    /// What is at a path in a share. No link is followed, and nothing outside is reached.
    fn open_below(&self, share: usize, path: &[u8]) -> Result<Node, Errno> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let within = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let root = &self.shares.get(share).ok_or(Errno::NOENT)?.file;
        Ok(Node::new(openat2(root, path, flags, Mode::empty(), within)?, share)?.0)
    }

    /// The file at a path, if it is the one that had these looks.
    fn found_again(&self, share: usize, path: &[u8], looks: &Looks) -> Option<Node> {
        let node = self.open_below(share, path).ok()?;
        let found = Looks::of(&node);
        let is_directory = found.kind == looks.kind && node.kind == FileType::Directory;
        (found.is(looks) || is_directory).then_some(node)
    }

    /// Goes on telling the guest what is no longer as it believes.
    fn go_on_believing(
        &self,
        head: &Head,
        mut beliefs: HashMap<u64, Belief>,
        file: &mut impl BufRead,
    ) -> io::Result<()> {
        if head.names > MOST_NAMES || head.notices > 2 * MOST_NAMES {
            return Err(invalid("the guest cannot believe so much"));
        }
        let names = (0..head.names).map(|_| read(file)).collect::<io::Result<_>>()?;
        let mut notices = (0..head.notices).map(|_| read(file)).collect::<io::Result<Vec<_>>>()?;
        let mut files = HashMap::new();
        for (number, _, node) in self.nodes().list() {
            files.extend(beliefs.remove(&number).map(|belief| (number, (node, belief))));
        }
        for number in (0..self.shares.len()).map(Nodes::of_share) {
            // Little enough to be asked for again.
            notices.push(Notice::Inode { node: number, pages: true });
            let node = self.node(number).map_err(io::Error::from)?;
            let belief = Belief::of(&node);
            files.insert(number, (node, belief));
        }
        self.coverage.go_on_with(names, notices, files);
        Ok(())
    }

    fn open_again(&self, saved: &SavedHandle) -> Result<(OwnedFd, u64, Arc<Node>), Errno> {
        let node = self.node(saved.node)?;
        // A copy's share may be read-only where the original's was not. Then the file can be read by what was open for both.
        let mode = if self.share(&node).read_only { OFlags::empty() } else { OFlags::ACCMODE };
        let kept = mode | OFlags::APPEND | OFlags::DSYNC | OFlags::SYNC | OFlags::DIRECTORY;
        Ok((self.reopen(&node, OFlags::from_bits_retain(saved.flags) & kept)?, saved.node, node))
    }
}

impl Looks {
    fn of(node: &Node) -> Self {
        let (device, inode) = (node.identity.device, node.identity.inode);
        Self { device, inode, kind: node.kind.as_raw_mode(), born: node.born }
    }

    /// Whether they are those of the same file. The number of a device may be another after this host has started again.
    fn is(&self, other: &Self) -> bool {
        let same_birth = self.born == other.born && (self.born != 0 || self.device == other.device);
        self.inode == other.inode && self.kind == other.kind && same_birth
    }
}

/// The part of a path behind that of the share.
fn below(root: &[u8], path: &[u8]) -> Option<Vec<u8>> {
    let rest = path.strip_prefix(root)?;
    let rest = if root == b"/" { rest } else { rest.strip_prefix(b"/")? };
    (!rest.is_empty()).then(|| rest.to_vec())
}

fn escaped(path: &[u8]) -> String {
    path.iter().map(|byte| char::from(*byte)).collect()
}

fn unescaped(path: &str) -> io::Result<Vec<u8>> {
    path.chars().map(|character| u8::try_from(character).map_err(|_| invalid("a path of no bytes"))).collect()
}

fn line(file: &mut impl Write, value: &impl Serialize) -> io::Result<()> {
    serde_json::to_writer(&mut *file, value)?;
    file.write_all(b"\n")
}

fn read<T: for<'a> Deserialize<'a>>(file: &mut impl BufRead) -> io::Result<T> {
    let mut line = Vec::new();
    io::Read::take(&mut *file, MAX_LINE).read_until(b'\n', &mut line)?;
    Ok(serde_json::from_slice(&line)?)
}

fn invalid(why: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_any_bytes_come_back() {
        let path: Vec<u8> = (1..=255).collect();
        assert_eq!(unescaped(&escaped(&path)).unwrap(), path);
        assert!(unescaped("\u{100}").is_err());
    }

    #[test]
    fn a_path_is_cut_at_the_share() {
        assert_eq!(below(b"/srv", b"/srv/a/b").as_deref(), Some(&b"a/b"[..]));
        assert_eq!(below(b"/", b"/a").as_deref(), Some(&b"a"[..]));
        assert_eq!(below(b"/srv", b"/srv"), None);
        assert_eq!(below(b"/srv", b"/srv2/a"), None);
    }
}
