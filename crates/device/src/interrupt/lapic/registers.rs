//! Local APIC registers: numbers, bits, reset values (Intel SDM vol. 3A, tables 11-1 and 11-6).
//!
//! A register's number is its xAPIC page offset divided by 16, and its x2APIC MSR less 800h.

pub(super) const ID: u32 = 0x02;
pub(super) const VERSION: u32 = 0x03;
pub(super) const TPR: u32 = 0x08;
pub(super) const APR: u32 = 0x09;
pub(super) const PPR: u32 = 0x0a;
pub(super) const EOI: u32 = 0x0b;
pub(super) const RRD: u32 = 0x0c;
pub(super) const LDR: u32 = 0x0d;
pub(super) const DFR: u32 = 0x0e;
pub(super) const SVR: u32 = 0x0f;
pub(super) const ISR: u32 = 0x10;
pub(super) const ISR_END: u32 = ISR + 7;
pub(super) const TMR: u32 = 0x18;
pub(super) const TMR_END: u32 = TMR + 7;
pub(super) const IRR: u32 = 0x20;
pub(super) const IRR_END: u32 = IRR + 7;
pub(super) const ESR: u32 = 0x28;
pub(super) const ICR: u32 = 0x30;
pub(super) const ICR_HIGH: u32 = 0x31;
pub(super) const LVT: u32 = 0x32;
pub(super) const LVT_END: u32 = LVT + 5;
pub(super) const INITIAL_COUNT: u32 = 0x38;
pub(super) const CURRENT_COUNT: u32 = 0x39;
pub(super) const DIVIDE: u32 = 0x3e;
pub(super) const SELF_IPI: u32 = 0x3f;

/// Version 14h, highest LVT entry 5 (no CMCI), EOI-broadcast suppression supported (SDM 11.4.8).
pub(super) const VERSION_VALUE: u32 = 0x14 | 5 << 16 | 1 << 24;

/// IA32_APIC_BASE (SDM 11.4.4, 11.12.1).
pub(super) mod base {
    pub(crate) const BSP: u64 = 1 << 8;
    pub(crate) const X2APIC: u64 = 1 << 10;
    pub(crate) const ENABLE: u64 = 1 << 11;
    pub(crate) const MODE: u64 = X2APIC | ENABLE;
    pub(crate) const DEFAULT: u64 = 0xfee0_0000;
}

/// Spurious-interrupt vector register (SDM 11.9).
pub(super) mod svr {
    pub(crate) const ENABLE: u32 = 1 << 8;
    pub(crate) const SUPPRESS_EOI_BROADCAST: u32 = 1 << 12;
    /// Vector, enable, focus checking (ignored since the Pentium 4, but 32-bit guests set it), broadcast suppression.
    pub(crate) const WRITABLE: u32 = 0x13ff;
    pub(crate) const RESET: u32 = 0xff;
}

/// Error status register (SDM 11.5.3).
pub(super) mod esr {
    pub(crate) const SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
    pub(crate) const RECEIVED_ILLEGAL_VECTOR: u32 = 1 << 6;
    pub(crate) const ILLEGAL_REGISTER: u32 = 1 << 7;
}

/// Interrupt command register (SDM 11.6.1).
pub(super) mod icr {
    pub(crate) const LOGICAL: u64 = 1 << 11;
    /// Read-only in xAPIC mode; in x2APIC mode reserved, but processors ignore it.
    pub(crate) const DELIVERY_STATUS: u64 = 1 << 12;
    pub(crate) const ASSERT: u64 = 1 << 14;
    pub(crate) const LEVEL: u64 = 1 << 15;
    pub(crate) const LOW_WRITABLE: u64 = 0x000c_cfff;
}

/// Local vector table (SDM 11.5.1): entry numbers and bits.
pub(super) mod lvt {
    pub(crate) const TIMER: usize = 0;
    pub(crate) const LINT0: usize = 3;
    pub(crate) const LINT1: usize = 4;
    pub(crate) const ERROR: usize = 5;
    pub(crate) const MASKED: u32 = 1 << 16;
    pub(crate) const RESET: u32 = MASKED;
    /// Delivery status (12) and remote IRR (14): a write does not change them; neither is ever set here.
    pub(crate) const READ_ONLY: u32 = 1 << 12 | 1 << 14;
    const TSC_DEADLINE: u32 = 1 << 18;

    /// The bits of each entry that are not reserved.
    pub(crate) const fn defined(entry: usize, tsc_deadline: bool) -> u32 {
        match entry {
            TIMER if tsc_deadline => 0x0003_10ff | TSC_DEADLINE,
            TIMER => 0x0003_10ff,
            LINT0 | LINT1 => 0x0001_f7ff,
            ERROR => 0x0001_10ff,
            _ => 0x0001_17ff,
        }
    }
}

/// A set of vectors: IRR, ISR, TMR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Vectors([u32; 8]);

impl Vectors {
    pub(super) fn set(&mut self, vector: u8, value: bool) {
        let bit = 1 << (vector & 31);
        let word = &mut self.0[usize::from(vector >> 5)];
        if value { *word |= bit } else { *word &= !bit }
    }

    pub(super) fn contains(&self, vector: u8) -> bool {
        self.0[usize::from(vector >> 5)] & (1 << (vector & 31)) != 0
    }

    pub(super) fn highest(&self) -> Option<u8> {
        let (index, word) = self.0.iter().enumerate().rev().find(|(_, word)| **word != 0)?;
        Some((index as u32 * 32 + word.ilog2()) as u8)
    }

    /// The 32 vectors from `32 * index`; `index` is taken modulo 8.
    pub(super) fn word(&self, index: u32) -> u32 {
        self.0[(index & 7) as usize]
    }
}
