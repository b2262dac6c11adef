//! RDMSR, WRMSR, RDTSC(P), RDPID, RDPMC and CPUID.

use engine::ledger::Cause;
use engine::state::{cr0, cr4, efer};
use iced_x86::{Instruction, Mnemonic};

use crate::cpu::Cpu;
use crate::mmu::canonical;
use crate::op::{Done, Handler, Op};

pub(super) fn select(instruction: &Instruction, _op: &mut Op) -> Option<Handler> {
    Some(match instruction.mnemonic() {
        Mnemonic::Rdmsr => rdmsr,
        Mnemonic::Wrmsr => wrmsr,
        Mnemonic::Rdtsc => rdtsc,
        Mnemonic::Rdtscp => rdtscp,
        Mnemonic::Rdpid => rdpid,
        Mnemonic::Rdpmc => rdpmc,
        Mnemonic::Cpuid => cpuid,
        _ => return None,
    })
}

/// MSR numbers the engine owns (Intel SDM vol. 4; AMD APM vol. 2, appendix A).
mod index {
    pub(super) const TSC: u32 = 0x10;
    pub(super) const PLATFORM_ID: u32 = 0x17;
    pub(super) const TSC_ADJUST: u32 = 0x3b;
    pub(super) const BIOS_SIGN_ID: u32 = 0x8b;
    pub(super) const MTRR_CAP: u32 = 0xfe;
    pub(super) const SYSENTER_CS: u32 = 0x174;
    pub(super) const SYSENTER_ESP: u32 = 0x175;
    pub(super) const SYSENTER_EIP: u32 = 0x176;
    pub(super) const MCG_CAP: u32 = 0x179;
    pub(super) const MCG_STATUS: u32 = 0x17a;
    pub(super) const MISC_ENABLE: u32 = 0x1a0;
    pub(super) const DEBUGCTL: u32 = 0x1d9;
    pub(super) const PAT: u32 = 0x277;
    pub(super) const MTRR_DEF_TYPE: u32 = 0x2ff;
    pub(super) const EFER: u32 = 0xc000_0080;
    pub(super) const STAR: u32 = 0xc000_0081;
    pub(super) const LSTAR: u32 = 0xc000_0082;
    pub(super) const CSTAR: u32 = 0xc000_0083;
    pub(super) const SFMASK: u32 = 0xc000_0084;
    pub(super) const FS_BASE: u32 = 0xc000_0100;
    pub(super) const GS_BASE: u32 = 0xc000_0101;
    pub(super) const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub(super) const TSC_AUX: u32 = 0xc000_0103;
    pub(super) const SYSCFG: u32 = 0xc001_0010;
    pub(super) const HWCR: u32 = 0xc001_0015;
    pub(super) const DE_CFG: u32 = 0xc001_1029;
}

/// IA32_APIC_BASE, which the machine owns, and its enable bit: CPUID shows no local APIC while it is off.
const APIC_BASE: u32 = 0x1b;
const APIC_ENABLE: u64 = 1 << 11;
/// HWCR.TscFreqSel: the TSC counts at the P0 frequency; Linux expects it on AMD family 17h and later.
const HWCR_TSC_FREQ_SEL: u64 = 1 << 24;
/// DE_CFG.LFENCE_SERIALIZE.
const DE_CFG_LFENCE: u64 = 1 << 1;
/// Microcode revision: none of a real processor's.
const PATCH_LEVEL: u64 = 0x0100_0065;

fn rdmsr(cpu: &mut Cpu, _op: &Op) -> Done {
    cpu.require_cpl0()?;
    let number = cpu.gpr(1, 2) as u32;
    let value = match cpu.own_msr(number) {
        Some(value) => value,
        None => match cpu.io().msr_read(number) {
            Ok(value) => value,
            Err(_) => return Err(cpu.gp()),
        },
    };
    cpu.set_edx_eax(value);
    Ok(())
}

