//! Looks up what a command needs before it is started: its environment, its working directory and the file of its program.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::format;
use crate::config::GuestConfig;
use crate::errno;
use crate::reply::{Code, ErrorReply};
use crate::request::Exec;

pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Variables that apply unless the configuration or the request sets them.
const DEFAULT_ENV: [(&str, &str); 4] =
    [("PATH", DEFAULT_PATH), ("HOME", "/root"), ("TERM", "xterm"), ("LANG", "C.UTF-8")];
/// The command of a terminal whose request names none: `$SHELL`, else bash, else sh, as after a login.
pub fn login_shell(config: &GuestConfig, request: &Exec) -> Vec<String> {
    let environment = environment(config, request);
    let configured = environment.get("SHELL").copied().filter(|shell| !shell.is_empty());
    let bash = || resolve("bash", path_of(&environment), Path::new("/")).ok().map(|_| "bash");
    let shell = configured.or_else(bash).unwrap_or("sh");
    vec![shell.to_owned(), "-l".to_owned()]
}

/// The directories that programs are looked up in.
pub fn path_of<'a>(environment: &BTreeMap<&'a str, &'a str>) -> &'a str {
    environment.get("PATH").copied().unwrap_or_default()
}

/// The command's variables. The request's win over the configuration's, and these over the defaults.
pub fn environment<'a>(config: &'a GuestConfig, request: &'a Exec) -> BTreeMap<&'a str, &'a str> {
    let configured = config.env.iter().chain(&request.env).map(|(key, value)| (key.as_str(), value.as_str()));
    DEFAULT_ENV.into_iter().chain(configured).collect()
}

/// The directory in which the command starts. If the image's own working directory is missing, it is made.
pub fn working_directory(config: &GuestConfig, request: &Exec) -> Result<PathBuf, ErrorReply> {
    let cwd = Path::new("/").join(request.cwd.as_deref().or(config.cwd.as_deref()).unwrap_or("/"));
    // Checked beforehand, because a failed start does not tell whether directory or program was missing.
    let error = match fs::metadata(&cwd) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && config.make_cwd && request.cwd.is_none() => {
            match fs::create_dir_all(&cwd) {
                Ok(()) => return Ok(cwd),
                Err(error) => error,
            }
        }
        Ok(found) if found.is_dir() => return Ok(cwd),
        Ok(_) => io::Error::from_raw_os_error(libc::ENOTDIR),
        Err(error) => error,
    };
    Err(cwd_refused(&cwd, &error))
}

/// The reply to a command whose working directory cannot be used.
pub fn cwd_refused(cwd: &Path, error: &io::Error) -> ErrorReply {
    let message = format!("working directory {}: {error}", cwd.display());
    ErrorReply { code: Code::CwdInvalid, message, errno: errno::of(error) }
}

/// Finds the file to execute, as a shell would.
pub fn resolve(name: &str, path: &str, cwd: &Path) -> Result<PathBuf, ErrorReply> {
    if name.contains('/') {
        return Ok(PathBuf::from(name));
    }
    let mut reason = libc::ENOENT;
    for directory in path.split(':') {
        // An empty entry, like a relative one, means the working directory.
        let candidate = cwd.join(directory).join(name);
        let Ok(found) = fs::metadata(&candidate) else { continue };
        if found.is_file() && found.permissions().mode() & 0o111 != 0 {
            return Ok(candidate);
        }
        reason = libc::EACCES;
    }
    Err(refused(name, &io::Error::from_raw_os_error(reason)))
}

/// The reply to a command that could not be executed.
pub fn refused(name: &str, error: &io::Error) -> ErrorReply {
    let code = match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => Code::NotFound,
        Some(libc::EACCES | libc::ENOEXEC | libc::EISDIR | libc::ETXTBSY | libc::ELIBBAD) => Code::NotExecutable,
        Some(libc::E2BIG) => Code::ArgumentsTooLarge,
        Some(libc::ENOSPC) => Code::NoSpace,
        _ => Code::Io,
    };
    let name: String = name.chars().take(256).collect();
    ErrorReply { code, message: format!("{name}: {error}"), errno: errno::of(error) }
}

/// The reply to a command whose program exists but could not be executed. The file that the kernel missed may be the program's interpreter.
pub fn refused_program(name: &str, program: &Path, error: &io::Error) -> ErrorReply {
    let mut reply = refused(name, error);
    let why = match error.raw_os_error() {
        Some(libc::ENOENT) => format::interpreter(program).map(|interpreter| {
            reply.code = Code::NotExecutable;
            format!("it is there, but not {interpreter}, which is to run it")
        }),
        Some(libc::ENOEXEC) => Some(format::foreign(program)),
        _ => None,
    };
    if let Some(why) = why {
        reply.message = format!("{}: {why}", reply.message);
    }
    reply
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_layers_of_the_environment_win() {
        let config = GuestConfig {
            env: [("PATH".into(), "/image".into()), ("A".into(), "image".into())].into(),
            ..Default::default()
        };
        let request = Exec { env: [("A".into(), "request".into())].into(), ..Default::default() };
        let environment = environment(&config, &request);
        let expected =
            [("A", "request"), ("HOME", "/root"), ("LANG", "C.UTF-8"), ("PATH", "/image"), ("TERM", "xterm")];
        assert_eq!(environment.into_iter().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn looks_a_command_up_in_its_own_path() {
        assert_eq!(resolve("sh", "/nowhere:/bin", Path::new("/")).unwrap(), Path::new("/bin/sh"));
        assert_eq!(resolve("sh", "bin", Path::new("/")).unwrap(), Path::new("/bin/sh"));
        assert_eq!(resolve("./x", "/bin", Path::new("/")).unwrap(), Path::new("./x"));
    }

    #[test]
    fn tells_a_missing_command_from_one_that_cannot_run() {
        assert_eq!(resolve("no-such-command", "/bin", Path::new("/")).unwrap_err().code, Code::NotFound);
        assert_eq!(resolve("passwd", "/etc", Path::new("/")).unwrap_err().code, Code::NotExecutable);
    }

    #[test]
    fn a_working_directory_must_be_one() {
        let request = |cwd: &str| Exec { cwd: Some(cwd.into()), ..Default::default() };
        let reply = working_directory(&GuestConfig::default(), &request("/etc/passwd")).unwrap_err();
        assert_eq!((reply.code, reply.errno.as_deref()), (Code::CwdInvalid, Some("ENOTDIR")));
        let reply = working_directory(&GuestConfig::default(), &request("/nowhere")).unwrap_err();
        assert_eq!((reply.code, reply.errno.as_deref()), (Code::CwdInvalid, Some("ENOENT")));
    }

    #[test]
    fn only_the_working_directory_of_an_image_is_made() {
        let root = tempfile::tempdir().unwrap();
        let (own, other) = (root.path().join("a/b"), root.path().join("c"));
        let cwd = |path: &Path| Some(path.to_str().unwrap().to_owned());
        let mut config = GuestConfig { cwd: cwd(&own), ..Default::default() };
        assert!(working_directory(&config, &Exec::default()).is_err());
        config.make_cwd = true;
        assert!(working_directory(&config, &Exec { cwd: cwd(&other), ..Default::default() }).is_err());
        assert_eq!(working_directory(&config, &Exec::default()).unwrap(), own);
        assert!(own.is_dir() && !other.exists());
    }
}
