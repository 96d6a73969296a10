//! The machine's name: in the kernel, in /etc/hostname, and in /etc/hosts, where programs find the addresses of `localhost` and of their
//! own host.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

const HOSTNAME: &str = "etc/hostname";
const HOSTS: &str = "etc/hosts";
/// The address of the machine's own name, as in Debian. It exists without a network too.
const OWN_ADDRESS: &str = "127.0.1.1";
/// The names that every machine's /etc/hosts has, each with the line that is added if it is missing.
const LOCALHOST: [(&str, &str); 2] =
    [("127.0.0.1", "127.0.0.1\tlocalhost\n"), ("::1", "::1\tlocalhost ip6-localhost ip6-loopback\n")];
/// Files larger than this, in bytes, are left as they are.
const MAX_FILE: u64 = 1 << 20;

/// The kernel's host name.
pub fn current() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// Gives a running machine another name, in the kernel and in its files.
pub fn rename(hostname: &str, files: &Names) -> io::Result<()> {
    let old = current();
    set(hostname)?;
    files.rename(&old, hostname)
}

/// Sets the kernel's host name.
pub fn set(hostname: &str) -> io::Result<()> {
    rustix::system::sethostname(hostname.as_bytes())?;
    Ok(())
}

/// Writes both files below `root`, and keeps what they say of other hosts. With `keep`, a file that exists stays as it is.
pub fn write(root: &Path, name: &str, keep: bool) -> io::Result<()> {
    let hosts = root.join(HOSTS);
    fs::create_dir_all(root.join("etc"))?;
    // The name of the machine from which this root was copied, or in which the image was made.
    let old = read(&root.join(HOSTNAME))?;
    if old.is_none() || !keep {
        replace(&root.join(HOSTNAME), &format!("{name}\n"))?;
    }
    match read(&hosts)? {
        Some(_) if keep => Ok(()),
        text => {
            let text = text.unwrap_or_default();
            let new = complete(&renamed(&text, old.as_deref().unwrap_or_default().trim(), name), name);
            if new == text { Ok(()) } else { replace(&hosts, &new) }
        }
    }
}

/// The text of a regular file, or `None` if there is no file. A link is refused, because another program keeps its target.
fn read(path: &Path) -> io::Result<Option<String>> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_file() && found.len() <= MAX_FILE => Ok(Some(fs::read_to_string(path)?)),
        Ok(_) => Err(io::Error::other("not a small regular file")),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether a file is in a shared directory, so that it is not this machine's to change.
pub fn is_the_hosts(file: &File) -> bool {
    rustix::fs::fstatfs(file).is_ok_and(|found| found.f_type == libc::FUSE_SUPER_MAGIC)
}

fn replace(path: &Path, text: &str) -> io::Result<()> {
    set_text(&open(path, true)?, text)
}

fn open(path: &Path, create: bool) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(create).truncate(false).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    options.mode(0o644).open(path)
}

fn set_text(file: &File, text: &str) -> io::Result<()> {
    file.write_all_at(text.as_bytes(), 0)?;
    file.set_len(text.len() as u64)
}

/// Both files, opened and read, so that a copy of the machine only has to write them.
#[derive(Debug)]
pub struct Names {
    hostname: Option<Opened>,
    hosts: Option<Opened>,
}

impl Names {
    /// Opens and reads the files that exist below `root`.
    pub fn open(root: &Path) -> Self {
        let mut names = Self { hostname: Opened::at(&root.join(HOSTNAME)), hosts: Opened::at(&root.join(HOSTS)) };
        names.read();
        names
    }

    /// Reads both files anew.
    pub fn read(&mut self) {
        for opened in [&mut self.hostname, &mut self.hosts].into_iter().flatten() {
            opened.text = opened.read().ok();
        }
    }

    /// Changes the machine's name from `old` to `new`. A file that has another name, or does not exist, is left as it is.
    pub fn rename(&self, old: &str, new: &str) -> io::Result<()> {
        edit(self.hostname.as_ref(), |text| if text.trim() == old { format!("{new}\n") } else { text.to_owned() })?;
        edit(self.hosts.as_ref(), |text| renamed(text, old, new))
    }
}

/// A file and its text when it was last read; the text is `None` if it is too long or not UTF-8.
#[derive(Debug)]
struct Opened {
    file: File,
    text: Option<String>,
}

impl Opened {
    fn at(path: &Path) -> Option<Self> {
        let file = open(path, false).ok().filter(|file| !is_the_hosts(file))?;
        Some(Self { file, text: None })
    }

    fn read(&self) -> io::Result<String> {
        let length = self.file.metadata()?.len();
        if length > MAX_FILE {
            return Err(io::Error::other("not a small file"));
        }
        let mut text = vec![0; usize::try_from(length).unwrap_or(0)];
        self.file.read_exact_at(&mut text, 0)?;
        String::from_utf8(text).map_err(io::Error::other)
    }
}

fn edit(opened: Option<&Opened>, change: impl FnOnce(&str) -> String) -> io::Result<()> {
    let Some(Opened { file, text: Some(text) }) = opened else { return Ok(()) };
    let new = change(text);
    if new == *text {
        return Ok(());
    }
    file.write_all_at(new.as_bytes(), 0)?;
    // Only if needed, because changing a file's length takes the kernel long.
    if new.len() < text.len() { file.set_len(new.len() as u64) } else { Ok(()) }
}

