//! The two JSON files the host puts into the initramfs. A field this version does not know is ignored.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

/// `/machinen-config.json`: what the image and the boot options say about commands.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct GuestConfig {
    /// The main command, run by the operation `main`.
    pub cmd: Vec<String>,
    /// Environment of every command, overlaid by a request's.
    pub env: BTreeMap<String, String>,
    /// Working directory of every command that names none.
    pub cwd: Option<String>,
    /// It is the image's own, and made when a command begins there and it is missing, as container runtimes do.
    #[serde(rename = "makeCwd")]
    pub make_cwd: bool,
    /// `user[:group]`, names or numbers, of every command that names none; root otherwise.
    pub user: Option<String>,
}

/// `/machinen-boot.json`: what this boot is.
#[derive(Clone, Debug, Deserialize)]
pub struct BootConfig {
    pub version: u32,
    pub hostname: String,
    pub root: RootKind,
    /// The disk holds processes that are to be brought back (the operation `revive`): until then nothing else runs.
    #[serde(default)]
    pub revive: bool,
    /// Where the disks `mountlower` and `mountupper` go.
    pub mount: Option<String>,
    /// What of the host's is shared.
    #[serde(default)]
    pub shares: Vec<Share>,
    /// Of the machine's one network card, if it has one.
    pub network: Option<Network>,
}

/// What the card is given; `gvproxy/main.go` is its other end.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Network {
    pub address: Ipv4Addr,
    pub prefix_length: u8,
    pub gateway: Ipv4Addr,
    pub nameserver: Ipv4Addr,
    /// Bytes.
    pub mtu: u16,
}

/// A directory of the host's.
#[derive(Clone, Debug, Deserialize)]
pub struct Share {
    /// Where it goes.
    pub guest: String,
    /// What the device calls it.
    pub tag: String,
}

/// How the root filesystem is made of the disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RootKind {
    /// `root` read-only below, `upper` above.
    Overlay,
    /// `root` itself, writable.
    Disk,
}
