//! Finds out what kind of file a program is, to say why the kernel does not run it.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

/// How many bytes the kernel searches for an interpreter's name (Linux, `BINPRM_BUF_SIZE`).
const HEAD: usize = 256;
/// How many program headers are read at most.
const MOST_SEGMENTS: usize = 64;
const PT_INTERP: u32 = 3;

fn head(program: &Path) -> Option<Vec<u8>> {
    let mut head = Vec::new();
    File::open(program).ok()?.take(HEAD as u64).read_to_end(&mut head).ok()?;
    Some(head)
}

/// The interpreter of a script, or the loader of a dynamically linked program.
pub fn interpreter(program: &Path) -> Option<String> {
    let head = head(program)?;
    let name = match head.strip_prefix(b"#!") {
        Some(line) => line.split(|byte| *byte == b'\n').next()?.to_vec(),
        None => loader(&head, &File::open(program).ok()?)?,
    };
    let name = String::from_utf8_lossy(&name).into_owned();
    // A carriage return is kept and shown, because it is the usual reason why a name that looks right is wrong.
    let name = name.split([' ', '\t', '\0']).find(|word| !word.is_empty())?;
    Some(name.escape_debug().to_string())
}

/// The loader's name, from the segment PT_INTERP of a 64-bit ELF file (elf(5)).
fn loader(head: &[u8], file: &File) -> Option<Vec<u8>> {
    if !head.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let table = u64::from_le_bytes(*head.get(32..40)?.first_chunk()?);
    let size = u64::from(u16::from_le_bytes(*head.get(54..56)?.first_chunk()?));
    let count = usize::from(u16::from_le_bytes(*head.get(56..58)?.first_chunk()?));
    (0..count.min(MOST_SEGMENTS) as u64).find_map(|n| {
        let mut segment = [0; 56];
        file.read_exact_at(&mut segment, table.checked_add(n * size)?).ok()?;
        let field = |at: usize| Some(u64::from_le_bytes(*segment.get(at..at + 8)?.first_chunk()?));
        if u32::from_le_bytes(*segment.first_chunk()?) != PT_INTERP {
            return None;
        }
        let mut name = vec![0; usize::try_from(field(32)?).ok().filter(|length| *length <= HEAD)?];
        file.read_exact_at(&mut name, field(8)?).ok()?;
        Some(name)
    })
}

/// Describes a file that this machine cannot execute.
pub fn foreign(program: &Path) -> String {
    let Some(head) = head(program) else { return "it cannot be read".to_owned() };
    if !head.starts_with(b"\x7fELF") {
        let what = if head.is_empty() {
            "it is empty"
        } else {
            "it is neither an ELF program nor a script that begins with #!"
        };
        return what.to_owned();
    }
    let machine = head.get(18..20).and_then(|bytes| bytes.first_chunk()).map(|bytes| u16::from_le_bytes(*bytes));
    let made_for = match machine {
        Some(3 | 62) => return "it is a damaged program, or none to be started by itself".to_owned(),
        Some(40) => "arm (32 bit)".to_owned(),
        Some(183) => "arm64".to_owned(),
        Some(243) => "riscv".to_owned(),
        Some(22) => "s390".to_owned(),
        Some(21) => "ppc64".to_owned(),
        Some(other) => format!("processor type {other} of ELF"),
        None => return "it ends in the middle of its ELF header".to_owned(),
    };
    format!("it is made for {made_for}, this machine is x86-64")
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn file(content: &[u8]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), content).unwrap();
        file
    }

    #[test]
    fn finds_the_interpreter_of_a_script() {
        let named = |content: &[u8]| interpreter(file(content).path());
        assert_eq!(named(b"#! /usr/bin/env python3\nx").as_deref(), Some("/usr/bin/env"));
        assert_eq!(named(b"#!/bin/sh\r\n").as_deref(), Some("/bin/sh\\r"));
        assert_eq!(named(b"#!\n"), None);
        assert_eq!(named(b"echo"), None);
    }

    #[test]
    fn finds_the_loader_of_a_program() {
        let sh = interpreter(Path::new("/bin/ls")).unwrap();
        assert!(sh.starts_with("/lib"), "{sh}");
        assert!(Path::new(&sh).exists());
    }

    #[test]
    fn says_what_it_is() {
        let mut arm = vec![0; 64];
        arm[..6].copy_from_slice(b"\x7fELF\x02\x01");
        arm[18] = 183;
        assert!(foreign(file(&arm).path()).contains("arm64"));
        assert!(foreign(file(b"echo hi").path()).contains("neither"));
        assert!(foreign(file(b"").path()).contains("empty"));
        assert!(foreign(file(b"\x7fELF").path()).contains("middle"));
    }
}
