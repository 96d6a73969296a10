//! A VMM as far as a shim can tell, with its guest: channel on descriptor 3, console on descriptor 4. For the tests.
//!
//! `fake-vmm serve [--deaf] [--main <code>] [--quiet] [--memory shared|private]`, `fake-vmm mute`, `fake-vmm inspect <console>`,
//! `fake-vmm fail <code> <text>`.
//! Memory: descriptor 5, read once where it is private; port 11 takes a u32 page and a byte to fill it with, and answers that byte.
//! Ports: 7 echoes, 8 prints what it gets on the console, 9 starts the main command, 10 dials the port it is told and passes
//! everything on, 1978 knows `poweroff` and prints what it is told by `clock`; all others are refused.

use machinen_channel::{Incoming, Opener, Stream, serve_guest};
use rustix::mm::{MapFlags, ProtFlags, mmap};
use rustix::process::{Resource, getpgrp, getpid, getrlimit};
use std::io::{self, Write};
use std::os::fd::FromRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[derive(Clone, Default)]
struct Guest {
    /// The guest takes requests and does nothing about them.
    deaf: bool,
    /// The guest does not ring.
    quiet: bool,
    /// The guest has a detached main command, which prints and ends with this code.
    main: Option<i32>,
    memory: Option<Arc<Mutex<&'static mut [u8]>>>,
}

fn inherited(fd: i32) -> UnixStream {
    // SAFETY: the shim hands both descriptors to its VMM, and each is taken once.
    unsafe { UnixStream::from_raw_fd(fd) }
}

fn main() -> io::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut guest = Guest::default();
    match arguments.first().map(String::as_str) {
        Some("fail") => {
            eprintln!("{}", arguments[2]);
            std::process::exit(arguments[1].parse().unwrap_or(1));
        }
        Some("inspect") => return inspect(arguments[1].parse().map_err(io::Error::other)?),
        Some("mute") => loop {
            std::thread::park();
        },
        _ => {}
    }
    let mut rest = arguments.iter().skip(1);
    while let Some(argument) = rest.next() {
        match argument.as_str() {
            "--deaf" => guest.deaf = true,
            "--quiet" => guest.quiet = true,
            "--main" => guest.main = rest.next().and_then(|code| code.parse().ok()),
            "--memory" => {
                guest.memory = Some(Arc::new(Mutex::new(memory(rest.next().is_some_and(|kind| kind == "shared"))?)))
            }
            _ => return Err(io::ErrorKind::InvalidInput.into()),
        }
    }
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(serve(guest))
}

/// Maps the memory as QEMU does: by its name, for writing.
fn memory(shared: bool) -> io::Result<&'static mut [u8]> {
    let file = std::fs::File::options().read(true).write(true).open("/proc/self/fd/5")?;
    let length = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
    let flags = if shared { MapFlags::SHARED } else { MapFlags::PRIVATE };
    // SAFETY: a new mapping at an address of the kernel's choice.
    let mapped = unsafe { mmap(std::ptr::null_mut(), length, ProtFlags::READ | ProtFlags::WRITE, flags, &file, 0) }?;
    // SAFETY: it is never unmapped, and what else maps the file only reads it, by system calls.
    let memory = unsafe { std::slice::from_raw_parts_mut(mapped.cast(), length) };
    if !shared {
        // Reads every page; reading does not make a page the process's own.
        std::hint::black_box(memory.iter().step_by(4096).fold(0, |sum: u8, byte| sum.wrapping_add(*byte)));
    }
    Ok(memory)
}

/// Prints what it was started with.
fn inspect(console: i32) -> io::Result<()> {
    let mut fds = Vec::new();
    for fd in 0..1024 {
        if std::fs::read_link(format!("/proc/self/fd/{fd}")).is_ok() {
            fds.push(fd);
        }
    }
    let mut variables: Vec<String> = std::env::vars().map(|(name, _)| name).collect();
    variables.sort_unstable();
    let status = std::fs::read_to_string("/proc/self/status")?;
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:\t"));
    let no_new_privileges = status.lines().find_map(|line| line.strip_prefix("NoNewPrivs:\t"));
    let core = getrlimit(Resource::Core).current;
    let leads_its_group = getpgrp() == getpid();
    let seen = serde_json::json!({
        "fds": fds, "variables": variables, "ignored": ignored, "leadsItsGroup": leads_its_group,
        "noNewPrivileges": no_new_privileges, "core": core,
    });
    inherited(console).write_all(seen.to_string().as_bytes())
}

async fn serve(guest: Guest) -> io::Result<()> {
    let port = inherited(3);
    port.set_nonblocking(true)?;
    let mut console = inherited(4);
    console.write_all(b"booted\n")?;
    serve_guest(tokio::net::UnixStream::from_std(port)?, move |opener, arrivals| {
        tokio::spawn(session(guest.clone(), opener, arrivals, console.try_clone()));
    })
    .await
}

