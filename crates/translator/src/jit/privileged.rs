//! What kernels do all the time, without leaving translated code: interrupt flag, flags image, GS, access control, time.

use iced_x86::Mnemonic;

use super::asm::{At, Label, Place, reg};
use super::emit::{Emit, READ, T1, T2, T3, WRITE};
use super::same::Source;
use crate::home::offset;
use crate::mmu::DataMode;

/// Bits of RFLAGS' second and third byte.
const IF: u8 = 1 << 1;
const AC: u8 = 1 << 2;

const RDTSC: [u8; 2] = [0x0f, 0x31];
const RDTSCP: [u8; 3] = [0x0f, 0x01, 0xf9];
const RCX: usize = engine::state::gpr::RCX;
const STATUS: u64 = engine::state::rflags::STATUS;
const GS: usize = engine::state::seg::GS;

impl Emit<'_> {
    /// Sets or clears bits of a byte in memory.
    fn change_bits(&mut self, at: At, bits: u8, set: bool, live: bool) {
        if live {
            self.save_flags();
        }
        let (field, value) = if set { (1, bits) } else { (4, !bits) };
        self.asm.op(0, 0, &[0x80], field, Place::Mem(at));
        self.asm.byte(value);
        if live {
            self.restore_flags();
        }
    }

    /// CLI, or STI without its shadow: the caller looks for interrupts after the next instruction.
    pub(super) fn set_interrupts(&mut self, source: &Source<'_>, enabled: bool) {
        let at = self.field(offset::RFLAGS + 1);
        self.change_bits(at, IF, enabled, source.live);
    }

    /// Leaves where an interrupt waits that may be delivered now.
    pub(super) fn look_for_interrupts(&mut self, out: Label) {
        self.poll(out);
        let on = self.asm.label();
        self.asm.load_32(T1, self.field(offset::WAITS));
        self.asm.jrcxz(on);
        self.asm.jmp(out);
        self.asm.bind(on);
    }

    /// PUSHF: the status flags are the processor's, the others those of the state.
    pub(super) fn push_flags(&mut self, source: &Source<'_>) -> Option<()> {
        let again = self.asm.bound();
        let at = self.push_room(source, again);
        self.asm.lea(T1, at);
        self.asm.raw(&[0x9c]); // pushfq
        self.asm.pop(T3);
        self.cached = None;
        self.asm.store(self.field(offset::SCRATCH), T1);
        // PEXT and PDEP by the same mask keep the bits of the mask, and flags.
        self.asm.constant(T1, STATUS);
        self.asm.extract(T3, T3, T1);
        self.asm.deposit(T3, T3, T1);
        self.asm.load(T1, self.field(offset::RFLAGS));
        self.asm.lea(T3, At::Index(T3, T1, 0, 0));
        self.asm.load(T1, self.field(offset::SCRATCH));
        self.asm.store(At::Base(T1, 0), T3);
        self.pushed(source);
        Some(())
    }

    pub(super) fn swap_gs(&mut self) {
        let (base, other) = (self.segment_base(GS), self.field(offset::KERNEL_GS_BASE));
        self.asm.load(T1, base);
        self.asm.load(T2, other);
        self.asm.store(base, T2);
        self.asm.store(other, T1);
    }

    /// STAC and CLAC: other tables are in force.
    pub(super) fn set_access_control(&mut self, source: &Source<'_>, on: bool) {
        let at = self.field(offset::RFLAGS + 2);
        self.change_bits(at, AC, on, source.live);
        let (mode, table) = if on { (DataMode::SupervisorAny, 16) } else { (DataMode::Supervisor, 0) };
        self.asm.store_constant(self.field(offset::DATA_MODE), mode as i32);
        self.asm.load(READ, self.field(offset::TABLES + table));
        self.asm.load(WRITE, self.field(offset::TABLES + table + 8));
        self.asm.store(self.field(offset::READ), READ);
        self.asm.store(self.field(offset::WRITE), WRITE);
    }

    /// RDTSC and RDTSCP: the host's counter, moved by the guest's offset. Flags stay.
    pub(super) fn read_tsc(&mut self, source: &Source<'_>) {
        if source.instruction.mnemonic() == Mnemonic::Rdtscp {
            self.asm.raw(&RDTSCP); // its ECX is the host's
            self.asm.load_32(T1, self.field(offset::TSC_AUX));
            self.set(RCX, T1);
        } else {
            self.asm.raw(&RDTSC);
        }
        self.asm.rotate_right(reg::RDX, reg::RDX, 32);
        self.asm.lea(reg::RAX, At::Index(reg::RAX, reg::RDX, 0, 0));
        self.asm.load(T1, self.field(offset::TSC));
        self.asm.load(T1, At::Base(T1, 0));
        self.asm.lea(reg::RAX, At::Index(reg::RAX, T1, 0, 0));
        self.asm.rotate_right(reg::RDX, reg::RAX, 32);
        self.asm.mov_32(reg::RDX, reg::RDX);
        self.asm.mov_32(reg::RAX, reg::RAX);
    }
}
