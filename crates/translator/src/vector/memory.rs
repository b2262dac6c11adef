//! Operands wider than a general-purpose register: in one page of RAM they are copied at once, everything else takes the
//! ordinary way.

use crate::cpu::Cpu;
use crate::mmu::{Access, Rights};
use crate::op::Done;

/// The host address of `bytes` at a linear address where no check is left to make.
#[inline(always)]
pub(super) fn direct(cpu: &mut Cpu, address: u64, bytes: usize, access: Access) -> Option<*mut u8> {
    match cpu.bulk(address, bytes as u64, access) {
        Some((host, here)) if here == bytes as u64 => Some(host),
        _ => None,
    }
}

/// Reads an operand.
#[inline(always)]
pub(super) fn read(cpu: &mut Cpu, address: u64, buffer: &mut [u8], segment: u8) -> Done {
    match direct(cpu, address, buffer.len(), Access::Read) {
        Some(host) => {
            // SAFETY: `direct` vouches for that many bytes at `host`, which are the guest's and not `buffer`.
            unsafe { std::ptr::copy_nonoverlapping(host, buffer.as_mut_ptr(), buffer.len()) };
            Ok(())
        }
        None => cpu.read_bytes(address, buffer, segment, Rights::Current),
    }
}

/// Writes an operand; all of it or, with a fault, nothing.
#[inline(always)]
pub(super) fn write(cpu: &mut Cpu, address: u64, data: &[u8], segment: u8) -> Done {
    match direct(cpu, address, data.len(), Access::Write) {
        Some(host) => {
            // SAFETY: as in `read`; pages that hold code are not found directly.
            unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), host, data.len()) };
            Ok(())
        }
        None => cpu.write_bytes(address, data, segment, Rights::Current),
    }
}

/// Checks that an operand may be written.
#[inline(always)]
pub(super) fn probe(cpu: &mut Cpu, address: u64, bytes: usize, segment: u8) -> Done {
    match direct(cpu, address, bytes, Access::Write) {
        Some(_) => Ok(()),
        None => cpu.probe_write(address, bytes as u64, segment, Rights::Current),
    }
}
