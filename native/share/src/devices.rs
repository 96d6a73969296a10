//! Inode numbers for the guest. All shares are one file system there, and programs take two files with the same inode number for one (tar, git,
//! cp -a). Here they may be of several file systems with the same numbers.

/// The most file systems that are told apart.
const MOST: usize = 1 << 16;
/// An odd number without a pattern: multiples of it are far apart, whatever numbers a file system gives.
const STEP: u64 = 0x9E37_79B9_7F4A_7C15;

/// The file systems met, in the order in which they were met.
#[derive(Default)]
pub struct Devices {
    met: Vec<u64>,
}

impl Devices {
    /// In their order, for a server that goes on with this one's numbers.
    pub fn list(&self) -> Vec<u64> {
        self.met.clone()
    }

    pub fn go_on_with(&mut self, met: Vec<u64>) {
        self.met = met;
        self.met.truncate(MOST);
    }

    /// The number for the guest. Those of the first file system are the host's own.
    pub fn inode(&mut self, device: u64, inode: u64) -> u64 {
        let place = self.met.iter().position(|met| *met == device).unwrap_or_else(|| {
            if self.met.len() < MOST {
                self.met.push(device);
            }
            self.met.len() - 1
        });
        inode.wrapping_add(STEP.wrapping_mul(place as u64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_different_file_systems_have_different_numbers() {
        let mut devices = Devices::default();
        assert_eq!(devices.inode(7, 42), 42);
        let other = devices.inode(9, 42);
        assert_ne!(other, 42);
        assert_eq!((devices.inode(7, 42), devices.inode(9, 42)), (42, other));
        assert_eq!(devices.inode(9, 43), other + 1);
    }
}
