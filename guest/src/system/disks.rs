//! Finds disks by virtio serial, never by letter, because which disks are attached differs from boot to boot.

use std::{fs, io};

use super::step::{Failed, Step};

/// A virtio disk.
#[derive(Clone, Debug)]
pub struct Disk {
    name: String,
}

impl Disk {
    /// The path of its device node.
    pub fn node(&self) -> String {
        format!("/dev/{}", self.name)
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> io::Result<u64> {
        let sectors = fs::read_to_string(format!("/sys/block/{}/size", self.name))?;
        let sectors: u64 = sectors.trim_end().parse().map_err(io::Error::other)?;
        // The kernel counts in units of 512 bytes, whatever the device's own sector size.
        Ok(sectors * 512)
    }
}

/// The disks with these serials. Reads no more serials than needed, because each costs a round trip to the VMM.
pub fn find<const N: usize>(serials: [&str; N]) -> Result<[Disk; N], Failed> {
    let mut found = [const { None }; N];
    for letter in 'a'..='z' {
        if found.iter().all(Option::is_some) {
            break;
        }
        let name = format!("vd{letter}");
        match fs::read_to_string(format!("/sys/block/{name}/serial")) {
            Ok(serial) => {
                if let Some(at) = serials.iter().position(|wanted| *wanted == serial.trim_end()) {
                    found[at] = Some(Disk { name });
                }
            }
            // Letters have no gaps: no disk is ever unplugged.
            Err(error) if error.kind() == io::ErrorKind::NotFound => break,
            Err(error) => return Err(error).step("disks"),
        }
    }
    let missing = found.iter().position(Option::is_none);
    if let Some(at) = missing {
        let why = io::Error::new(io::ErrorKind::NotFound, "no virtio disk has this serial");
        return Err(Failed::new(format!("disk {}", serials[at]), why));
    }
    Ok(found.map(|disk| disk.unwrap_or_else(|| unreachable!())))
}