fn wrmsr(cpu: &mut Cpu, _op: &Op) -> Done {
    cpu.require_cpl0()?;
    let number = cpu.gpr(1, 2) as u32;
    let value = cpu.gpr(2, 2) << 32 | cpu.gpr(0, 2);
    cpu.recheck = true;
    if cpu.own_msr(number).is_some() {
        if !cpu.set_own_msr(number, value) {
            return Err(cpu.gp());
        }
        if matches!(number, index::TSC | index::TSC_ADJUST) {
            cpu.io().tsc_moved();
        }
        return Ok(());
    }
    match cpu.io().msr_write(number, value) {
        Ok(()) => {
            cpu.after_device();
            Ok(())
        }
        Err(_) => Err(cpu.gp()),
    }
}

impl Cpu {
    fn set_edx_eax(&mut self, value: u64) {
        self.set_gpr(0, 2, value);
        self.set_gpr(2, 2, value >> 32);
    }

    /// The guest's time-stamp counter now.
    fn guest_tsc(&self) -> u64 {
        self.config.tsc.guest(host::read_tsc())
    }

    /// An MSR the engine owns.
    fn own_msr(&self, number: u32) -> Option<u64> {
        let state = &*self.state;
        Some(match number {
            index::TSC => self.guest_tsc(),
            index::PLATFORM_ID | index::MCG_CAP | index::MCG_STATUS | index::DEBUGCTL | index::SYSCFG => 0,
            index::TSC_ADJUST if self.features.tsc_adjust => state.tsc_adjust,
            index::BIOS_SIGN_ID => PATCH_LEVEL,
            index::MTRR_CAP => 0, // no variable, fixed or write-combining ranges: the default type is all there is
            index::SYSENTER_CS => state.sysenter_cs,
            index::SYSENTER_ESP => state.sysenter_esp,
            index::SYSENTER_EIP => state.sysenter_eip,
            index::MISC_ENABLE => state.misc_enable,
            index::PAT => state.pat,
            index::MTRR_DEF_TYPE => state.mtrr_def_type,
            index::EFER => state.efer,
            index::STAR => state.star,
            index::LSTAR if self.features.long_mode => state.lstar,
            index::CSTAR if self.features.long_mode => state.cstar,
            index::SFMASK if self.features.long_mode => state.sfmask,
            index::FS_BASE if self.features.long_mode => state.segments[engine::state::seg::FS].base,
            index::GS_BASE if self.features.long_mode => state.segments[engine::state::seg::GS].base,
            index::KERNEL_GS_BASE if self.features.long_mode => state.kernel_gs_base,
            index::TSC_AUX if self.features.rdtscp || self.features.rdpid => state.tsc_aux,
            index::HWCR => HWCR_TSC_FREQ_SEL,
            index::DE_CFG => DE_CFG_LFENCE,
            _ => return None,
        })
    }

    /// Writes an MSR the engine owns. False: the value is refused.
    fn set_own_msr(&mut self, number: u32, value: u64) -> bool {
        let state = &mut *self.state;
        let address = canonical(value);
        match number {
            index::TSC => {
                let delta = value.wrapping_sub(self.config.tsc.guest(host::read_tsc()));
                self.config.tsc.adjust(delta);
                state.tsc_adjust = state.tsc_adjust.wrapping_add(delta);
            }
            index::TSC_ADJUST => {
                self.config.tsc.adjust(value.wrapping_sub(state.tsc_adjust));
                state.tsc_adjust = value;
            }
            index::SYSENTER_CS => state.sysenter_cs = value & 0xffff_ffff,
            index::SYSENTER_ESP if address => state.sysenter_esp = value,
            index::SYSENTER_EIP if address => state.sysenter_eip = value,
            index::MISC_ENABLE => state.misc_enable = value,
            index::PAT if valid_pat(value) => state.pat = value,
            index::MTRR_DEF_TYPE if value & !0xcff == 0 && memory_type(value & 0xff) => state.mtrr_def_type = value,
            index::EFER => return self.write_efer(value),
            index::STAR => state.star = value,
            index::LSTAR if address => state.lstar = value,
            index::CSTAR if address => state.cstar = value,
            index::SFMASK if value >> 32 == 0 => state.sfmask = value,
            index::FS_BASE if address => state.segments[engine::state::seg::FS].base = value,
            index::GS_BASE if address => state.segments[engine::state::seg::GS].base = value,
            index::KERNEL_GS_BASE if address => state.kernel_gs_base = value,
            index::TSC_AUX if value >> 32 == 0 => state.tsc_aux = value,
            index::BIOS_SIGN_ID | index::MCG_STATUS | index::DEBUGCTL => return value == 0,
            // What these switch does not exist here; the bits Linux sets are accepted and read back unchanged.
            index::HWCR | index::DE_CFG | index::SYSCFG => {}
            _ => return false,
        }
        true
    }