/// Address and names of a line of hosts(5).
fn entry(line: &str) -> Option<(&str, impl Iterator<Item = &str>)> {
    let mut fields = line.split('#').next().unwrap_or_default().split_ascii_whitespace();
    Some((fields.next()?, fields))
}

/// The text of hosts(5) with `new` in place of `old` in the line of the machine's own address.
fn renamed(text: &str, old: &str, new: &str) -> String {
    let own = |line: &str| {
        entry(line).is_some_and(|(address, mut names)| address == OWN_ADDRESS && names.any(|name| name == old))
    };
    text.split_inclusive('\n').map(|line| if own(line) { own_line(new) } else { line.to_owned() }).collect()
}

fn own_line(name: &str) -> String {
    format!("{OWN_ADDRESS}\t{name}\n")
}

/// The text of hosts(5), with lines for `localhost` and for `name` added if they are missing.
fn complete(text: &str, name: &str) -> String {
    let knows = |address: Option<&str>, wanted: &str| {
        text.lines().filter_map(entry).any(|(found, mut names)| {
            address.is_none_or(|address| address == found) && names.any(|name| name == wanted)
        })
    };
    let mut all = text.to_owned();
    if !all.is_empty() && !all.ends_with('\n') {
        all.push('\n');
    }
    for (address, line) in LOCALHOST {
        if !knows(Some(address), "localhost") {
            all.push_str(line);
        }
    }
    if !knows(None, name) {
        all.push_str(&own_line(name));
    }
    all
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const FRESH: &str = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\tbox\n";

    /// A root whose /etc has these files.
    fn root(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("etc")).unwrap();
        for (name, text) in files {
            fs::write(root.path().join(name), text).unwrap();
        }
        root
    }

    fn text(root: &tempfile::TempDir, name: &str) -> String {
        fs::read_to_string(root.path().join(name)).unwrap()
    }

    #[test]
    fn an_empty_root_is_given_both_files() {
        let root = tempfile::tempdir().unwrap();
        for _ in 0..2 {
            write(root.path(), "box", false).unwrap();
            assert_eq!((text(&root, HOSTNAME), text(&root, HOSTS)), ("box\n".to_owned(), FRESH.to_owned()));
        }
    }

    #[test]
    fn entries_of_an_image_stay() {
        let own = "# mine\n127.0.0.1 localhost\n::1 ip6-localhost localhost # both\n10.0.0.1 db\n10.0.0.2 box.lan box";
        let root = root(&[(HOSTS, own)]);
        write(root.path(), "box", false).unwrap();
        assert_eq!(text(&root, HOSTS), format!("{own}\n"));
    }

    #[test]
    fn what_an_image_lacks_is_added() {
        let root = root(&[(HOSTS, "127.0.0.1 localhost\n10.0.0.1 db\n"), (HOSTNAME, "builder\n")]);
        write(root.path(), "box", false).unwrap();
        let added = "::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\tbox\n";
        assert_eq!(text(&root, HOSTS), format!("127.0.0.1 localhost\n10.0.0.1 db\n{added}"));
        assert_eq!(text(&root, HOSTNAME), "box\n");
    }

    #[test]
    fn the_name_of_the_machine_an_image_was_made_in_goes() {
        let root = tempfile::tempdir().unwrap();
        for name in ["builder", "box"] {
            write(root.path(), name, false).unwrap();
        }
        assert_eq!((text(&root, HOSTNAME), text(&root, HOSTS)), ("box\n".to_owned(), FRESH.to_owned()));
    }

    #[test]
    fn files_of_a_disk_that_is_the_callers_stay() {
        let root = root(&[(HOSTS, "mine\n"), (HOSTNAME, "mine\n")]);
        write(root.path(), "box", true).unwrap();
        Names::open(root.path()).rename("box", "copy").unwrap();
        assert_eq!((text(&root, HOSTNAME), text(&root, HOSTS)), ("mine\n".to_owned(), "mine\n".to_owned()));
    }

    #[test]
    fn a_copy_has_its_own_name_and_no_other() {
        let root = root(&[(HOSTS, "10.0.0.1 box-db box\n")]);
        write(root.path(), "a-long-name", false).unwrap();
        let before = text(&root, HOSTS);
        Names::open(root.path()).rename("a-long-name", "b").unwrap();
        assert_eq!(text(&root, HOSTS), before.replace("a-long-name", "b"));
        assert_eq!(text(&root, HOSTNAME), "b\n");
    }

    #[test]
    fn a_name_that_changed_after_the_files_were_opened_is_read_again() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), "first", false).unwrap();
        let mut names = Names::open(root.path());
        write(root.path(), "second-and-longer", false).unwrap();
        names.read();
        names.rename("second-and-longer", "copy").unwrap();
        assert_eq!((text(&root, HOSTNAME), text(&root, HOSTS)), ("copy\n".to_owned(), FRESH.replace("box", "copy")));
    }

    #[test]
    fn a_link_is_not_followed() {
        let root = root(&[("etc/theirs", "theirs\n")]);
        symlink("theirs", root.path().join(HOSTS)).unwrap();
        assert!(write(root.path(), "box", false).is_err());
        Names::open(root.path()).rename("theirs", "copy").unwrap();
        assert_eq!(text(&root, "etc/theirs"), "theirs\n");
    }
}