async fn session(
    guest: Guest,
    opener: Opener,
    mut arrivals: tokio::sync::mpsc::Receiver<Incoming>,
    console: io::Result<UnixStream>,
) -> io::Result<()> {
    let console = console?;
    if !guest.quiet {
        tokio::spawn(ring(opener.clone()));
    }
    while let Some(incoming) = arrivals.recv().await {
        match incoming.port {
            7 => drop(tokio::spawn(async move { echo(incoming.accept().await?).await })),
            8 => drop(tokio::spawn(print(incoming, console.try_clone()?))),
            9 => drop(tokio::spawn(main_command(incoming, opener.clone(), guest.main))),
            10 => drop(tokio::spawn(dial(incoming, opener.clone()))),
            11 => drop(tokio::spawn(fill(incoming, guest.memory.clone()))),
            1978 => drop(tokio::spawn(agent(incoming, opener.clone(), guest.deaf))),
            _ => incoming.refuse(),
        }
    }
    Ok(())
}

async fn echo(stream: Stream) -> io::Result<()> {
    let (mut reader, mut writer) = tokio::io::split(stream);
    tokio::io::copy(&mut reader, &mut writer).await?;
    writer.shutdown().await
}

async fn print(incoming: Incoming, mut console: UnixStream) -> io::Result<()> {
    let mut stream = incoming.accept().await?;
    let mut buffer = vec![0; 4096];
    while let n @ 1.. = stream.read(&mut buffer).await? {
        console.write_all(&buffer[..n])?;
    }
    stream.shutdown().await
}

async fn dial(incoming: Incoming, opener: Opener) -> io::Result<()> {
    let mut near = incoming.accept().await?;
    let mut far = opener.open(near.read_u32().await?).await?;
    tokio::io::copy_bidirectional(&mut near, &mut far).await.map(drop)
}

async fn fill(incoming: Incoming, memory: Option<Arc<Mutex<&'static mut [u8]>>>) -> io::Result<()> {
    let memory = memory.ok_or(io::ErrorKind::NotFound)?;
    let mut stream = incoming.accept().await?;
    loop {
        let page = usize::try_from(stream.read_u32().await?).map_err(io::Error::other)?;
        let byte = stream.read_u8().await?;
        memory.lock().unwrap_or_else(PoisonError::into_inner)[page * 4096..][..4096].fill(byte);
        stream.write_all(&[byte]).await?;
    }
}

async fn ring(opener: Opener) -> io::Result<()> {
    let mut stream = opener.open(1979).await?;
    stream.write_all(b"{\"version\":1,\"agent\":\"0.0.0\"}\n").await?;
    let mut answer = Vec::new();
    while answer.last() != Some(&b'\n') && stream.read_buf(&mut answer).await? > 0 {}
    eprintln!("doorbell: {}", String::from_utf8_lossy(&answer).trim_end());
    stream.shutdown().await
}

fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    [&[kind], &length.to_be_bytes()[..], payload].concat()
}

async fn announce(opener: &Opener, frames: &[u8]) -> io::Result<()> {
    let mut stream = opener.open(1980).await?;
    stream.write_all(frames).await?;
    stream.shutdown().await?;
    stream.read(&mut [0]).await.map(drop)
}

async fn main_command(incoming: Incoming, opener: Opener, code: Option<i32>) -> io::Result<()> {
    let code = code.ok_or(io::ErrorKind::NotFound)?;
    let _stream = incoming.accept().await?;
    let end = format!("{{\"code\":{code},\"signal\":null}}");
    announce(&opener, &[frame(17, b"out\n"), frame(18, b"err\n"), frame(19, end.as_bytes())].concat()).await?;
    std::process::exit(0)
}

async fn agent(incoming: Incoming, opener: Opener, deaf: bool) -> io::Result<()> {
    let mut stream = incoming.accept().await?;
    let mut head = [0; 5];
    stream.read_exact(&mut head).await?;
    let mut request = vec![0; usize::from(head[4])];
    stream.read_exact(&mut request).await?;
    if deaf {
        return stream.read(&mut [0]).await.map(drop);
    }
    if request.ends_with(br#""op":"clock"}"#) {
        eprintln!("clock: {}", String::from_utf8_lossy(&request));
        stream.write_all(&frame(19, b"{}")).await?;
        return stream.shutdown().await;
    }
    if request != br#"{"op":"poweroff"}"# {
        return stream.write_all(&frame(20, br#"{"code":"AGENT_OP_UNKNOWN","message":""}"#)).await;
    }
    stream.write_all(&frame(19, b"{}")).await?;
    stream.shutdown().await?;
    announce(&opener, &frame(19, b"{}")).await?;
    std::process::exit(0)
}
