//! The beginning of a connection: what guest and server agree on.

use std::sync::atomic::Ordering;

use rustix::io::Errno;

use crate::abi::{self, init};
use crate::reply::{Answer, low, reply};
use crate::request::{MAX_DATA, Request};
use crate::server::Server;

/// What this server can do, of what the guest's kernel offers.
const WANTED: u64 = init::ASYNC_READ
    | init::POSIX_LOCKS
    | init::ATOMIC_O_TRUNC
    | init::BIG_WRITES
    | init::DONT_MASK
    | init::FLOCK_LOCKS
    | init::AUTO_INVAL_DATA
    | init::DO_READDIRPLUS
    | init::READDIRPLUS_AUTO
    | init::ASYNC_DIO
    | init::PARALLEL_DIROPS
    | init::POSIX_ACL
    | init::MAX_PAGES
    | init::CACHE_SYMLINKS
    | init::HANDLE_KILLPRIV_V2
    | init::INIT_EXT;

impl Server {
    pub(crate) fn init(&self, mut request: Request<'_>) -> Answer {
        let asked: abi::InitIn = request.take()?;
        if asked.major != abi::MAJOR || asked.minor < abi::OLDEST_MINOR {
            return Err(Errno::PROTO);
        }
        let extension: abi::InitInExtension = request.take().unwrap_or_default();
        let offered = u64::from(asked.flags) | u64::from(extension.flags2) << 32;
        let agreed = offered & WANTED;
        self.opens_directories.store(offered & init::NO_OPENDIR_SUPPORT == 0, Ordering::Release);
        self.started.store(true, Ordering::Release);
        reply(abi::InitOut {
            major: abi::MAJOR,
            minor: asked.minor.min(abi::MINOR),
            max_readahead: asked.max_readahead,
            flags: low(agreed),
            flags2: low(agreed >> 32),
            max_background: 64,
            congestion_threshold: 48,
            max_write: low(MAX_DATA as u64),
            time_granularity: 1,
            max_pages: u16::try_from(MAX_DATA / 4096).unwrap_or(u16::MAX),
            ..abi::InitOut::default()
        })
    }
}
