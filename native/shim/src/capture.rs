//! Copies what a stopped VM consists of, and undoes a snapshot whose maker is gone (docs/protocol.md, section 5).

use crate::identity::Identity;
use crate::line::{self, MAX_LINE, answer};
use crate::memory::Memory;
use crate::parallel_copy::Known;
use crate::peer_closed::peer_closed;
use crate::plan::{FileCopy, removable};
use crate::state::State;
use crate::undo::Undo;
use crate::{failed, files};
use nix::errno::Errno;
use serde::Deserialize;
use serde_json::json;
use std::fmt::Display;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::net::UnixStream;

#[derive(Deserialize)]
pub struct Request {
    /// Where the copy of the memory goes.
    memory: Option<PathBuf>,
    files: Vec<FileCopy>,
    undo: Undo,
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
#[serde(tag = "step", rename_all = "camelCase")]
enum Step {
    Copy,
    Commit,
}

/// Why there is no capture, as the maker is told.
struct Failure {
    code: String,
    message: String,
}

impl Failure {
    fn new(what: impl Display, error: &io::Error) -> Self {
        Failure { code: failed::code(error), message: format!("{what}: {error}") }
    }

    fn errno(what: impl Display, errno: Errno) -> Self {
        Failure::new(what, &errno.into())
    }

    async fn tell(&self, client: &mut UnixStream) -> io::Result<()> {
        answer(client, &json!({"ok": false, "code": self.code, "message": self.message})).await
    }
}

impl Request {
    fn check(&self) -> Result<(), &'static str> {
        let copied = self.files.iter().flat_map(|file| [&file.from, &file.to]);
        if !copied.chain(&self.memory).chain(&self.undo.socket).all(|path| path.is_absolute()) {
            return Err("paths must be absolute");
        }
        // What is removed recursively must be meant.
        if !self.undo.remove.iter().all(|path| removable(path)) {
            return Err("undo.remove must be absolute paths without dots");
        }
        if self.undo.lines.iter().any(|line| line.contains('\n')) {
            return Err("undo.lines must be lines");
        }
        Ok(())
    }
}

/// Has the conversation, of which only its end is left: the copies, or nothing.
pub async fn serve(client: &mut UnixStream, rest: Vec<u8>, request: Request, state: &Arc<State>) -> io::Result<()> {
    // Neither a request that makes no sense nor one too many may undo anything: the VM may be stopped for another one.
    if let Err(what) = request.check() {
        return Failure::errno(what, Errno::EINVAL).tell(client).await;
    }
    let Ok(_only) = state.capturing.try_acquire() else {
        return Failure::errno("another capture", Errno::EBUSY).tell(client).await;
    };
    let Request { memory, files, undo } = request;
    let mut maker = Maker { client, rest, state };
    if let Err(failure) = maker.converse(memory, files).await {
        // It may be gone.
        let _ = failure.tell(client).await;
        undo.run(state.agent.clone()).await;
    }
    Ok(())
}

/// Who makes the snapshot.
struct Maker<'a> {
    client: &'a mut UnixStream,
    rest: Vec<u8>,
    state: &'a State,
}

impl Maker<'_> {
    async fn converse(&mut self, memory: Option<PathBuf>, copies: Vec<FileCopy>) -> Result<(), Failure> {
        let vmm = self.state.vmm;
        let memory = match (memory, &self.state.memory) {
            (None, _) => None,
            (Some(to), Some(memory)) => Some((to, Arc::clone(memory))),
            (Some(to), None) => {
                return Err(Failure::errno(format_args!("{}: memory is no file", to.display()), Errno::EINVAL));
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
                    bytes += copied.map_err(|error| Failure::new(to.display(), &error))?;
                }
                let copied = files::copy_all(&copies, cancel);
                Ok(bytes + copied.map_err(|(path, error)| Failure::new(path.display(), &error))?)
            })
            .await?;
        self.tell(&json!({"ok": true, "bytes": bytes})).await?;

        // 3. When the maker has made the rest of it.
        self.step(Step::Commit).await?;
        self.tell(&json!({"ok": true})).await
    }

    async fn tell(&mut self, value: &serde_json::Value) -> Result<(), Failure> {
        answer(self.client, value).await.map_err(|error| Failure::new("answer", &error))
    }

    /// Waits for the maker's next step, for as long as there is a VM.
    async fn step(&mut self, expected: Step) -> Result<(), Failure> {
        let line = tokio::select! {
            line = line::next(self.client, &mut self.rest, MAX_LINE) => line,
            () = self.state.over() => Err(Errno::ESRCH.into()),
        };
        let step = line.and_then(|line| Ok(serde_json::from_slice::<Step>(&line)?));
        match step {
            Ok(step) if step == expected => Ok(()),
            Ok(step) => Err(Failure::errno(format_args!("{step:?} out of turn"), Errno::EINVAL)),
            Err(error) => Err(Failure::new(format_args!("waiting for {expected:?}"), &error)),
        }
    }

    /// Works on another thread, and stops working when nobody needs it any more.
    async fn work<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(&AtomicBool) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Failure> {
        let gone = peer_closed(self.client).map_err(|error| Failure::new("client", &error))?;
        let cancel = Arc::new(AtomicBool::new(false));
        let cancelled = Arc::clone(&cancel);
        let mut working = tokio::task::spawn_blocking(move || work(&cancelled));
        tokio::select! {
            done = &mut working => return done.map_err(|error| Failure::new("copying", &io::Error::other(error)))?,
            () = gone => {}
            () = self.state.over() => {}
        }
        cancel.store(true, Ordering::Relaxed);
        // What it still makes must be there before it is removed.
        let _ = working.await;
        Err(Failure::errno("copying", Errno::ECANCELED))
    }
}

fn prepare(to: &Path, memory: &Memory, vmm: Identity, cancel: &AtomicBool) -> Result<(File, Known), Failure> {
    let prepare = || {
        let file = files::create(to)?;
        let known = memory.copy_ahead(vmm, &file, cancel)?;
        Ok((file, known))
    };
    prepare().map_err(|error| Failure::new(to.display(), &error))
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
