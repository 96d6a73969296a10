//! Boots a guest with this program as its init and talks to it: the shortest way from an edit to a real machine.
//!
//! `try <vmm arguments file> <script>`: starts the VMM whose command line is the lines of the file, with `{SOCKET}` replaced by
//! the channel's socket, and runs the script's lines: `exec ARG..`, `sh TEXT`, `json TEXT` (a raw request), `feed BYTES ARG..` (exec with so many
//! bytes of input, counted and summed back), `cancel MS ARG..`, `drain ARG..` (throughput of the output), `push FILE DIR`,
//! `pull PATH FILE`, `wait MS`.

use std::io;
use std::process::Stdio;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use machinen_channel::{Incoming, Opener, Stream};
use machinen_protocol::frame::{self, Kind};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;
use tokio::sync::mpsc;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, command, script] = arguments.as_slice() else { return Err("usage: try <vmm arguments> <script>".into()) };
    let socket = std::env::temp_dir().join(format!("machinen-try-{}.sock", std::process::id()));
    let listener = UnixListener::bind(&socket)?;
    let command = std::fs::read_to_string(command)?.replace("{SOCKET}", &socket.to_string_lossy());
    let mut words = command.lines();
    let started = Instant::now();
    let mut vmm = tokio::process::Command::new(words.next().ok_or("no vmm")?)
        .args(words)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    let (port, _) = listener.accept().await?;
    std::fs::remove_file(&socket)?;
    let session = machinen_channel::connect_host(port, false);
    tokio::spawn(session.driver);
    let (rung, mut doorbell) = mpsc::channel(1);
    tokio::spawn(listen(session.incoming, rung));
    tokio::select! {
        _ = doorbell.recv() => {}
        status = vmm.wait() => return Err(format!("the vmm ended: {}", status?).into()),
    }
    let pid = vmm.id().ok_or("no pid")?;
    println!("doorbell {:.1} ms, cpu {:.1} ms", started.elapsed().as_secs_f64() * 1e3, cpu_ms(pid)?);
    for line in std::fs::read_to_string(script)?.lines().filter(|line| !line.is_empty()) {
        let (begun, cpu) = (Instant::now(), cpu_ms(pid)?);
        if let Err(error) = step(&session.opener, line).await {
            println!("! {error}");
        }
        let used = cpu_ms(pid).map_or(0.0, |now| now - cpu);
        println!("{:8.2} ms, cpu {used:.1} ms  {line}", begun.elapsed().as_secs_f64() * 1e3);
    }
    println!("done {:.1} ms, vmm {}", started.elapsed().as_secs_f64() * 1e3, vmm.wait().await?);
    Ok(())
}

/// Processor time the VMM's threads have used, in milliseconds: unlike the clock's, this figure stands on a busy machine.
fn cpu_ms(pid: u32) -> Result<f64> {
    let mut nanoseconds = 0;
    for thread in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let schedstat = std::fs::read_to_string(thread?.path().join("schedstat"))?;
        nanoseconds += schedstat.split_whitespace().next().ok_or("schedstat")?.parse::<u64>()?;
    }
    Ok(Duration::from_nanos(nanoseconds).as_secs_f64() * 1e3)
}

async fn step(opener: &Opener, line: &str) -> Result<()> {
    let (verb, rest) = line.split_once(' ').unwrap_or((line, ""));
    let argv = |words: &str| -> Vec<String> { words.split(' ').map(str::to_owned).collect() };
    match verb {
        "exec" => show(opener, json!({"op": "exec", "argv": argv(rest)})).await,
        "sh" => show(opener, json!({"op": "exec", "argv": ["/bin/sh", "-c", rest]})).await,
        "json" => show(opener, serde_json::from_str(rest)?).await,
        "wait" => {
            tokio::time::sleep(Duration::from_millis(rest.parse()?)).await;
            Ok(())
        }
        "drain" => {
            let begun = Instant::now();
            let mut stream = request(opener, json!({"op": "exec", "argv": argv(rest)})).await?;
            let mut buffer = vec![0; 1 << 20];
            let mut bytes = 0;
            loop {
                match stream.read(&mut buffer).await? {
                    0 => break,
                    n => bytes += n,
                }
            }
            let rate = bytes as f64 / begun.elapsed().as_secs_f64() / 1e6;
            println!("  {bytes} bytes, {rate:.0} MB/s");
            Ok(())
        }
        "feed" => {
            let (bytes, rest) = rest.split_once(' ').ok_or("feed BYTES ARG..")?;
            feed(opener, bytes.parse()?, argv(rest)).await
        }
        "push" => {
            let (host, guest) = rest.split_once(' ').ok_or("push HOSTFILE.tar DIRECTORY")?;
            let mut stream = request(opener, json!({"op": "push", "path": guest})).await?;
            for piece in std::fs::read(host)?.chunks(65536) {
                if stream.write_all(&frame::encode(Kind::Data, piece)?).await.is_err() {
                    break;
                }
            }
            let _ = stream.write_all(&frame::encode(Kind::Eof, &[])?).await;
            print_frames(&mut stream).await
        }
        "pull" => {
            let (guest, host) = rest.split_once(' ').ok_or("pull PATH HOSTFILE.tar")?;
            let mut stream = request(opener, json!({"op": "pull", "path": guest, "excludes": ["*.log"]})).await?;
            let (mut buffer, mut archive) = (BytesMut::new(), Vec::new());
            loop {
                while let Some(frame) = frame::decode(&mut buffer)? {
                    match frame.kind {
                        Kind::Data => archive.extend_from_slice(&frame.payload),
                        kind => println!("  {kind:?} {}", String::from_utf8_lossy(&frame.payload)),
                    }
                }
                if stream.read_buf(&mut buffer).await? == 0 {
                    return Ok(std::fs::write(host, archive)?);
                }
            }
        }
        "cancel" => {
            let (after, rest) = rest.split_once(' ').ok_or("cancel MS ARG..")?;
            let _stream = request(opener, json!({"op": "exec", "argv": argv(rest)})).await?;
            tokio::time::sleep(Duration::from_millis(after.parse()?)).await;
            Ok(())
        }
        _ => Err(format!("no such verb: {verb}").into()),
    }
}

