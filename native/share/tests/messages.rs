//! Any messages in any order: the server does not panic, and nothing outside its shares changes.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use machinen_share::abi::{self, InHeader, InitIn, opcode};
use machinen_share::server::{Server, prepare_thread};
use machinen_share::share::{Share, Source};
use proptest::prelude::*;
use zerocopy::IntoBytes;

fn message(asked: u32, node: u64, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(size_of::<InHeader>() + body.len()).unwrap();
    let header = InHeader { len, opcode: asked, unique: 2, node, ..InHeader::default() };
    [header.as_bytes(), body].concat()
}

/// Numbers that may mean something, names that may lead somewhere, and anything.
fn part() -> impl Strategy<Value = Vec<u8>> {
    let names = ["a", "b", "directory", "link", "..", ".", "", "../outside/kept", "/etc", "user.a", "a/b"];
    prop_oneof![
        4 => (0_u32..8).prop_map(|number| number.to_ne_bytes().to_vec()),
        3 => (0_u64..8).prop_map(|number| number.to_ne_bytes().to_vec()),
        1 => any::<u32>().prop_map(|number| number.to_ne_bytes().to_vec()),
        4 => prop::sample::select(names.to_vec()).prop_map(|name| [name.as_bytes(), b"\0"].concat()),
        1 => prop::collection::vec(any::<u8>(), 0..40),
    ]
}

/// Not FALLOCATE, which could take all of this machine's disk.
fn request() -> impl Strategy<Value = Vec<u8>> {
    let asked = (0_u32..56).prop_filter("takes space", |asked| *asked != opcode::FALLOCATE);
    (asked, 0_u64..8, prop::collection::vec(part(), 0..14))
        .prop_map(|(asked, node, parts)| message(asked, node, &parts.concat()))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn nothing_outside_changes(requests in prop::collection::vec(request(), 1..60)) {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("share/directory")).unwrap();
        fs::create_dir(dir.path().join("outside")).unwrap();
        fs::write(dir.path().join("outside/kept"), "kept").unwrap();
        fs::write(dir.path().join("share/a"), "text").unwrap();
        std::os::unix::fs::symlink("../outside", dir.path().join("share/link")).unwrap();
        let path = dir.path().join("share");
        let source = Source { tag: "a".to_owned(), path, read_only: false, uid: None, gid: None };
        let shares = vec![Share::open(&source).unwrap()];
        let server = Server::new(shares, Duration::ZERO, Arc::new(Mutex::new(std::io::sink()))).unwrap();
        std::thread::scope(|scope| scope.spawn(|| {
            prepare_thread().unwrap();
            let init = InitIn { major: abi::MAJOR, minor: abi::MINOR, max_readahead: 0, flags: u32::MAX };
            server.answer(&message(opcode::INIT, 0, init.as_bytes())).unwrap();
            for name in ["a", "directory", "link"] {
                server.answer(&message(opcode::LOOKUP, abi::ROOT + 1, &[name.as_bytes(), b"\0"].concat()));
            }
            for request in &requests {
                if let Some(answer) = server.answer(request) {
                    assert_eq!(answer[..4], u32::try_from(answer.len()).unwrap().to_ne_bytes());
                }
            }
        }).join().unwrap());
        prop_assert_eq!(fs::read(dir.path().join("outside/kept")).unwrap(), b"kept");
        prop_assert_eq!(fs::read_dir(dir.path().join("outside")).unwrap().count(), 1);
        prop_assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}
