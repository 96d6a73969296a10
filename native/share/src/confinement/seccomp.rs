//! The system calls that serving takes, and no others. One that is not allowed fails with EPERM: so a call that was overlooked costs one request
//! and not the guest's shares, and whoever got this process to make others has nothing from them either.

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    apply_filter,
};

/// The process itself: memory, threads, time.
const PROCESS: [i64; 32] = [
    libc::SYS_brk,
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_setfsgid,
    libc::SYS_setfsuid,
    libc::SYS_sigaltstack,
    libc::SYS_umask,
];

/// Files, without a change to any that is not open for writing.
const READING: [i64; 27] = [
    libc::SYS_close,
    libc::SYS_dup3,
    libc::SYS_fanotify_mark,
    libc::SYS_fdatasync,
    libc::SYS_flock,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_getdents64,
    libc::SYS_getxattr,
    libc::SYS_listxattr,
    libc::SYS_lseek,
    libc::SYS_name_to_handle_at,
    libc::SYS_newfstatat,
    libc::SYS_openat2,
    libc::SYS_pread64,
    libc::SYS_preadv2,
    libc::SYS_read,
    libc::SYS_readlinkat,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_statx,
    libc::SYS_syncfs,
    libc::SYS_write,
    libc::SYS_writev,
];

/// What changes files. With read-only shares alone none of it is allowed.
const CHANGING: [i64; 15] = [
    libc::SYS_copy_file_range,
    libc::SYS_fallocate,
    libc::SYS_fchmodat,
    libc::SYS_fchownat,
    libc::SYS_ftruncate,
    libc::SYS_linkat,
    libc::SYS_mkdirat,
    libc::SYS_pwrite64,
    libc::SYS_pwritev2,
    libc::SYS_removexattr,
    libc::SYS_renameat2,
    libc::SYS_setxattr,
    libc::SYS_symlinkat,
    libc::SYS_unlinkat,
    libc::SYS_utimensat,
];

/// False: this kernel has no seccomp filters.
pub fn filter(writable: bool) -> io::Result<bool> {
    let program = program(writable).map_err(io::Error::other)?;
    match apply_filter(&program) {
        Ok(()) => Ok(true),
        Err(seccompiler::Error::Prctl(error) | seccompiler::Error::Seccomp(error))
            if error.raw_os_error() == Some(libc::EINVAL) =>
        {
            Ok(false)
        }
        Err(error) => Err(io::Error::other(error)),
    }
}

fn program(writable: bool) -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    rules.extend(PROCESS.into_iter().chain(READING).map(|call| (call, Vec::new())));
    let executable = wide(libc::PROT_EXEC);
    rules.insert(libc::SYS_mmap, vec![without(2, executable)?]);
    rules.insert(libc::SYS_mprotect, vec![without(2, executable)?]);
    rules.insert(libc::SYS_prctl, vec![equal(0, wide(libc::PR_SET_NAME))?]);
    rules.insert(libc::SYS_unshare, vec![equal(0, wide(libc::CLONE_FS))?]);
    rules.insert(libc::SYS_tgkill, vec![equal(0, u64::from(std::process::id()))?]);
    let commands = [
        libc::F_DUPFD_CLOEXEC,
        libc::F_GETFD,
        libc::F_GETFL,
        libc::F_SETFL,
        libc::F_OFD_GETLK,
        libc::F_OFD_SETLK,
        libc::F_OFD_SETLKW,
    ];
    let commands: Result<_, _> = commands.into_iter().map(|command| equal(1, wide(command))).collect();
    rules.insert(libc::SYS_fcntl, commands?);
    if writable {
        rules.extend(CHANGING.map(|call| (call, Vec::new())));
        rules.insert(libc::SYS_openat, Vec::new());
        // Devices would be this host's.
        let kinds: Result<_, _> = [libc::S_IFREG, libc::S_IFIFO, libc::S_IFSOCK]
            .into_iter()
            .map(|kind| masked(2, u64::from(libc::S_IFMT), u64::from(kind)))
            .collect();
        rules.insert(libc::SYS_mknodat, kinds?);
    } else {
        let changes = libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC | (libc::O_TMPFILE & !libc::O_DIRECTORY);
        rules.insert(libc::SYS_openat, vec![without(2, wide(changes))?]);
    }
    let refused = SeccompAction::Errno(libc::EPERM.cast_unsigned());
    let filter = SeccompFilter::new(rules, refused, SeccompAction::Allow, std::env::consts::ARCH.try_into()?)?;
    filter.try_into()
}

/// The argument has none of these bits.
fn without(argument: u8, bits: u64) -> Result<SeccompRule, seccompiler::BackendError> {
    masked(argument, bits, 0)
}

fn equal(argument: u8, value: u64) -> Result<SeccompRule, seccompiler::BackendError> {
    masked(argument, u64::from(u32::MAX), value)
}

/// All arguments that are looked at are `int` or smaller, of which the kernel ignores the upper half.
fn masked(argument: u8, mask: u64, value: u64) -> Result<SeccompRule, seccompiler::BackendError> {
    let operator = SeccompCmpOp::MaskedEq(mask);
    SeccompRule::new(vec![SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)?])
}

fn wide(number: libc::c_int) -> u64 {
    u64::from(number.cast_unsigned())
}
