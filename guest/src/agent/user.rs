//! The user that a command runs as: `user[:group]`, by name or number. Both are looked up in the image's own /etc/passwd and /etc/group, as
//! other container runtimes do.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{Gid, Uid};

use crate::reply::{Code, ErrorReply};

/// The largest file that is searched, in bytes.
const MAX_FILE: u64 = 16 << 20;
/// `NGROUPS_MAX` of Linux.
const MAX_GROUPS: usize = 65_536;

/// A resolved user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    uid: Uid,
    gid: Gid,
    groups: Vec<Gid>,
    /// The default of HOME.
    pub home: String,
}

impl User {
    /// Looks `spec` up below `root`.
    pub fn find(spec: &str, root: &Path) -> Result<Self, ErrorReply> {
        let (user, group) = spec.split_once(':').map_or((spec, None), |(user, group)| (user, Some(group)));
        let accounts = read(&root.join("etc/passwd"))?;
        let account = accounts
            .lines()
            .filter_map(Account::parse)
            .find(|account| account.name == user || user.parse() == Ok(account.uid));
        let uid = match (&account, user.parse()) {
            (Some(account), _) => account.uid,
            (None, Ok(uid)) if uid != u32::MAX => uid,
            _ => return Err(unknown("user", user)),
        };
        let all_groups = read(&root.join("etc/group"))?;
        let parsed = || all_groups.lines().filter_map(Group::parse);
        let gid = match group {
            None => account.as_ref().map_or(0, |account| account.gid),
            Some(group) => match parsed().find(|found| found.name == group || group.parse() == Ok(found.gid)) {
                Some(found) => found.gid,
                None => group.parse().ok().filter(|gid| *gid != u32::MAX).ok_or_else(|| unknown("group", group))?,
            },
        };
        // If the request names a group, that is the only one. Otherwise the user's supplementary groups are added.
        let mut groups = vec![Gid::from_raw(gid)];
        if let (Some(account), None) = (&account, group) {
            let member = parsed().filter(|group| group.members.split(',').any(|name| name == account.name));
            groups.extend(member.map(|group| Gid::from_raw(group.gid)).filter(|gid| gid.as_raw() != u32::MAX));
            groups.dedup();
            groups.truncate(MAX_GROUPS);
        }
        let home = account.map(|account| account.home).filter(|home| !home.is_empty()).unwrap_or("/");
        Ok(Self { uid: Uid::from_raw(uid), gid: Gid::from_raw(gid), groups, home: home.to_owned() })
    }

    /// Makes this user the owner of a pipe, so that the command can open `/dev/stdout` by name.
    pub fn own(&self, pipe: impl AsFd) -> rustix::io::Result<()> {
        rustix::fs::fchown(pipe, Some(self.uid), Some(self.gid))
    }

    /// Makes the calling thread this user for good. Allocates nothing.
    pub fn assume(&self) -> rustix::io::Result<()> {
        rustix::thread::set_thread_groups(&self.groups)?;
        rustix::thread::set_thread_res_gid(self.gid, self.gid, self.gid)?;
        rustix::thread::set_thread_res_uid(self.uid, self.uid, self.uid)
    }
}

/// A line of passwd(5).
struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

impl<'a> Account<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.split(':');
        let (name, uid, gid) = (fields.next()?, fields.nth(1)?.parse().ok()?, fields.next()?.parse().ok()?);
        Some(Self { name, uid, gid, home: fields.nth(1).unwrap_or_default() }).filter(|found| found.uid != u32::MAX)
    }
}

/// A line of group(5).
struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

impl<'a> Group<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.split(':');
        Some(Self {
            name: fields.next()?,
            gid: fields.nth(1)?.parse().ok()?,
            members: fields.next().unwrap_or_default(),
        })
    }
}

/// Reads the file; an image without it counts as having an empty one.
fn read(path: &Path) -> Result<String, ErrorReply> {
    let failed = |error: &io::Error| ErrorReply::io(path, error);
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(String::new()),
        Err(error) => return Err(failed(&error)),
        Ok(found) if !found.is_file() || found.len() > MAX_FILE => {
            return Err(ErrorReply::new(Code::BadRequest, format!("{}: no file of accounts", path.display())));
        }
        Ok(_) => {}
    }
    let bytes = fs::read(path).map_err(|error| failed(&error))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn unknown(what: &str, name: &str) -> ErrorReply {
    let name: String = name.chars().take(64).collect();
    ErrorReply::new(Code::BadRequest, format!("there is no {what} {name:?} in the image"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(spec: &str) -> Result<User, ErrorReply> {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("etc")).unwrap();
        let accounts = "root:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:33:34:web:/srv/web:/bin/sh\nbare:x:40:41\n";
        fs::write(root.path().join("etc/passwd"), accounts).unwrap();
        fs::write(root.path().join("etc/group"), "root:x:0:\nweb:x:34:\nadm:x:4:web,other\nlog:x:5:other\n").unwrap();
        User::find(spec, root.path())
    }

    fn ids(spec: &str) -> (u32, u32, Vec<u32>, String) {
        let found = find(spec).unwrap();
        (found.uid.as_raw(), found.gid.as_raw(), found.groups.iter().map(|gid| gid.as_raw()).collect(), found.home)
    }

    #[test]
    fn names_and_numbers_are_looked_up() {
        assert_eq!(ids("web"), (33, 34, vec![34, 4], "/srv/web".into()));
        assert_eq!(ids("33"), ids("web"));
        assert_eq!(ids("bare"), (40, 41, vec![41], "/".into()));
        assert_eq!(ids("1234"), (1234, 0, vec![0], "/".into()));
    }

    #[test]
    fn a_group_replaces_those_of_the_user() {
        assert_eq!(ids("web:adm"), (33, 4, vec![4], "/srv/web".into()));
        assert_eq!(ids("1234:log"), (1234, 5, vec![5], "/".into()));
        assert_eq!(ids("web:77"), (33, 77, vec![77], "/srv/web".into()));
    }

    #[test]
    fn users_and_groups_that_do_not_exist_are_refused() {
        for spec in ["nobody", "web:nothing", "", ":", "4294967295", "web:4294967295", "-1", "99999999999"] {
            assert_eq!(find(spec).unwrap_err().code, Code::BadRequest, "{spec}");
        }
    }

    #[test]
    fn an_image_without_accounts_has_numbers() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(User::find("7:8", root.path()).unwrap().uid.as_raw(), 7);
        assert!(User::find("root", root.path()).is_err());
    }
}
