//! One instruction at a time on a vCPU with real page tables.

mod every;
mod host;
mod known;
mod masked;
mod modes;
mod saving;

use std::sync::Arc;

use engine::cpu_model::{DEFAULT, Feature, HostCpu, lookup};
use engine::state::{Segment, cr0, cr4, efer, seg};
use engine::{VcpuConfig, VcpuId};
use memory::{Gpa, GuestRam};

use super::registers::{Registers, high, set_high, set_xmm, xmm};
use crate::cpu::{Cpu, Exception};
use crate::op::Leave;
use crate::shared::Shared;

/// Where instructions are put.
const CODE: u64 = 0x10000;
/// Free memory up to [`HOLE`].
const DATA: u64 = 0x20000;
/// The first page that is not present.
const HOLE: u64 = 0x30000;

/// A vCPU in 64-bit mode, CPL 0, with everything enabled; the first 256 KiB mapped one to one but for [`HOLE`].
struct Bench {
    cpu: Cpu,
}

impl Bench {
    fn new() -> Self {
        Self::with(|_| true)
    }

    /// With only some of the features the host has.
    fn with(keep: impl Fn(Feature) -> bool) -> Self {
        let ram = GuestRam::new(&[(Gpa(0), 0x40000)]).unwrap();
        for (table, entry) in [(0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x4007_u64)] {
            ram.write_value(Gpa(table), &entry).unwrap();
        }
        for page in (0..64).filter(|page| page * 0x1000 != HOLE) {
            ram.write_value(Gpa(0x4000 + page * 8), &((page * 0x1000) | 7)).unwrap();
        }
        let mut table = lookup(DEFAULT).unwrap().table(&HostCpu::read(), 0, 1).unwrap();
        for bit in engine::cpu_model::FEATURES {
            if !keep(bit.feature) {
                table.set_feature(bit.feature, false);
            }
        }
        let config = VcpuConfig {
            id: VcpuId(0),
            cpuid: Arc::new(table),
            signal: Arc::default(),
            ledger: Arc::default(),
            tsc: Arc::default(),
        };
        let mut cpu = Cpu::new(Arc::new(Shared::new(ram, crate::config::Config::default())), config).unwrap();
        cpu.state.cr0 = cr0::PE | cr0::PG | cr0::NE | cr0::MP | cr0::ET;
        cpu.state.cr3 = 0x1000;
        cpu.state.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
        cpu.state.efer = efer::LME | efer::LMA;
        cpu.state.xcr0 = 7;
        cpu.state.segments[seg::CS] = Segment { selector: 8, attributes: 0xa09b, limit: u32::MAX, base: 0 };
        cpu.state.segments[seg::SS] = Segment { selector: 16, attributes: 0xc093, limit: u32::MAX, base: 0 };
        cpu.refresh();
        Self { cpu }
    }

    /// Goes to 32-bit protected mode without paging, or to real mode.
    fn leave_long_mode(&mut self, protected: bool) {
        let state = &mut self.cpu.state;
        state.efer = 0;
        state.cr0 = cr0::NE | cr0::MP | cr0::ET | if protected { cr0::PE } else { 0 };
        let (code, data) = if protected { (0xc09b, 0xc093) } else { (0x9b, 0x93) };
        for number in [seg::ES, seg::DS, seg::SS, seg::CS] {
            let attributes = if number == seg::CS { code } else { data };
            state.segments[number] = Segment { selector: 8, attributes, limit: u32::MAX, base: 0 };
        }
        self.cpu.tlb.flush_all();
        self.cpu.refresh();
    }

    /// Runs one instruction.
    fn run(&mut self, bytes: &[u8]) -> Result<(), Exception> {
        self.ram().write(Gpa(CODE), bytes).unwrap();
        self.cpu.state.rip = CODE;
        let place = self.cpu.code_place().unwrap();
        let found = self.cpu.decode_block(&place).unwrap();
        let op = found.block.ops[0];
        assert_eq!(usize::from(op.length), bytes.len(), "not one instruction");
        self.cpu.state.rip = found.block.next;
        match (op.handler)(&mut self.cpu, &op) {
            Ok(()) => Ok(()),
            Err(Leave::Raised) => Err(self.cpu.exception),
            Err(leave) => panic!("{leave:?}"),
        }
    }

    fn ram(&self) -> GuestRam {
        self.cpu.shared.ram.clone()
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.ram().write(Gpa(at), bytes).unwrap();
    }

    fn get<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.ram().read(Gpa(at), &mut bytes).unwrap();
        bytes
    }

    fn set(&mut self, register: u8, low: u128, upper: u128) {
        set_xmm(&mut self.cpu.state.xsave, register, low.to_le_bytes());
        set_high(&mut self.cpu.state.xsave, register, upper.to_le_bytes());
    }

    fn vector(&self, register: u8) -> (u128, u128) {
        let area = &self.cpu.state.xsave;
        (u128::from_le_bytes(xmm(area, register)), u128::from_le_bytes(high(area, register)))
    }

    fn mxcsr(&self) -> u32 {
        self.cpu.state.xsave.mxcsr()
    }

    fn set_mxcsr(&mut self, value: u32) {
        self.cpu.state.xsave.set_u32(super::registers::MXCSR, value);
    }
}

/// An exception as a handler leaves it.
fn exception(vector: u8) -> Result<(), Exception> {
    let error = (vector == crate::cpu::vector::GP).then_some(0);
    Err(Exception { vector, error, address: 0 })
}

/// A page fault.
fn page_fault(address: u64, code: u32) -> Result<(), Exception> {
    Err(Exception { vector: crate::cpu::vector::PF, error: Some(code), address })
}
