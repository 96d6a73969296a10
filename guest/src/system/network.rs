//! The machine's network, by the ioctls of netdevice(7): one card with a fixed address, so that nothing waits for DHCP.

use std::ffi::CStr;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::{fs, io, mem, ptr};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use super::step::{Failed, Step};
use crate::config::Network;

const LOOPBACK: &CStr = c"lo";
const CARD: &CStr = c"eth0";
const RESOLVER: &str = "/etc/resolv.conf";
/// gvproxy, which serves the card, speaks IPv4 only. Without IPv6 the card sends nothing by itself, so gvproxy starts only when needed.
const NO_IPV6: &str = "/proc/sys/net/ipv6/conf/eth0/disable_ipv6";

pub fn loopback_up() -> io::Result<()> {
    Device::open(LOOPBACK)?.up()
}

/// Sets the card's address and the machine's default route and resolver. With `keep_resolver`, an existing resolver configuration stays.
pub fn set_up(network: &Network, keep_resolver: bool) -> Result<(), Failed> {
    let card = Device::open(CARD).step("network")?;
    // A kernel without IPv6 has no such file.
    let _ = fs::write(NO_IPV6, "1");
    let mask =
        Ipv4Addr::from_bits(u32::MAX.checked_shl(32_u32.saturating_sub(network.prefix_length.into())).unwrap_or(0));
    card.set_mtu(network.mtu).step("network: mtu")?;
    card.set_address(libc::SIOCSIFADDR, network.address).step("network: address")?;
    card.set_address(libc::SIOCSIFNETMASK, mask).step("network: netmask")?;
    card.up().step("network: up")?;
    card.default_route(network.gateway).step("network: route")?;
    set_resolver(Path::new(RESOLVER), network.nameserver, keep_resolver).step(RESOLVER)
}

/// Gives the card of a running machine another hardware address.
pub fn set_hardware_address(address: [u8; 6]) -> io::Result<()> {
    let mut hardware = libc::sockaddr { sa_family: libc::ARPHRD_ETHER, sa_data: [0; 14] };
    for (to, from) in hardware.sa_data.iter_mut().zip(address) {
        *to = from.cast_signed();
    }
    Device::open(CARD)?.set(libc::SIOCSIFHWADDR, |request| request.ifr_ifru.ifru_hwaddr = hardware)
}

/// Replaces the file, which often is a link to a file that a resolver of the image would make.
fn set_resolver(file: &Path, nameserver: Ipv4Addr, keep: bool) -> io::Result<()> {
    if keep && fs::metadata(file).is_ok_and(|metadata| metadata.len() > 0) {
        return Ok(());
    }
    if let Some(dir) = file.parent() {
        fs::create_dir_all(dir)?;
    }
    match fs::remove_file(file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    fs::write(file, format!("nameserver {nameserver}\n"))
}

/// A network device, and a socket for its ioctls.
struct Device {
    socket: OwnedFd,
    name: &'static CStr,
}

impl Device {
    fn open(name: &'static CStr) -> io::Result<Self> {
        let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
        Ok(Self { socket, name })
    }

    fn up(&self) -> io::Result<()> {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "the kernel's field is 16 bits, these two flags are below that"
        )]
        let flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        self.set(libc::SIOCSIFFLAGS, |request| request.ifr_ifru.ifru_flags = flags)
    }

    fn set_mtu(&self, mtu: u16) -> io::Result<()> {
        self.set(libc::SIOCSIFMTU, |request| request.ifr_ifru.ifru_mtu = mtu.into())
    }

    fn set_address(&self, what: libc::Ioctl, address: Ipv4Addr) -> io::Result<()> {
        self.set(what, |request| request.ifr_ifru.ifru_addr = socket_address(address))
    }

    fn default_route(&self, gateway: Ipv4Addr) -> io::Result<()> {
        // SAFETY: an all-zero rtentry is a valid one: numbers, and a null device name, which means any.
        let mut route: libc::rtentry = unsafe { mem::zeroed() };
        route.rt_dst = socket_address(Ipv4Addr::UNSPECIFIED);
        route.rt_genmask = socket_address(Ipv4Addr::UNSPECIFIED);
        route.rt_gateway = socket_address(gateway);
        route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
        // SAFETY: `route` is a whole rtentry and outlives the call, which only reads it.
        done(unsafe { libc::ioctl(self.socket.as_raw_fd(), libc::SIOCADDRT, &raw const route) })
    }

    fn set(&self, what: libc::Ioctl, fill: impl FnOnce(&mut libc::ifreq)) -> io::Result<()> {
        // SAFETY: an all-zero ifreq is a valid one; it is plain numbers.
        let mut request: libc::ifreq = unsafe { mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(self.name.to_bytes_with_nul()) {
            *to = from.cast_signed();
        }
        fill(&mut request);
        // SAFETY: `request` is a whole ifreq and outlives the call, which only reads it.
        done(unsafe { libc::ioctl(self.socket.as_raw_fd(), what, &raw const request) })
    }
}

fn done(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    let internet = libc::sockaddr_in {
        #[expect(clippy::cast_possible_truncation, reason = "the kernel's field is 16 bits, the family is 2")]
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: 0,
        sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(address.octets()) },
        sin_zero: [0; 8],
    };
    // SAFETY: both have the same 16 bytes, and every value of them is a valid sockaddr.
    unsafe { ptr::from_ref(&internet).cast::<libc::sockaddr>().read() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    const SERVER: Ipv4Addr = Ipv4Addr::new(10, 1, 2, 3);
    const TEXT: &str = "nameserver 10.1.2.3\n";

    #[test]
    fn a_resolver_is_made_and_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("etc/resolv.conf");
        for _ in 0..2 {
            set_resolver(&file, SERVER, false).unwrap();
            assert_eq!(fs::read_to_string(&file).unwrap(), TEXT);
            fs::write(&file, "nameserver 1.1.1.1\n").unwrap();
        }
    }

    #[test]
    fn a_link_is_replaced_and_what_it_points_to_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (file, other) = (dir.path().join("resolv.conf"), dir.path().join("stub"));
        symlink(&other, &file).unwrap();
        set_resolver(&file, SERVER, true).unwrap();
        assert!(!other.exists());
        assert_eq!(fs::read_to_string(&file).unwrap(), TEXT);
    }

    #[test]
    fn one_that_is_to_be_kept_is() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("resolv.conf");
        fs::write(&file, "mine\n").unwrap();
        set_resolver(&file, SERVER, true).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "mine\n");
    }

    #[test]
    fn addresses_are_in_network_order() {
        let address = socket_address(Ipv4Addr::new(192, 168, 127, 2));
        assert_eq!(address.sa_data.map(i8::cast_unsigned)[..6], [0, 0, 192, 168, 127, 2]);
    }
}
