//! A request, taken apart. It comes from a guest, so nothing in it is believed: every length is checked before it is used, and every name is one
//! component of a path.

use std::ffi::CStr;

use rustix::io::Errno;
use zerocopy::{FromBytes, Immutable, KnownLayout};

use crate::abi::InHeader;

/// The most a `write` carries and a `read` asks for.
pub const MAX_DATA: usize = 1 << 20;
/// The longest request: a header, a structure, a name or two, and data.
pub const MAX_REQUEST: usize = MAX_DATA + 8192;
/// The longest name Linux has (NAME_MAX).
const MAX_NAME: usize = 255;

pub struct Request<'a> {
    pub header: InHeader,
    rest: &'a [u8],
}

impl<'a> Request<'a> {
    /// The request in `bytes`, which are as many as its header says.
    pub fn new(bytes: &'a [u8]) -> Result<Self, Errno> {
        let (header, rest) = InHeader::read_from_prefix(bytes).map_err(|_| Errno::INVAL)?;
        if header.len as usize != bytes.len() {
            return Err(Errno::INVAL);
        }
        // Extensions stand behind everything else (FUSE_CREATE_SUPP_GROUP, which is not asked for).
        let extension = usize::from(header.extension_len) * 8;
        let rest = rest.get(..rest.len().checked_sub(extension).ok_or(Errno::INVAL)?).ok_or(Errno::INVAL)?;
        Ok(Self { header, rest })
    }

    /// The next structure.
    pub fn take<T: FromBytes + KnownLayout + Immutable>(&mut self) -> Result<T, Errno> {
        let (value, rest) = T::read_from_prefix(self.rest).map_err(|_| Errno::INVAL)?;
        self.rest = rest;
        Ok(value)
    }

    /// The next text, which a zero byte ends.
    pub fn text(&mut self) -> Result<&'a CStr, Errno> {
        let text = CStr::from_bytes_until_nul(self.rest).map_err(|_| Errno::INVAL)?;
        self.rest = &self.rest[text.to_bytes_with_nul().len()..];
        Ok(text)
    }

    /// The next text as a name in a directory: not a way to another one.
    pub fn name(&mut self) -> Result<&'a CStr, Errno> {
        let name = self.text()?;
        match name.to_bytes() {
            b"" | b"." | b".." => Err(Errno::INVAL),
            bytes if bytes.contains(&b'/') => Err(Errno::INVAL),
            bytes if bytes.len() > MAX_NAME => Err(Errno::NAMETOOLONG),
            _ => Ok(name),
        }
    }

    /// As many bytes as it says follow.
    pub fn data(&mut self, length: u32) -> Result<&'a [u8], Errno> {
        let (data, rest) = self.rest.split_at_checked(length as usize).ok_or(Errno::INVAL)?;
        self.rest = rest;
        Ok(data)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use zerocopy::IntoBytes;

    use super::*;
    use crate::abi::GetattrIn;

    fn message(rest: &[u8]) -> Vec<u8> {
        let header = InHeader { len: u32::try_from(40 + rest.len()).unwrap(), ..InHeader::default() };
        [header.as_bytes(), rest].concat()
    }

    #[test]
    fn a_name_is_one_component() {
        for (name, expected) in [
            (&b"a\0"[..], Ok(&b"a"[..])),
            (b"\xff..\0", Ok(b"\xff..")),
            (b"\0", Err(Errno::INVAL)),
            (b".\0", Err(Errno::INVAL)),
            (b"..\0", Err(Errno::INVAL)),
            (b"a/b\0", Err(Errno::INVAL)),
            (b"no end", Err(Errno::INVAL)),
        ] {
            let message = message(name);
            let found = Request::new(&message).unwrap().name().map(CStr::to_bytes);
            assert_eq!(found, expected);
        }
        let long = message(&[&[b'x'; 256][..], b"\0"].concat());
        assert_eq!(Request::new(&long).unwrap().name(), Err(Errno::NAMETOOLONG));
    }

    #[test]
    fn lengths_are_those_of_the_message() {
        let mut bytes = message(b"12345678");
        assert!(Request::new(&bytes).unwrap().take::<GetattrIn>().is_err());
        assert_eq!(Request::new(&bytes).unwrap().data(9), Err(Errno::INVAL));
        bytes.push(0);
        assert!(Request::new(&bytes).is_err());
        assert!(Request::new(&bytes[..39]).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_are_too_strange(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(mut request) = Request::new(&bytes) {
                let _ = request.take::<GetattrIn>();
                let _ = request.name();
                let _ = request.data(7);
            }
        }
    }
}
