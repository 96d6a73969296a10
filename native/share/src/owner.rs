//! Owners of files: of the guest's users, which are this host's?

use rustix::io::Errno;
use rustix::process::{getegid, geteuid};

use crate::privilege;

/// One user and group of this host, and those of the guest that are the same. All others are the same number on both sides.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Owners {
    pub host: (u32, u32),
    pub guest: (u32, u32),
}

impl Owners {
    /// Of a share whose directory or file has that owner. As an ordinary user, the server can make files of its own user alone: these are the
    /// guest's root's, or the wished user's. As root, all are the same number on both sides, but for the share's owner where a user is wished.
    pub fn new(owner: (u32, u32), wished: (Option<u32>, Option<u32>)) -> Self {
        let of_root = geteuid().is_root();
        let pair = |own: u32, owner: u32, wished: Option<u32>| match (of_root, wished) {
            (true, Some(wished)) => (owner, wished),
            (true, None) => (0, 0),
            (false, wished) => (own, wished.unwrap_or(0)),
        };
        let (uid, gid) = (pair(geteuid().as_raw(), owner.0, wished.0), pair(getegid().as_raw(), owner.1, wished.1));
        Self { host: (uid.0, gid.0), guest: (uid.1, gid.1) }
    }

    pub fn to_guest(self, (uid, gid): (u32, u32)) -> (u32, u32) {
        (swap(uid, self.host.0, self.guest.0), swap(gid, self.host.1, self.guest.1))
    }

    pub fn to_host(self, (uid, gid): (u32, u32)) -> (u32, u32) {
        (swap(uid, self.guest.0, self.host.0), swap(gid, self.guest.1, self.host.1))
    }
}

/// `from` becomes `to`, and `to` becomes `from`: so no two are the same.
fn swap(id: u32, from: u32, to: u32) -> u32 {
    match id {
        id if id == from => to,
        id if id == to => from,
        id => id,
    }
}

/// While it lives, the files this thread makes are that user's, with the permissions that the umask leaves. An ordinary user's files are always
/// its own.
pub struct Maker {
    switched: bool,
}

impl Maker {
    pub fn new((uid, gid): (u32, u32), umask: u32) -> Result<Self, Errno> {
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(umask & 0o777));
        let switched = geteuid().is_root() && (uid, gid) != (0, 0);
        let maker = Self { switched };
        if switched {
            set_gid(gid);
            set_uid(uid);
            // The calls return the ids before; asked once more with what is no id they return the present ones.
            if set_uid(u32::MAX) != uid || set_gid(u32::MAX) != gid {
                return Err(Errno::PERM);
            }
            // The guest's kernel has decided whether that user may do it, by all of the user's groups, which are not known here.
            privilege::with_dac_override()?;
        }
        Ok(maker)
    }
}

impl Drop for Maker {
    fn drop(&mut self) {
        if self.switched {
            set_uid(0);
            set_gid(0);
        }
    }
}

/// setfsuid(2) of this thread alone.
fn set_uid(uid: u32) -> u32 {
    // SAFETY: a plain number; the call has no other effect than on this thread's credentials.
    let before = unsafe { libc::syscall(libc::SYS_setfsuid, uid) };
    u32::try_from(before).unwrap_or(u32::MAX)
}

fn set_gid(gid: u32) -> u32 {
    // SAFETY: as above.
    let before = unsafe { libc::syscall(libc::SYS_setfsgid, gid) };
    u32::try_from(before).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_the_same_both_ways() {
        let owners = Owners { host: (1000, 1001), guest: (0, 0) };
        assert_eq!(owners.to_guest((1000, 1001)), (0, 0));
        assert_eq!(owners.to_guest((0, 5)), (1000, 5));
        for ids in [(0, 0), (1000, 1001), (7, 1001), (1000, 0)] {
            assert_eq!(owners.to_host(owners.to_guest(ids)), ids);
        }
    }
}
