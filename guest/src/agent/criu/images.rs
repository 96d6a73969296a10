//! Reads and corrects what is needed of CRIU's image files. Each file is eight bytes of magic numbers and then records: a length (u32,
//! little-endian) and a protobuf message (criu.org/Images).

use std::fs;
use std::io;
use std::path::Path;

use prost::Message;

const FILES: &str = "files.img";
const MAGIC: usize = 8;
/// A value of `fd_types` in CRIU's fdinfo.proto.
const REGULAR: u32 = 1;
const TIMERFD: u32 = 17;
/// The beginning of the name that CRIU gives to an open file whose own name was removed, while other links to it remain.
const LINK_REMAP: &str = "link_remap.";

#[derive(Clone, PartialEq, Message)]
struct FileEntry {
    #[prost(uint32, required, tag = "1")]
    kind: u32,
    #[prost(uint32, required, tag = "2")]
    id: u32,
    #[prost(message, optional, tag = "3")]
    regular: Option<RegularFile>,
    #[prost(message, optional, tag = "12")]
    timer: Option<Timer>,
}

/// The fields that are read of a regular file's record.
#[derive(Clone, PartialEq, Message)]
struct RegularFile {
    #[prost(string, required, tag = "6")]
    name: String,
}

/// All fields, because the record is written again.
#[derive(Clone, PartialEq, Message)]
struct Timer {
    #[prost(uint32, required, tag = "1")]
    id: u32,
    #[prost(uint32, required, tag = "2")]
    flags: u32,
    #[prost(bytes = "vec", required, tag = "3")]
    owner: Vec<u8>,
    #[prost(uint32, required, tag = "4")]
    clock: u32,
    #[prost(uint64, required, tag = "5")]
    ticks: u64,
    #[prost(uint32, required, tag = "6")]
    settime_flags: u32,
    #[prost(uint64, required, tag = "7")]
    value_seconds: u64,
    #[prost(uint64, required, tag = "8")]
    value_nanoseconds: u64,
    #[prost(uint64, required, tag = "9")]
    interval_seconds: u64,
    #[prost(uint64, required, tag = "10")]
    interval_nanoseconds: u64,
}

/// Paths to which CRIU has linked open files that had lost their names. CRIU removes these links when the dump is done, but a restore needs
/// them.
pub fn link_remaps(directory: &Path) -> io::Result<Vec<String>> {
    link_remaps_in(&fs::read(directory.join(FILES))?)
}

fn link_remaps_in(image: &[u8]) -> io::Result<Vec<String>> {
    let mut remaps = Vec::new();
    for record in records(image)? {
        let entry = FileEntry::decode(record)?;
        if let (REGULAR, Some(RegularFile { name })) = (entry.kind, entry.regular)
            && Path::new(&name)
                .file_name()
                .is_some_and(|file| file.as_encoded_bytes().starts_with(LINK_REMAP.as_bytes()))
        {
            remaps.push(name);
        }
    }
    Ok(remaps)
}

/// Arms expired timers again. CRIU saves a periodic timer (timerfd) that expired while its process was frozen with no time left, which
/// means "not armed": it would never tick again. It is given the least time there is.
pub fn rearm_timers(directory: &Path) -> io::Result<()> {
    let path = directory.join(FILES);
    if let Some(image) = rearmed(&fs::read(&path)?)? {
        fs::write(path, image)?;
    }
    Ok(())
}

/// The image with its timers armed again; `None` when they all are.
fn rearmed(image: &[u8]) -> io::Result<Option<Vec<u8>>> {
    let mut changed = false;
    let mut out = image.get(..MAGIC).ok_or_else(cut)?.to_vec();
    for record in records(image)? {
        let mut entry = FileEntry::decode(record)?;
        match &mut entry.timer {
            Some(timer) if entry.kind == TIMERFD && timer.expired() => {
                timer.value_nanoseconds = 1;
                let armed = entry.encode_to_vec();
                out.extend(u32::try_from(armed.len()).map_err(io::Error::other)?.to_le_bytes());
                out.extend(armed);
                changed = true;
            }
            _ => {
                out.extend(u32::try_from(record.len()).map_err(io::Error::other)?.to_le_bytes());
                out.extend(record);
            }
        }
    }
    Ok(changed.then_some(out))
}

