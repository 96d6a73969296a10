//! Copies memory and disks of a stopped VM, and undoes a snapshot whose maker is gone (docs/protocol.md, section 5).

use crate::error::Error;
use crate::files;
use crate::identity::Identity;
use crate::line::{self, MAX_LINE, answer};
use crate::memory::Memory;
use crate::parallel_copy::Known;
use crate::peer_closed::peer_closed;
use crate::plan::{FileCopy, removable};
use crate::share_control;
use crate::state::State;
use crate::undo::Undo;
use rustix::io::Errno;
use serde::Deserialize;
use serde_json::json;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::net::UnixStream;

#[derive(Deserialize)]
pub struct Request {
    /// The path of the memory's copy.
    memory: Option<PathBuf>,
    /// Where the state of the shares' server goes. An empty file says that it had ended.
    shares: Option<PathBuf>,
    files: Vec<FileCopy>,
    undo: Undo,
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
#[serde(tag = "step", rename_all = "camelCase")]
enum Step {
    Copy,
    Commit,
}

impl Request {
    fn check(&self) -> Result<(), &'static str> {
        let copied = self.files.iter().flat_map(|file| [&file.from, &file.to]);
        if !copied.chain(&self.memory).chain(&self.shares).chain(&self.undo.socket).all(|path| path.is_absolute()) {
            return Err("paths must be absolute");
        }
        // Paths that are removed recursively must be absolute, without `..`, and not the root.
        if !self.undo.remove.iter().all(|path| removable(path)) {
            return Err("undo.remove must be absolute paths without dots");
        }
        if self.undo.lines.iter().any(|line| line.contains('\n')) {
            return Err("undo.lines must be lines");
        }
        Ok(())
    }
}

/// Serves a capture. Afterwards either all copies exist or none.
pub async fn serve(client: &mut UnixStream, rest: Vec<u8>, request: Request, state: &Arc<State>) -> io::Result<()> {
    // A request that makes no sense, or a second capture, undoes nothing, because the VM may be stopped for another capture.
    if let Err(what) = request.check() {
        return refuse(client, &Error::errno(what, Errno::INVAL)).await;
    }
    let Ok(_only) = state.capturing.try_acquire() else {
        return refuse(client, &Error::errno("another capture", Errno::BUSY)).await;
    };
    let Request { memory, shares, files, undo } = request;
    let mut maker = Maker { client, rest, state };
    if let Err(error) = maker.converse(memory, shares, files).await {
        // The maker may be gone.
        let _ = refuse(client, &error).await;
        undo.run(state.agent.clone()).await;
    }
    Ok(())
}

/// Tells the maker why there is no capture.
async fn refuse(client: &mut UnixStream, error: &Error) -> io::Result<()> {
    answer(client, &json!({"ok": false, "code": error.code(), "message": error.to_string()})).await
}

/// The control client that makes the snapshot.
struct Maker<'a> {
    client: &'a mut UnixStream,
    rest: Vec<u8>,
    state: &'a State,
}

