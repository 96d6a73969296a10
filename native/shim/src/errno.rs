//! Names of errors, for `code` of a `failed` event.

use std::io;

/// The errno's name as in errno(3); those a shim can run into. Others: `ERRNO_<number>`; errors that are none: `EINVAL`.
pub fn name(error: &io::Error) -> String {
    let known = match error.raw_os_error() {
        Some(libc::EPERM) => "EPERM",
        Some(libc::ENOENT) => "ENOENT",
        Some(libc::EIO) => "EIO",
        Some(libc::E2BIG) => "E2BIG",
        Some(libc::ENOEXEC) => "ENOEXEC",
        Some(libc::EAGAIN) => "EAGAIN",
        Some(libc::ENOMEM) => "ENOMEM",
        Some(libc::EACCES) => "EACCES",
        Some(libc::EBUSY) => "EBUSY",
        Some(libc::EEXIST) => "EEXIST",
        Some(libc::ENOTDIR) => "ENOTDIR",
        Some(libc::EISDIR) => "EISDIR",
        Some(libc::EINVAL) | None => "EINVAL",
        Some(libc::ENFILE) => "ENFILE",
        Some(libc::EMFILE) => "EMFILE",
        Some(libc::ETXTBSY) => "ETXTBSY",
        Some(libc::EFBIG) => "EFBIG",
        Some(libc::ENOSPC) => "ENOSPC",
        Some(libc::EROFS) => "EROFS",
        Some(libc::ENAMETOOLONG) => "ENAMETOOLONG",
        Some(libc::ELOOP) => "ELOOP",
        Some(libc::EADDRINUSE) => "EADDRINUSE",
        Some(libc::EDQUOT) => "EDQUOT",
        Some(libc::ECANCELED) => "ECANCELED",
        Some(number) => return format!("ERRNO_{number}"),
    };
    known.to_owned()
}