impl Timer {
    fn expired(&self) -> bool {
        let armed = self.value_seconds > 0 || self.value_nanoseconds > 0;
        !armed && (self.interval_seconds > 0 || self.interval_nanoseconds > 0)
    }
}

fn records(image: &[u8]) -> io::Result<Vec<&[u8]>> {
    let mut rest = image.get(MAGIC..).ok_or_else(cut)?;
    let mut records = Vec::new();
    while let Some((length, behind)) = rest.split_first_chunk() {
        let length = u32::from_le_bytes(*length) as usize;
        let (record, next) = behind.split_at_checked(length).ok_or_else(cut)?;
        records.push(record);
        rest = next;
    }
    if rest.is_empty() { Ok(records) } else { Err(cut()) }
}

fn cut() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "an image ends in the middle of a record")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(entries: &[FileEntry]) -> Vec<u8> {
        let mut image = vec![0x19, 0x43, 0x56, 0x54, 0x38, 0x31, 0x30, 0x56];
        for entry in entries {
            let record = entry.encode_to_vec();
            image.extend(u32::try_from(record.len()).unwrap().to_le_bytes());
            image.extend(record);
        }
        image
    }

    fn timer(value: u64, interval: u64) -> FileEntry {
        let owner = vec![0x08, 0, 0x10, 0, 0x18, 0, 0x20, 0, 0x28, 0];
        let timer = Timer {
            id: 7,
            flags: 2,
            owner,
            clock: 1,
            ticks: 1,
            settime_flags: 0,
            value_seconds: 0,
            value_nanoseconds: value,
            interval_seconds: 0,
            interval_nanoseconds: interval,
        };
        FileEntry { kind: TIMERFD, id: 7, regular: None, timer: Some(timer) }
    }

    /// The record that criu 3.17.1 wrote for a timer of 50 ms that had expired once.
    const SAVED: &str = "0811101162210811100 21a0a08001000180020002800200128013000380040004800 5080e1eb17";

    fn bytes(hex: &str) -> Vec<u8> {
        let digits: Vec<u8> = hex.bytes().filter(u8::is_ascii_hexdigit).collect();
        digits.chunks(2).map(|two| u8::from_str_radix(str::from_utf8(two).unwrap(), 16).unwrap()).collect()
    }

    #[test]
    fn an_expired_timer_is_armed_again_and_nothing_else_changes() {
        let record = bytes(SAVED);
        let mut saved = image(&[]);
        saved.extend(u32::try_from(record.len()).unwrap().to_le_bytes());
        saved.extend(&record);
        let armed = rearmed(&saved).unwrap().unwrap();
        let expected = bytes(&SAVED.replace("40004800", "40014800"));
        assert_eq!(&armed[MAGIC + 4..], expected);
        assert_eq!(rearmed(&armed).unwrap(), None);
    }

    #[test]
    fn timers_that_run_or_are_off_stay() {
        assert_eq!(rearmed(&image(&[timer(5, 50), timer(0, 0), timer(5, 0)])).unwrap(), None);
    }

    #[test]
    fn finds_the_names_criu_made() {
        let file = |name: &str| FileEntry {
            kind: REGULAR,
            id: 1,
            regular: Some(RegularFile { name: name.to_owned() }),
            timer: None,
        };
        let saved = image(&[file("/root/a"), file("/root/link_remap.16"), file("/link_remap.d/x"), timer(1, 1)]);
        assert_eq!(link_remaps_in(&saved).unwrap(), ["/root/link_remap.16"]);
    }

    #[test]
    fn an_image_may_end_anywhere_and_is_an_error_in_a_record() {
        let whole = image(&[timer(0, 50)]);
        for length in [0, 7, 9, 12, whole.len() - 1] {
            assert!(rearmed(&whole[..length]).is_err(), "{length}");
        }
    }
}
