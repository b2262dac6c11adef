//! What the host's kernel counts of a vCPU: exits that it answers by itself and nobody here sees.
//!
//! The file's format: Linux, Documentation/virt/kvm/api.rst, `KVM_GET_STATS_FD`. A header, descriptors with names, numbers.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use engine::{Cause, Ledger};
use rustix::io::pread;

use crate::sys;

/// What the kernel calls it, and what the ledger does.
const NAMES: [(&str, Cause); 4] = [
    ("halt_exits", Cause::Halt),
    ("hypercalls", Cause::Hypercall),
    ("irq_injections", Cause::Interrupt),
    ("nmi_injections", Cause::Nmi),
];

/// Bytes of `struct kvm_stats_header`, and of `struct kvm_stats_desc` before its name.
const HEADER: usize = 24;
const DESCRIPTOR: usize = 16;
/// More descriptors, or longer names, than any kernel has: a file that says so is something else.
const MOST: usize = 4096;

/// One number in the file that has a row in the ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Counter {
    cause: Cause,
    /// Where it is in the file.
    at: u64,
    /// What of it the ledger has.
    seen: u64,
}

/// The counters of one vCPU.
pub(crate) struct Stats {
    file: OwnedFd,
    counters: Vec<Counter>,
    /// Where the first of them is, and what is read from there on: all at once.
    start: u64,
    numbers: Vec<u8>,
}

impl Stats {
    /// The counters of `vcpu`.
    pub(crate) fn new(vcpu: &impl AsRawFd) -> io::Result<Self> {
        let file = sys::stats(vcpu)?;
        let mut header = [0; HEADER];
        read(&file, 0, &mut header)?;
        let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| header[at + i]));
        // flags, bytes of a name, descriptors, then where the id, the descriptors and the numbers are.
        let (name_bytes, count) = (word(4) as usize, word(8) as usize);
        let (descriptors_at, data_at) = (word(16), word(20));
        if name_bytes > MOST || count > MOST {
            return Err(io::Error::other("statistics in an unknown format"));
        }
        let mut descriptors = vec![0; count * (DESCRIPTOR + name_bytes)];
        read(&file, descriptors_at.into(), &mut descriptors)?;
        let counters = counters(&descriptors, DESCRIPTOR + name_bytes, data_at);
        let places = || counters.iter().map(|counter| counter.at);
        let (start, last) = (places().min().unwrap_or(0), places().max().unwrap_or(0));
        if last - start > MOST as u64 {
            return Err(io::Error::other("statistics in an unknown format"));
        }
        Ok(Self { file, numbers: vec![0; (last - start) as usize + 8], start, counters })
    }

    /// Adds what has been counted since the last time.
    pub(crate) fn add_to(&mut self, ledger: &Ledger) {
        if self.counters.is_empty() || read(&self.file, self.start, &mut self.numbers).is_err() {
            return;
        }
        for counter in &mut self.counters {
            let at = (counter.at - self.start) as usize;
            let now = u64::from_le_bytes(std::array::from_fn(|byte| self.numbers[at + byte]));
            ledger.record_untimed(counter.cause, now.wrapping_sub(std::mem::replace(&mut counter.seen, now)));
        }
    }
}

fn read(file: &OwnedFd, at: u64, to: &mut [u8]) -> io::Result<()> {
    let length = pread(file, &mut *to, at)?;
    if length == to.len() { Ok(()) } else { Err(io::Error::from(io::ErrorKind::UnexpectedEof)) }
}

/// The numbers that have a row, among descriptors of `stride` bytes each.
fn counters(descriptors: &[u8], stride: usize, data_at: u32) -> Vec<Counter> {
    let counter = |descriptor: &[u8]| {
        let name = descriptor.get(DESCRIPTOR..)?.split(|byte| *byte == 0).next()?;
        let (_, cause) = NAMES.iter().find(|(known, _)| known.as_bytes() == name)?;
        let offset = u32::from_le_bytes(descriptor.get(8..12)?.try_into().ok()?);
        Some(Counter { cause: *cause, at: u64::from(data_at) + u64::from(offset), seen: 0 })
    };
    descriptors.chunks_exact(stride).filter_map(counter).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_by_name() {
        let descriptor = |name: &str, offset: u32| {
            let mut bytes = [&[0; 8], &offset.to_le_bytes()[..], &[0; 4], name.as_bytes()].concat();
            bytes.resize(DESCRIPTOR + 16, 0);
            bytes
        };
        let file = [descriptor("halt", 0), descriptor("halt_exits", 8), descriptor("nmi_injections", 24)].concat();
        let counter = |cause, at| Counter { cause, at, seen: 0 };
        assert_eq!(counters(&file, DESCRIPTOR + 16, 1000), [counter(Cause::Halt, 1008), counter(Cause::Nmi, 1024)]);
    }
}
