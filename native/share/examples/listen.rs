//! `listen SOCKET VALID DIRECTORY...`: serves directories to a guest that names them share0, share1, ...

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;

use machinen_share::owner::Owners;
use machinen_share::server::{Options, Server};

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let valid = Duration::from_secs(args[2].parse().unwrap());
    let listener = UnixListener::bind(&args[1]).unwrap();
    for stream in listener.incoming() {
        let (stream, dir) = (stream.unwrap(), args[3].clone());
        std::thread::spawn(move || {
            let mut input = BufReader::with_capacity(256 << 10, stream.try_clone().unwrap());
            let mut tag = String::new();
            input.read_line(&mut tag).unwrap();
            eprintln!("serves {dir} as {tag:?}");
            let options = Options { read_only: false, owners: Owners::of_this_process(), valid };
            let server = Server::new(Path::new(&dir), options).unwrap();
            eprintln!("ended: {:?}", machinen_share::stream::serve(&server, input, stream));
        });
    }
}
