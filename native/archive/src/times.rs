//! Times in archives: whole seconds in a header, and what a header cannot hold as a decimal number in an extended one (POSIX pax, `mtime`).

use rustix::fs::Timespec;

pub const KEY: &str = "mtime";

/// The largest number of eleven octal digits.
const MAX_HEADER: i64 = 0o777_7777_7777;
const NANOSECONDS: u32 = 1_000_000_000;

/// The nearest second that a header can hold.
pub fn header_seconds(seconds: i64) -> u64 {
    seconds.clamp(0, MAX_HEADER).unsigned_abs()
}

/// The decimal text of a time. A time before 1970 counts backwards in it, while the kernel's nanoseconds always count forwards.
pub fn write(seconds: i64, nanoseconds: u64) -> String {
    match (seconds, nanoseconds) {
        (_, 0) => seconds.to_string(),
        (..0, _) => format!("-{}.{:09}", -(seconds + 1), u64::from(NANOSECONDS) - nanoseconds),
        _ => format!("{seconds}.{nanoseconds:09}"),
    }
}

/// Parses the decimal text of a time; `None` if it is no time. Digits beyond nanoseconds are dropped.
pub fn read(text: &str) -> Option<Timespec> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(fraction) || !digits(whole.strip_prefix('-').unwrap_or(whole)) {
        return None;
    }
    let seconds = whole.parse::<i64>().ok()?;
    let nanoseconds = fraction
        .bytes()
        .chain(std::iter::repeat(b'0'))
        .take(9)
        .fold(0, |sum, digit| sum * 10 + u32::from(digit - b'0'));
    let (tv_sec, tv_nsec) = if whole.starts_with('-') && nanoseconds > 0 {
        (seconds.checked_sub(1)?, NANOSECONDS - nanoseconds)
    } else {
        (seconds, nanoseconds)
    };
    Some(Timespec { tv_sec, tv_nsec: tv_nsec.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let seconds = [0, 1, -1, -2, 1_700_000_000, 1 << 33, 1 << 40, i64::MAX, i64::MIN + 1];
        for (seconds, nanoseconds) in
            seconds.into_iter().flat_map(|seconds| [0, 1, 500_000_000, 999_999_999].map(|n| (seconds, n)))
        {
            let text = write(seconds, nanoseconds);
            let time = read(&text).unwrap();
            assert_eq!((time.tv_sec, time.tv_nsec.cast_unsigned()), (seconds, nanoseconds), "{text}");
        }
        assert_eq!(write(-2, 500_000_000), "-1.500000000");
        assert_eq!(read("1.5").map(|time| (time.tv_sec, time.tv_nsec)), Some((1, 500_000_000)));
        assert_eq!(read("-0.25").map(|time| (time.tv_sec, time.tv_nsec)), Some((-1, 750_000_000)));
    }

    #[test]
    fn what_is_no_time_is_none() {
        for text in [
            "",
            "-",
            ".5",
            "x",
            "1.x",
            "1.2.3",
            "+1",
            "--1",
            "1e5",
            "9223372036854775808",
            " 1",
            "-9223372036854775808.5",
        ] {
            assert!(read(text).is_none(), "{text:?}");
        }
    }
}
