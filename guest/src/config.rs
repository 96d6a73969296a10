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
    /// Whether `cwd` is the image's own. Then it is made if it is missing when a command starts there, as container runtimes do.
    #[serde(rename = "makeCwd")]
    pub make_cwd: bool,
    /// `user[:group]`, names or numbers, for every command that names no user. Default root.
    pub user: Option<String>,
}

/// `/machinen-boot.json`: how this boot differs from others of the same image.
#[derive(Clone, Debug, Deserialize)]
pub struct BootConfig {
    pub version: u32,
    pub hostname: String,
    pub root: RootKind,
    /// Whether the disk holds dumped processes. Until the operation `revive` has restored them, no command runs.
    #[serde(default)]
    pub revive: bool,
    /// Where the overlay of the disks `mountlower` and `mountupper` is mounted.
    pub mount: Option<String>,
    /// Directories of the host that are mounted live.
    #[serde(default)]
    pub shares: Vec<Share>,
    /// The configuration of the machine's one network card, if it has one.
    pub network: Option<Network>,
}

/// The addresses of the network card. `gvproxy/main.go` is the other end of its network.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Network {
    pub address: Ipv4Addr,
    pub prefix_length: u8,
    pub gateway: Ipv4Addr,
    pub nameserver: Ipv4Addr,
    /// In bytes.
    pub mtu: u16,
}

/// A directory or file of the host that is mounted live.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Share {
    /// Where it is mounted.
    pub guest: String,
    /// Its name in the root of the host's file server.
    pub tag: String,
    /// Whether the guest refuses to write to it. The host's file server refuses in any case.
    #[serde(default)]
    pub read_only: bool,
}

/// How the root file system is made of the disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RootKind {
    /// `root` read-only below, `upper` above.
    Overlay,
    /// `root` itself, writable.
    Disk,
}