    /// IA32_EFER: reserved bits, and LME cannot change while paging is on (SDM vol. 3A, 9.8.5).
    fn write_efer(&mut self, value: u64) -> bool {
        let old = self.state.efer;
        if value & !(self.features.efer_bits | efer::LMA) != 0 {
            return false;
        }
        if (value ^ old) & efer::LME != 0 && self.state.cr0 & cr0::PG != 0 {
            return false;
        }
        // LMA follows LME and CR0.PG; writes to it are ignored.
        self.state.efer = value & !efer::LMA | old & efer::LMA;
        if (value ^ old) & efer::NXE != 0 {
            self.tlb.flush_all();
        }
        self.refresh();
        true
    }

    /// CR4.TSD: RDTSC and RDTSCP only at CPL 0.
    fn check_tsc(&mut self) -> Done {
        if self.state.cr4 & cr4::TSD != 0 && self.mode.cpl > 0 { Err(self.gp()) } else { Ok(()) }
    }
}

/// Memory types that exist (SDM vol. 3A, table 11-2).
fn memory_type(value: u64) -> bool {
    matches!(value, 0 | 1 | 4 | 5 | 6)
}

/// Eight memory types, each of which may also be UC- (7).
fn valid_pat(value: u64) -> bool {
    value.to_le_bytes().iter().all(|&entry| memory_type(entry.into()) || entry == 7)
}

fn rdtsc(cpu: &mut Cpu, _op: &Op) -> Done {
    cpu.check_tsc()?;
    let tsc = cpu.guest_tsc();
    cpu.set_edx_eax(tsc);
    Ok(())
}

fn rdtscp(cpu: &mut Cpu, _op: &Op) -> Done {
    if !cpu.features.rdtscp {
        return Err(cpu.ud());
    }
    cpu.check_tsc()?;
    let tsc = cpu.guest_tsc();
    cpu.set_edx_eax(tsc);
    cpu.set_gpr(1, 2, cpu.state.tsc_aux);
    Ok(())
}

fn rdpid(cpu: &mut Cpu, op: &Op) -> Done {
    if !cpu.features.rdpid {
        return Err(cpu.ud());
    }
    cpu.set(op.reg[0], cpu.state.tsc_aux);
    Ok(())
}

/// No performance counters are offered, so every counter number is a wrong one.
fn rdpmc(cpu: &mut Cpu, _op: &Op) -> Done {
    Err(cpu.gp())
}

fn cpuid(cpu: &mut Cpu, _op: &Op) -> Done {
    let start = host::read_tsc();
    let (leaf, subleaf) = (cpu.gpr(0, 2) as u32, cpu.gpr(1, 2) as u32);
    let mut value = cpu.config.cpuid.answer(leaf, subleaf);
    match (leaf, subleaf) {
        (1, _) => {
            let osxsave = cpu.state.cr4 & cr4::OSXSAVE != 0;
            value.ecx = value.ecx & !(1 << 27) | u32::from(osxsave) << 27;
            if cpu.io().msr_read(APIC_BASE).is_ok_and(|base| base & APIC_ENABLE == 0) {
                value.edx &= !(1 << 9);
            }
        }
        // The area sizes for what is enabled now (SDM vol. 1, 13.2): legacy and header, then AVX at its fixed place.
        (0xd, 0 | 1) => value.ebx = if cpu.state.xcr0 & 4 != 0 { 576 + 256 } else { 576 },
        _ => {}
    }
    cpu.set_gpr(0, 2, value.eax.into());
    cpu.set_gpr(3, 2, value.ebx.into());
    cpu.set_gpr(1, 2, value.ecx.into());
    cpu.set_gpr(2, 2, value.edx.into());
    cpu.config.ledger.record(Cause::Cpuid, host::read_tsc() - start);
    Ok(())
}