impl Maker<'_> {
    async fn converse(
        &mut self,
        memory: Option<PathBuf>,
        shares: Option<PathBuf>,
        copies: Vec<FileCopy>,
    ) -> Result<(), Error> {
        let vmm = self.state.vmm;
        let memory = match (memory, &self.state.memory) {
            (None, _) => None,
            (Some(to), Some(memory)) => Some((to, Arc::clone(memory))),
            (Some(to), None) => {
                return Err(Error::errno(format_args!("{}: memory is no file", to.display()), Errno::INVAL));
            }
        };

        // 1. While the VM runs.
        let prepared = self
            .work(move |cancel| {
                memory.map(|(to, memory)| prepare(&to, &memory, vmm, cancel).map(|copy| (to, memory, copy))).transpose()
            })
            .await?;
        self.tell(&json!({"ok": true})).await?;

        // 2. While it is stopped.
        self.step(Step::Copy).await?;
        let bytes = self
            .work(move |cancel| {
                let mut bytes = 0;
                if let Some((to, memory, (file, known))) = prepared {
                    let copied = memory.update(vmm, &file, &known, cancel);
                    bytes += copied.map_err(|error| Error::io(to.display(), error))?;
                }
                let copied = files::copy_all(&copies, cancel);
                Ok(bytes + copied?)
            })
            .await?;
        if let Some(to) = shares {
            self.save_shares(&to).await?;
        }
        self.tell(&json!({"ok": true, "bytes": bytes})).await?;

        // 3. When the maker has made the rest of it.
        self.step(Step::Commit).await?;
        self.tell(&json!({"ok": true})).await
    }

    async fn save_shares(&self, to: &Path) -> Result<(), Error> {
        let server = self.state.shares.as_ref().ok_or_else(|| Error::errno("this VM has no shares", Errno::INVAL))?;
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(to);
        let file = file.map_err(|error| Error::io(to.display(), error))?;
        let gone = peer_closed(self.client).map_err(|error| Error::io("client", error))?;
        // The VM stands still meanwhile, and the host's file system may not answer.
        tokio::select! {
            saved = server.save(&file) => match saved {
                // The guest's shares have ended as well, and will not work in a copy.
                Err(error) if share_control::is_end(&error) => Ok(()),
                saved => saved,
            },
            () = gone => Err(Error::errno("the shares", Errno::CANCELED)),
            () = self.state.over() => Err(Error::errno("the shares", Errno::CANCELED)),
        }
    }

    async fn tell(&mut self, value: &serde_json::Value) -> Result<(), Error> {
        answer(self.client, value).await.map_err(|error| Error::io("answer", error))
    }

    /// Waits for the maker's next step. Fails when the VM ends.
    async fn step(&mut self, expected: Step) -> Result<(), Error> {
        let line = tokio::select! {
            line = line::next(self.client, &mut self.rest, MAX_LINE) => line,
            () = self.state.over() => Err(Errno::SRCH.into()),
        };
        let step = line.and_then(|line| Ok(serde_json::from_slice::<Step>(&line)?));
        match step {
            Ok(step) if step == expected => Ok(()),
            Ok(step) => Err(Error::errno(format_args!("{step:?} out of turn"), Errno::INVAL)),
            Err(error) => Err(Error::io(format_args!("waiting for {expected:?}"), error)),
        }
    }

    /// Does `work` on another thread, and cancels it when the maker or the VM is gone.
    async fn work<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(&AtomicBool) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let gone = peer_closed(self.client).map_err(|error| Error::io("client", error))?;
        let cancel = Arc::new(AtomicBool::new(false));
        let cancelled = Arc::clone(&cancel);
        let mut working = tokio::task::spawn_blocking(move || work(&cancelled));
        tokio::select! {
            done = &mut working => return done.map_err(|error| Error::io("copying", io::Error::other(error)))?,
            () = gone => {}
            () = self.state.over() => {}
        }
        cancel.store(true, Ordering::Relaxed);
        // Waits for the thread, so that it makes no file after the copies were removed.
        let _ = working.await;
        Err(Error::errno("copying", Errno::CANCELED))
    }
}

fn prepare(to: &Path, memory: &Memory, vmm: Identity, cancel: &AtomicBool) -> Result<(File, Known), Error> {
    let prepare = || {
        let file = files::create(to)?;
        let known = memory.copy_ahead(vmm, &file, cancel)?;
        Ok((file, known))
    };
    prepare().map_err(|error| Error::io(to.display(), error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(change: impl FnOnce(&mut serde_json::Value)) -> Result<(), &'static str> {
        let undo = json!({"remove": ["/a/b"], "socket": "/s", "lines": ["l"]});
        let mut request = json!({"memory": "/a/m", "files": [{"from": "/f", "to": "/a/t"}], "undo": undo});
        change(&mut request);
        serde_json::from_value::<Request>(request).unwrap().check()
    }

    #[test]
    fn only_absolute_paths_and_lines() {
        assert!(check(|_| ()).is_ok());
        assert!(check(|request| (request["memory"], request["undo"]["socket"]) = (json!(null), json!(null))).is_ok());
        assert!(check(|request| request["memory"] = json!("m")).is_err());
        assert!(check(|request| request["files"][0]["from"] = json!("f")).is_err());
        assert!(check(|request| request["files"][0]["to"] = json!("")).is_err());
        assert!(check(|request| request["undo"]["socket"] = json!("s")).is_err());
        assert!(check(|request| request["undo"]["lines"] = json!(["a\nb"])).is_err());
        for path in ["/", "a", "/a/..", "/a/../b", "", "/.."] {
            assert!(check(|request| request["undo"]["remove"] = json!([path])).is_err(), "{path}");
        }
    }
}