async fn request(opener: &Opener, request: Value) -> Result<Stream> {
    let mut stream = opener.open(1978).await?;
    stream.write_all(&frame::encode(Kind::Request, request.to_string().as_bytes())?).await?;
    Ok(stream)
}

async fn show(opener: &Opener, text: Value) -> Result<()> {
    print_frames(&mut request(opener, text).await?).await
}

async fn print_frames(stream: &mut Stream) -> Result<()> {
    let mut buffer = BytesMut::new();
    loop {
        while let Some(frame) = frame::decode(&mut buffer)? {
            let text: String = String::from_utf8_lossy(&frame.payload).chars().take(2000).collect();
            println!("  {:?} {}", frame.kind, text.trim_end());
        }
        if stream.read_buf(&mut buffer).await? == 0 {
            return Ok(());
        }
    }
}

/// Sends a pattern through the command and checks that it comes back.
async fn feed(opener: &Opener, bytes: usize, argv: Vec<String>) -> Result<()> {
    let begun = Instant::now();
    let stream = request(opener, json!({"op": "exec", "argv": argv, "stdin": true})).await?;
    let (mut input, mut output) = tokio::io::split(stream);
    let pattern = |at: usize| at.wrapping_mul(2_654_435_761).to_le_bytes()[2];
    let sender = tokio::spawn(async move {
        let mut at = 0;
        while at < bytes {
            let end = (at + 65536).min(bytes);
            let piece: Vec<u8> = (at..end).map(pattern).collect();
            output.write_all(&frame::encode(Kind::Data, &piece).map_err(io::Error::other)?).await?;
            at = end;
        }
        output.write_all(&frame::encode(Kind::Eof, &[]).map_err(io::Error::other)?).await?;
        Ok::<_, io::Error>(output)
    });
    let mut buffer = BytesMut::new();
    let (mut at, mut wrong) = (0, 0);
    loop {
        while let Some(frame) = frame::decode(&mut buffer)? {
            match frame.kind {
                Kind::Stdout => {
                    wrong += frame.payload.iter().enumerate().filter(|(n, byte)| **byte != pattern(at + n)).count();
                    at += frame.payload.len();
                }
                kind => println!("  {kind:?} {}", String::from_utf8_lossy(&frame.payload)),
            }
        }
        if input.read_buf(&mut buffer).await? == 0 {
            break;
        }
    }
    let rate = at as f64 / begun.elapsed().as_secs_f64() / 1e6;
    println!("  back {at} of {bytes} bytes, {wrong} wrong, {rate:.0} MB/s");
    sender.await??;
    Ok(())
}

/// The host's side of the doorbell and of the lifecycle port.
async fn listen(mut incoming: mpsc::Receiver<Incoming>, rung: mpsc::Sender<()>) {
    while let Some(request) = incoming.recv().await {
        let port = request.port;
        let rung = rung.clone();
        tokio::spawn(async move {
            let Ok(mut stream) = request.accept().await else { return };
            if port == 1979 {
                let _ = stream.read_u8().await;
                let _ = rung.send(()).await;
                let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
                let _ = stream.write_all(format!("{{\"nowMs\":{}}}\n", now.as_millis()).as_bytes()).await;
            } else {
                let mut buffer = BytesMut::new();
                while matches!(stream.read_buf(&mut buffer).await, Ok(1..)) {
                    while let Ok(Some(frame)) = frame::decode(&mut buffer) {
                        println!("  [{port}] {:?} {}", frame.kind, String::from_utf8_lossy(&frame.payload).trim_end());
                        if frame.kind == Kind::End {
                            return;
                        }
                    }
                }
            }
        });
    }
}
