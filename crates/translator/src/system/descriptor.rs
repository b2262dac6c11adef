//! Selectors, descriptors and gates as they lie in memory (Intel SDM vol. 3A, 3.4 and 3.5).

use engine::state::Segment;

use crate::cpu::{Cpu, vector};
use crate::mmu::Rights;
use crate::op::{Done, Leave};

/// System descriptor types (SDM vol. 3A, table 3-2); in IA-32e mode only LDT, the long TSS, call gate and IDT gates exist.
pub(super) mod kind {
    pub(in crate::system) const TSS_16: u8 = 1;
    pub(in crate::system) const LDT: u8 = 2;
    pub(in crate::system) const TSS_16_BUSY: u8 = 3;
    pub(in crate::system) const CALL_GATE_16: u8 = 4;
    pub(in crate::system) const TASK_GATE: u8 = 5;
    pub(in crate::system) const INTERRUPT_GATE_16: u8 = 6;
    pub(in crate::system) const TRAP_GATE_16: u8 = 7;
    pub(in crate::system) const TSS: u8 = 9;
    pub(in crate::system) const TSS_BUSY: u8 = 11;
    pub(in crate::system) const CALL_GATE: u8 = 12;
    pub(in crate::system) const INTERRUPT_GATE: u8 = 14;
    pub(in crate::system) const TRAP_GATE: u8 = 15;
}

/// The part of a selector that error codes carry.
pub(super) fn selector_code(selector: u16) -> u32 {
    u32::from(selector & !3)
}

/// True for the null selectors 0..=3.
pub(super) fn is_null(selector: u16) -> bool {
    selector & !3 == 0
}

/// A descriptor, with the upper half where it has one (system descriptors in IA-32e mode).
#[derive(Clone, Copy, Debug)]
pub(super) struct Descriptor {
    /// The 8 bytes every descriptor has.
    pub low: u64,
    /// Bits 63:32 of a base or offset.
    pub high: u32,
    /// Linear address of the descriptor.
    pub at: u64,
}

impl Descriptor {
    /// Type field, 0..=15.
    pub(super) fn kind(&self) -> u8 {
        (self.low >> 40 & 15) as u8
    }
    /// The S bit: code or data.
    pub(super) fn code_or_data(&self) -> bool {
        self.low >> 44 & 1 != 0
    }
    pub(super) fn is_code(&self) -> bool {
        self.code_or_data() && self.kind() & 8 != 0
    }
    pub(super) fn is_conforming(&self) -> bool {
        self.kind() & 4 != 0
    }
    pub(super) fn is_writable_data(&self) -> bool {
        self.code_or_data() && self.kind() & 0b1010 == 0b0010
    }
    /// Data, or code that may be read.
    pub(super) fn is_readable(&self) -> bool {
        self.code_or_data() && (self.kind() & 8 == 0 || self.kind() & 2 != 0)
    }
    pub(super) fn dpl(&self) -> u8 {
        (self.low >> 45 & 3) as u8
    }
    pub(super) fn present(&self) -> bool {
        self.low >> 47 & 1 != 0
    }
    pub(super) fn long(&self) -> bool {
        self.low >> 53 & 1 != 0
    }
    pub(super) fn big(&self) -> bool {
        self.low >> 54 & 1 != 0
    }

    /// Byte-granular limit.
    pub(super) fn limit(&self) -> u32 {
        let limit = (self.low & 0xffff | self.low >> 32 & 0xf_0000) as u32;
        if self.low >> 55 & 1 != 0 { limit << 12 | 0xfff } else { limit }
    }

    /// The segment register this descriptor makes.
    pub(super) fn segment(&self, selector: u16) -> Segment {
        let base = self.low >> 16 & 0xff_ffff | self.low >> 32 & 0xff00_0000 | u64::from(self.high) << 32;
        Segment { selector, attributes: (self.low >> 40) as u16 & 0xf0ff, limit: self.limit(), base }
    }

    /// Gates: the target's selector.
    pub(super) fn gate_selector(&self) -> u16 {
        (self.low >> 16) as u16
    }

    /// Gates: the target's offset, 64 bits where the gate is a long one.
    pub(super) fn gate_offset(&self) -> u64 {
        self.low & 0xffff | self.low >> 32 & 0xffff_0000 | u64::from(self.high) << 32
    }
}

impl Cpu {
    /// The linear address of a selector's descriptor, or nothing where it lies outside its table.
    fn descriptor_address(&self, selector: u16, bytes: u64) -> Option<u64> {
        let offset = u64::from(selector & !7);
        let (base, limit) = if selector & 4 == 0 {
            (self.state.gdtr.base, u64::from(self.state.gdtr.limit))
        } else if self.state.ldtr.present() && !is_null(self.state.ldtr.selector) {
            (self.state.ldtr.base, u64::from(self.state.ldtr.limit))
        } else {
            return None;
        };
        (offset + bytes - 1 <= limit).then(|| base.wrapping_add(offset))
    }

    /// Reads a descriptor. `None`: outside its table. Upper halves are read for system descriptors in IA-32e mode.
    pub(super) fn find_descriptor(&mut self, selector: u16) -> Result<Option<Descriptor>, Leave> {
        let Some(at) = self.descriptor_address(selector, 8) else { return Ok(None) };
        let low = self.read_linear::<u64>(at, 3, Rights::System)?;
        let mut descriptor = Descriptor { low, high: 0, at };
        if self.mode.long && !descriptor.code_or_data() {
            if self.descriptor_address(selector, 16).is_none() {
                return Ok(None);
            }
            let high = self.read_linear::<u64>(at.wrapping_add(8), 3, Rights::System)?;
            descriptor.high = high as u32;
            if high >> 40 & 0x1f != 0 {
                // The upper half's type field must be zero (SDM vol. 3A, 3.5.2): make it no type that anybody accepts.
                descriptor.low &= !(0xf << 40);
            }
        }
        Ok(Some(descriptor))
    }

    /// Reads a descriptor that must be in its table: `fault`(selector) otherwise.
    pub(super) fn descriptor(&mut self, selector: u16, fault: u8, external: u32) -> Result<Descriptor, Leave> {
        match self.find_descriptor(selector)? {
            Some(descriptor) => Ok(descriptor),
            None => Err(self.raise_code(fault, selector_code(selector) | external)),
        }
    }

    /// Sets bits in a descriptor's type field (accessed, busy).
    pub(super) fn set_descriptor_kind(&mut self, descriptor: &mut Descriptor, kind: u8) -> Done {
        if descriptor.kind() == kind {
            return Ok(());
        }
        descriptor.low = descriptor.low & !(0xf << 40) | u64::from(kind) << 40;
        self.write_linear(descriptor.at.wrapping_add(5), (descriptor.low >> 40) as u8, 3, Rights::System)
    }

    /// Sets the accessed bit of a code or data descriptor.
    pub(super) fn set_accessed(&mut self, descriptor: &mut Descriptor) -> Done {
        let accessed = descriptor.kind() | 1;
        self.set_descriptor_kind(descriptor, accessed)
    }

    /// #GP(selector).
    pub(super) fn gp_selector(&mut self, selector: u16) -> Leave {
        self.raise_code(vector::GP, selector_code(selector))
    }
}
