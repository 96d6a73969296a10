//! Names of error numbers, as the protocol carries them.

use std::io;

pub use machinen_archive::errno as number;

macro_rules! names {
    ($($name:ident)*) => {
        /// The symbolic name of a Linux error number.
        pub const fn name(errno: i32) -> Option<&'static str> {
            match errno {
                $(libc::$name => Some(stringify!($name)),)*
                _ => None,
            }
        }
    };
}

names! {
    EPERM ENOENT ESRCH EINTR EIO ENXIO E2BIG ENOEXEC EBADF ECHILD EAGAIN ENOMEM EACCES EFAULT ENOTBLK EBUSY EEXIST EXDEV ENODEV
    ENOTDIR EISDIR EINVAL ENFILE EMFILE ENOTTY ETXTBSY EFBIG ENOSPC ESPIPE EROFS EMLINK EPIPE EDOM ERANGE EDEADLK ENAMETOOLONG
    ENOLCK ENOSYS ENOTEMPTY ELOOP ENODATA ETIME EOVERFLOW EILSEQ EUSERS EOPNOTSUPP ECONNRESET ENOBUFS ETIMEDOUT ECONNREFUSED
    EALREADY EINPROGRESS ESTALE EUCLEAN EDQUOT ENOMEDIUM ECANCELED ELIBBAD EREMOTEIO EPROTO EBADMSG
}

/// The name of an I/O error's number.
pub fn of(error: &io::Error) -> Option<String> {
    let errno = number(error)?;
    Some(name(errno).map_or_else(|| format!("E{errno}"), str::to_owned))
}
