//! Starting a command as a request and the configuration describe it.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use tokio::io::AsyncRead;

use super::context::Context;
use super::lookup;
use super::process::{self, PreparedCommand, Process, Running, Stdio};
use super::stream::{Abort, FrameReader};
use super::threads::COMMANDS;
use super::user::User;
use super::vfork::Start;
use crate::config::GuestConfig;
use crate::reply::ErrorReply;
use crate::request::{Exec, Secret};

/// Starts what `request` describes, unless the stream that `input` comes from ends before: then what has been started is killed.
pub async fn start<R: AsyncRead + Unpin>(
    context: &Context,
    request: Exec,
    input: &mut FrameReader<R>,
) -> Result<Running, Abort> {
    let with_stdin = request.stdin;
    let spawn = move |image: &PreparedCommand, user: Option<&User>| process::spawn_with_pipes(image, user, with_stdin);
    start_by(spawn, context, request, input).await
}

/// Starts the command as `start` does, in a session of its own with `terminal` as its controlling terminal.
pub async fn start_in<R: AsyncRead + Unpin>(
    terminal: OwnedFd,
    context: &Context,
    request: Exec,
    input: &mut FrameReader<R>,
) -> Result<Process, Abort> {
    let spawn = move |image: &PreparedCommand, user: Option<&User>| {
        user.map_or(Ok(()), |user| user.own(&terminal))?;
        process::spawn(image, user, Stdio::Terminal(terminal.as_fd()))
    };
    start_by(spawn, context, request, input).await
}

/// Starts the command by `spawn`, with the configuration and the secrets of this moment.
async fn start_by<R: AsyncRead + Unpin, T: Send + 'static>(
    spawn: impl FnOnce(&PreparedCommand, Option<&User>) -> io::Result<T> + Send + 'static,
    context: &Context,
    request: Exec,
    input: &mut FrameReader<R>,
) -> Result<T, Abort> {
    let config = context.config().clone();
    let secrets = context.secrets().named(&request.secrets)?;
    let start = Arc::new(Start::default());
    let starting = Arc::clone(&start);
    let started = COMMANDS.run(input, move || execute(&config, &secrets, &request, starting, spawn)).await;
    if started.is_err() {
        start.call_off();
    }
    Ok(started??)
}

fn execute<T>(
    config: &GuestConfig,
    secrets: &[(String, Secret)],
    request: &Exec,
    start: Arc<Start>,
    spawn: impl FnOnce(&PreparedCommand, Option<&User>) -> io::Result<T>,
) -> Result<T, ErrorReply> {
    let user = request.user.as_deref().or(config.user.as_deref());
    let user = user.map(|spec| User::find(spec, Path::new("/"))).transpose()?;
    let mut environment = lookup::environment(config, request);
    if let Some(user) = &user
        && !request.env.contains_key("HOME")
        && !config.env.contains_key("HOME")
    {
        environment.insert("HOME", &user.home);
    }
    environment.extend(secrets.iter().map(|(name, value)| (name.as_str(), value.as_str())));
    let cwd = lookup::working_directory(config, request)?;
    let name = request.argv.first().map_or("", String::as_str);
    let program = lookup::resolve(name, lookup::path_of(&environment), &cwd)?;
    // Looked at by this thread first: a process that waits for a file system cannot be frozen with the others; a thread need not be.
    let _ = fs::metadata(cwd.join(&program));
    let prepared = PreparedCommand::new(start, &request.argv, &environment, &cwd, &program)
        .map_err(|error| lookup::refused(name, &error))?;
    spawn(&prepared, user.as_ref()).map_err(|error| match prepared.step() {
        PreparedCommand::ENTERS => lookup::cwd_refused(&cwd, &error),
        PreparedCommand::EXECUTES => lookup::refused_program(name, &cwd.join(&program), &error),
        _ => lookup::refused(name, &error),
    })
}
