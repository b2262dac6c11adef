//! From a memory operand to a linear address: effective addresses and segmentation.

use engine::state::seg;

use crate::cpu::{Cpu, size_mask, vector};
use crate::mmu::Access;
use crate::op::{AddressForm, Leave, Mem, NO_REG};

impl Cpu {
    /// The offset part of an operand's address, truncated to the address size (what LEA returns).
    #[inline(always)]
    pub(crate) fn effective_address(&self, mem: &Mem) -> u64 {
        let gpr = &self.state.gpr;
        match mem.form {
            AddressForm::Absolute => mem.disp,
            AddressForm::Base => gpr[(mem.base & 15) as usize].wrapping_add(mem.disp),
            AddressForm::BaseIndex => gpr[(mem.base & 15) as usize]
                .wrapping_add(gpr[(mem.index & 15) as usize] << mem.scale)
                .wrapping_add(mem.disp),
            AddressForm::General => self.general_address(mem),
        }
    }

    fn general_address(&self, mem: &Mem) -> u64 {
        let register = |number: u8| if number == NO_REG { 0 } else { self.state.gpr[(number & 15) as usize] };
        let sum = register(mem.base).wrapping_add(register(mem.index) << mem.scale).wrapping_add(mem.disp);
        sum & size_mask(mem.address_size)
    }

    /// The linear address of an operand of `bytes` bytes, with the segment's checks made.
    #[inline(always)]
    pub(crate) fn linear(&mut self, mem: &Mem, bytes: u64, access: Access) -> Result<u64, Leave> {
        let offset = self.effective_address(mem);
        if mem.form != AddressForm::General {
            return Ok(offset);
        }
        self.segmented(mem.segment as usize, offset, bytes, access)
    }

    /// Adds a segment's base to `offset` and checks its limit and type (SDM vol. 3A, 5.3 and 5.4). In 64-bit mode only FS
    /// and GS have a base, and canonical checks are made by the access itself.
    pub(crate) fn segmented(&mut self, segment: usize, offset: u64, bytes: u64, access: Access) -> Result<u64, Leave> {
        let register = self.state.segments[segment];
        if self.mode.is_64() {
            return Ok(if segment >= seg::FS { offset.wrapping_add(register.base) } else { offset });
        }
        let linear = register.base.wrapping_add(offset) & 0xffff_ffff;
        let last = offset + (bytes - 1);
        let limit = u64::from(register.limit);
        if self.mode.real_segments() {
            return if last > limit { Err(self.segment_fault(segment)) } else { Ok(linear) };
        }
        let code = register.kind() & 8 != 0;
        let readable = !code || register.kind() & 2 != 0;
        let writable = !code && register.kind() & 2 != 0;
        let allowed = register.present()
            && match access {
                Access::Read => readable,
                Access::Write => writable,
                Access::Execute => code,
            };
        let expand_down = !code && register.kind() & 4 != 0;
        let inside = if expand_down {
            let top = if register.big() { 0xffff_ffff } else { 0xffff };
            offset > limit && last <= top
        } else {
            last <= limit
        };
        if allowed && inside { Ok(linear) } else { Err(self.segment_fault(segment)) }
    }

    /// #SS(0) for the stack segment, #GP(0) for all others.
    pub(crate) fn segment_fault(&mut self, segment: usize) -> Leave {
        self.raise_code(if segment == seg::SS { vector::SS } else { vector::GP }, 0)
    }

    /// The linear address of the stack slot of `bytes` bytes at stack offset `offset`.
    #[inline(always)]
    pub(crate) fn stack_linear(&mut self, offset: u64, bytes: u64, access: Access) -> Result<u64, Leave> {
        if self.mode.is_64() {
            return Ok(offset);
        }
        self.segmented(seg::SS, offset & size_mask(self.mode.stack), bytes, access)
    }
}

/// True for a 48-bit canonical address.
pub(crate) const fn canonical(address: u64) -> bool {
    ((address as i64) << 16 >> 16) as u64 == address
}
