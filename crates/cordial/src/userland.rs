//! What a generated guest has besides its first process: busybox.

use crate::cache::{Cache, hash};
use crate::failure::Failure;
use crate::kernel;
use std::fs;
use std::path::Path;
use std::process::Command;

/// A static busybox and the paths its commands go by.
#[derive(Clone, Debug)]
pub struct Busybox {
    /// The program.
    pub bytes: Vec<u8>,
    /// Paths such as `bin/sh`, without a leading slash.
    pub commands: Vec<String>,
}

impl Busybox {
    /// The host's where it is static, Debian's otherwise.
    ///
    /// # Errors
    /// Neither is to be had.
    pub fn find(cache: &Cache) -> Result<Self, Failure> {
        if let Some(busybox) = Self::of_host() {
            return Ok(busybox);
        }
        let path = kernel::pull_busybox(cache)?.verify("busybox")?;
        Self::read(&path).ok_or_else(|| Failure::other(format!("{} is not a static busybox", path.display())))
    }

    /// The one that [`find`](Self::find) would take without fetching anything.
    pub fn at_hand(cache: &Cache) -> Option<Self> {
        let cached = || Self::read(&cache.find(kernel::BUSYBOX)?.verify("busybox").ok()?);
        Self::of_host().or_else(cached)
    }

    fn of_host() -> Option<Self> {
        ["/bin/busybox", "/usr/bin/busybox"].iter().find_map(|path| Self::read(Path::new(path)))
    }

    fn read(path: &Path) -> Option<Self> {
        let bytes = fs::read(path).ok().filter(|bytes| is_static(bytes))?;
        let commands = commands(path)?;
        tracing::debug!(path = %path.display(), sha256 = %hash(&bytes), "busybox");
        Some(Self { bytes, commands })
    }
}

/// A busybox that has a shell tells all its commands.
fn commands(path: &Path) -> Option<Vec<String>> {
    let output = Command::new(path).arg("--list-full").output().ok().filter(|output| output.status.success())?;
    let list = String::from_utf8(output.stdout).ok()?;
    let commands: Vec<_> = list.lines().map(|line| line.trim_start_matches('/').to_owned()).collect();
    commands.iter().any(|command| command == "bin/sh").then_some(commands)
}

/// A 64-bit x86 ELF program without an interpreter (ELF-64 object file format: no PT_INTERP segment).
fn is_static(elf: &[u8]) -> bool {
    let number = |at: usize, length: usize| {
        let bytes = elf.get(at..at.checked_add(length)?)?;
        Some(bytes.iter().rev().fold(0_u64, |value, byte| value << 8 | u64::from(*byte)) as usize)
    };
    const MACHINE_X86_64: usize = 62;
    const PT_INTERP: usize = 3;
    let segments = || {
        let (table, size, count) = (number(0x20, 8)?, number(0x36, 2)?, number(0x38, 2)?);
        (0..count).map(|index| number(table.checked_add(index * size)?, 4)).collect::<Option<Vec<_>>>()
    };
    elf.starts_with(b"\x7fELF\x02\x01")
        && number(0x12, 2) == Some(MACHINE_X86_64)
        && segments().is_some_and(|kinds| !kinds.contains(&PT_INTERP))
}

/// Where a program would be looked for in the guest.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dynamic_program_is_not_static() {
        let own = fs::read("/proc/self/exe").unwrap();
        assert!(!is_static(&own));
        assert!(!is_static(b"#!/bin/sh\n"));
        assert!(!is_static(&own[..0x30]));
        assert!(is_static(crate::initramfs::INIT));
    }
}
