//! Control and debug registers, the interrupt flag, HLT, and TLB and cache maintenance (Intel SDM vol. 2; vol. 3A, 2.5).

use engine::state::{Shadow, cr0, cr4, efer, rflags, seg};
use engine::{Answer, Exit, HypercallArgs};
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::segment::store_16;
use crate::cpu::{Cpu, vector};
use crate::mmu::{Access, Rights, canonical};
use crate::op::{Done, Handler, Leave, NO_REG, Op};

pub(super) fn select(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    Some(match instruction.mnemonic() {
        Mnemonic::Mov if instruction.op0_register().is_cr() => {
            op.imm = instruction.op0_register().number() as u64;
            mov_to_control
        }
        Mnemonic::Mov if instruction.op1_register().is_cr() => {
            op.imm = instruction.op1_register().number() as u64;
            mov_from_control
        }
        Mnemonic::Mov if instruction.op0_register().is_dr() => {
            op.imm = instruction.op0_register().number() as u64;
            mov_to_debug
        }
        Mnemonic::Mov if instruction.op1_register().is_dr() => {
            op.imm = instruction.op1_register().number() as u64;
            mov_from_debug
        }
        Mnemonic::Lmsw => lmsw,
        Mnemonic::Smsw => {
            op.size = match instruction.op0_register() {
                register if instruction.op0_kind() != OpKind::Register || register == Register::None => 1,
                register => register.size().trailing_zeros() as u8,
            };
            smsw
        }
        Mnemonic::Clts => clts,
        Mnemonic::Cli => cli,
        Mnemonic::Sti => sti,
        Mnemonic::Clac | Mnemonic::Stac => {
            op.imm = u64::from(instruction.mnemonic() == Mnemonic::Stac);
            set_ac
        }
        Mnemonic::Hlt => hlt,
        Mnemonic::Invlpg => invlpg,
        Mnemonic::Invpcid => invpcid,
        Mnemonic::Invd | Mnemonic::Wbinvd | Mnemonic::Wbnoinvd => cache_flush,
        Mnemonic::Vmcall | Mnemonic::Vmmcall => hypercall,
        _ => return None,
    })
}

/// CR0 bits that exist; the others read as zero and are ignored when written.
const CR0_BITS: u64 =
    cr0::PE | cr0::MP | cr0::EM | cr0::TS | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::NW | cr0::CD | cr0::PG;

fn mov_to_control(cpu: &mut Cpu, op: &Op) -> Done {
    if !matches!(op.imm, 0 | 2 | 3 | 4 | 8) {
        return Err(cpu.ud());
    }
    cpu.require_cpl0()?;
    let value = if cpu.mode.is_64() { cpu.get::<u64>(op.reg[1]) } else { cpu.get::<u32>(op.reg[1]).into() };
    match op.imm {
        0 => cpu.write_cr0(value)?,
        2 => cpu.state.cr2 = value,
        3 => cpu.write_cr3(value)?,
        4 => cpu.write_cr4(value)?,
        _ if value > 15 => return Err(cpu.gp()),
        _ => cpu.io().set_task_priority(value as u8),
    }
    cpu.recheck = true;
    Ok(())
}

fn mov_from_control(cpu: &mut Cpu, op: &Op) -> Done {
    if !matches!(op.imm, 0 | 2 | 3 | 4 | 8) {
        return Err(cpu.ud());
    }
    cpu.require_cpl0()?;
    let value = match op.imm {
        0 => cpu.state.cr0,
        2 => cpu.state.cr2,
        3 => cpu.state.cr3,
        4 => cpu.state.cr4,
        _ => cpu.io().task_priority().into(),
    };
    if cpu.mode.is_64() {
        cpu.set(op.reg[0], value)
    } else {
        cpu.set(op.reg[0], value as u32)
    }
    Ok(())
}

impl Cpu {
    /// Writes CR0 with the checks of SDM vol. 2, MOV CRn.
    pub(super) fn write_cr0(&mut self, value: u64) -> Done {
        let old = self.state.cr0;
        let bad_pair = |set: u64, needs: u64| value & set != 0 && value & needs == 0;
        if value >> 32 != 0 || bad_pair(cr0::PG, cr0::PE) || bad_pair(cr0::NW, cr0::CD) {
            return Err(self.gp());
        }
        let new = value & CR0_BITS | cr0::ET;
        if new & !old & cr0::PG != 0 {
            self.enable_paging()?;
        } else if old & !new & cr0::PG != 0 {
            if self.mode.is_64() || self.state.cr4 & cr4::PCIDE != 0 {
                return Err(self.gp());
            }
            self.state.efer &= !efer::LMA;
        }
        self.state.cr0 = new;
        if (old ^ new) & (cr0::PG | cr0::WP | cr0::PE) != 0 {
            self.tlb.flush_all();
        }
        self.refresh();
        Ok(())
    }

    /// CR0.PG goes from 0 to 1: IA-32e mode begins where EFER.LME is set (SDM vol. 3A, 9.8.5).
    fn enable_paging(&mut self) -> Done {
        if self.state.efer & efer::LME != 0 {
            if self.state.cr4 & cr4::PAE == 0 || self.state.segments[seg::CS].long() {
                return Err(self.gp());
            }
            self.state.efer |= efer::LMA;
        } else if self.state.cr4 & cr4::PAE != 0 {
            self.load_pdptrs()?;
        }
        Ok(())
    }

    fn write_cr3(&mut self, value: u64) -> Done {
        let pcide = self.state.cr4 & cr4::PCIDE != 0;
        let keep = pcide && value >> 63 != 0;
        let value = if pcide { value & !(1 << 63) } else { value };
        if self.mode.long {
            if value >> self.features.physical_bits != 0 {
                return Err(self.gp());
            }
        } else if self.state.cr0 & cr0::PG != 0 && self.state.cr4 & cr4::PAE != 0 {
            let old = std::mem::replace(&mut self.state.cr3, value);
            if let Err(fault) = self.load_pdptrs() {
                self.state.cr3 = old;
                return Err(fault);
            }
        }
        // A flush that comes with other page tables: they may be those of a new program.
        let fresh = !keep && (self.state.cr3 ^ value) >> 12 != 0;
        self.state.cr3 = value;
        let pcid = if pcide { value as u16 & 0xfff } else { 0 };
        if !keep {
            self.tlb.flush_pcid(pcid);
        }
        self.tlb.select(pcid);
        self.window.enter(value & !0xfff, fresh);
        Ok(())
    }

    fn write_cr4(&mut self, value: u64) -> Done {
        let old = self.state.cr4;
        let changed = old ^ value;
        if value & !self.features.cr4_bits != 0 {
            return Err(self.gp());
        }
        if self.mode.long && value & cr4::PAE == 0 {
            return Err(self.gp());
        }
        if value & !old & cr4::PCIDE != 0 && (!self.mode.long || self.state.cr3 & 0xfff != 0) {
            return Err(self.gp());
        }
        let paging = cr4::PGE | cr4::PSE | cr4::PAE | cr4::SMEP | cr4::SMAP | cr4::PCIDE;
        self.state.cr4 = value;
        let pae = self.state.cr0 & cr0::PG != 0 && value & cr4::PAE != 0 && !self.mode.long;
        if pae
            && changed & paging != 0
            && let Err(fault) = self.load_pdptrs()
        {
            self.state.cr4 = old;
            return Err(fault);
        }
        if changed & paging != 0 {
            self.tlb.flush_all();
            self.select_address_space();
        }
        self.refresh();
        Ok(())
    }

    /// Points the TLB at the address space CR3 names.
    pub(crate) fn select_address_space(&mut self) {
        let pcid = if self.state.cr4 & cr4::PCIDE != 0 { self.state.cr3 as u16 & 0xfff } else { 0 };
        self.tlb.select(pcid);
        self.window.enter(self.state.cr3 & !0xfff, false);
    }

    /// True where IOPL lets the program change IF (SDM vol. 3A, 5.1 of CLI and STI).
    fn may_change_if(&self) -> bool {
        u64::from(self.mode.cpl) <= (self.state.rflags & rflags::IOPL) >> 12
    }
}

fn lmsw(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_cpl0()?;
    let word: u64 = cpu.selector_operand(op, 0)?.into();
    // PE can be set but not cleared this way.
    let value = cpu.state.cr0 & !0xe | word & 0xf;
    cpu.write_cr0(value)?;
    cpu.recheck = true;
    Ok(())
}

fn smsw(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.check_umip()?;
    let value = cpu.state.cr0;
    store_16(cpu, op, value)
}

fn clts(cpu: &mut Cpu, _op: &Op) -> Done {
    cpu.require_cpl0()?;
    cpu.state.cr0 &= !cr0::TS;
    Ok(())
}

fn cli(cpu: &mut Cpu, _op: &Op) -> Done {
    if !cpu.may_change_if() {
        return Err(cpu.gp());
    }
    cpu.state.rflags &= !rflags::IF;
    Ok(())
}

fn sti(cpu: &mut Cpu, op: &Op) -> Done {
    if !cpu.may_change_if() {
        return Err(cpu.gp());
    }
    if cpu.state.rflags & rflags::IF == 0 {
        cpu.state.rflags |= rflags::IF;
        cpu.state.shadow = Shadow::Sti;
        cpu.sti_shadow_at = op.next;
        // Where nothing waits there is nothing to hold back; should the block end here, the boundary finds the shadow.
        cpu.recheck |= cpu.state.hot().waits != 0 || !cpu.config.signal.pending().is_empty();
    }
    Ok(())
}

fn set_ac(cpu: &mut Cpu, op: &Op) -> Done {
    if !cpu.features.smap || cpu.mode.cpl > 0 {
        return Err(cpu.ud());
    }
    if op.imm == 1 {
        cpu.state.rflags |= rflags::AC
    } else {
        cpu.state.rflags &= !rflags::AC
    }
    cpu.refresh();
    Ok(())
}

fn hlt(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_cpl0()?;
    cpu.state.halted = true;
    cpu.state.rip = op.next;
    Err(Leave::Boundary)
}

fn invlpg(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.require_cpl0()?;
    // No limit or canonical check: what maps nothing has nothing to forget.
    let offset = cpu.effective_address(&op.mem);
    let segment = op.mem.segment as usize;
    let base = if cpu.mode.is_64() && segment < seg::FS { 0 } else { cpu.state.segments[segment].base };
    cpu.tlb.flush_page(base.wrapping_add(offset));
    cpu.recheck = true;
    Ok(())
}

/// INVPCID (SDM vol. 2): the descriptor's PCID and address, by type.
fn invpcid(cpu: &mut Cpu, op: &Op) -> Done {
    if !cpu.features.invpcid || cpu.mode.v86 {
        return Err(cpu.ud());
    }
    cpu.require_cpl0()?;
    let kind = if cpu.mode.is_64() { cpu.get::<u64>(op.reg[0]) } else { cpu.get::<u32>(op.reg[0]).into() };
    let address = cpu.linear(&op.mem, 16, Access::Read)?;
    let mut buffer = [0; 16];
    cpu.read_bytes(address, &mut buffer, op.mem.segment, Rights::Current)?;
    let (low, high) = buffer.split_at(8);
    let word = |bytes: &[u8]| bytes.iter().rev().fold(0_u64, |sum, &byte| sum << 8 | u64::from(byte));
    let (pcid, target) = (word(low), word(high));
    let pcid_used = matches!(kind, 0 | 1);
    let no_pcids = cpu.state.cr4 & cr4::PCIDE == 0 && pcid != 0;
    if kind > 3 || pcid >> 12 != 0 || pcid_used && no_pcids || kind == 0 && !canonical(target) {
        return Err(cpu.gp());
    }
    match kind {
        0 => cpu.tlb.flush_page_of(pcid as u16, target),
        1 => cpu.tlb.flush_pcid(pcid as u16),
        _ => cpu.tlb.flush_all(),
    }
    cpu.recheck = true;
    Ok(())
}

/// INVD, WBINVD: the host's caches are coherent, so only the privilege check is left.
fn cache_flush(cpu: &mut Cpu, _op: &Op) -> Done {
    cpu.require_cpl0()
}

/// VMCALL and VMMCALL where a hypervisor is there to answer; #UD otherwise.
fn hypercall(cpu: &mut Cpu, op: &Op) -> Done {
    if !cpu.features.hypercalls {
        return Err(cpu.ud());
    }
    let size = if cpu.mode.is_64() { 3 } else { 2 };
    let register = |cpu: &Cpu, number| cpu.gpr(number, size);
    let call = HypercallArgs {
        number: register(cpu, 0),
        args: [register(cpu, 3), register(cpu, 1), register(cpu, 2), register(cpu, 6)],
        cpl: cpu.mode.cpl,
        wide: cpu.mode.is_64(),
    };
    match cpu.io().hypercall(call) {
        Answer::Now(result) => cpu.set_gpr(0, size, result),
        Answer::Later => cpu.leaving = Some(Exit::Waiting),
    }
    cpu.state.rip = op.next;
    cpu.recheck = true;
    Ok(())
}

/// DR6 and DR7 as they read back: fixed bits in, reserved bits out (SDM vol. 3B, 17.2).
const DR6_FIXED: u64 = 0xffff_0ff0;
const DR7_FIXED: u64 = 1 << 10;
const DR6_BITS: u64 = 0xe00f;
const DR7_BITS: u64 = 0xffff_23ff;
const DR7_GENERAL_DETECT: u64 = 1 << 13;
const DR6_ACCESS_DETECTED: u64 = 1 << 13;

impl Cpu {
    /// The checks every access to a debug register makes; DR4 and DR5 are DR6 and DR7 unless CR4.DE.
    fn debug_register(&mut self, number: u64) -> Result<usize, Leave> {
        let aliased = matches!(number, 4 | 5);
        if number > 7 || aliased && self.state.cr4 & cr4::DE != 0 {
            return Err(self.ud());
        }
        self.require_cpl0()?;
        if self.state.dr7 & DR7_GENERAL_DETECT != 0 {
            self.state.dr6 = self.state.dr6 & !0xf | DR6_ACCESS_DETECTED;
            self.state.dr7 &= !DR7_GENERAL_DETECT;
            self.state.rflags |= rflags::RF; // a fault: pushed with RF
            return Err(self.raise(vector::DB));
        }
        Ok(if aliased { number as usize + 2 } else { number as usize })
    }
}

fn mov_to_debug(cpu: &mut Cpu, op: &Op) -> Done {
    let number = cpu.debug_register(op.imm)?;
    let value = if cpu.mode.is_64() { cpu.get::<u64>(op.reg[1]) } else { cpu.get::<u32>(op.reg[1]).into() };
    if number >= 6 && value >> 32 != 0 {
        return Err(cpu.gp());
    }
    match number {
        6 => cpu.state.dr6 = value & DR6_BITS | DR6_FIXED,
        7 => cpu.state.dr7 = value & DR7_BITS | DR7_FIXED,
        _ => cpu.state.dr[number] = value,
    }
    cpu.refresh();
    cpu.recheck = true;
    Ok(())
}

fn mov_from_debug(cpu: &mut Cpu, op: &Op) -> Done {
    let number = cpu.debug_register(op.imm)?;
    let value = match number {
        6 => cpu.state.dr6,
        7 => cpu.state.dr7,
        _ => cpu.state.dr[number],
    };
    debug_assert!(op.reg[0] != NO_REG);
    if cpu.mode.is_64() {
        cpu.set(op.reg[0], value)
    } else {
        cpu.set(op.reg[0], value as u32)
    }
    Ok(())
}

impl Cpu {
    /// True where DR7 has a code breakpoint enabled.
    pub(crate) fn code_breakpoints(&self) -> bool {
        self.watch && (0..4).any(|number| self.breakpoint_enabled(number, 0))
    }

    /// Clears RF, which holds back code breakpoints for the one instruction that is about to run, where there are none: the
    /// handler of each fault returns with it.
    pub(crate) fn use_up_resume(&mut self) {
        if self.state.rflags & rflags::TF == 0 && !self.code_breakpoints() {
            self.state.rflags &= !rflags::RF;
        }
    }

    /// Breakpoint `number` is enabled for accesses of kind `kind` (0 code, 1 writes, 2 I/O, 3 reads and writes).
    fn breakpoint_enabled(&self, number: usize, kind: u64) -> bool {
        let dr7 = self.state.dr7;
        dr7 >> (number * 2) & 3 != 0 && dr7 >> (16 + number * 4) & 3 == kind
    }

    /// True where RIP is at a code breakpoint; notes it in [`Cpu::pending_debug`].
    pub(crate) fn at_code_breakpoint(&mut self) -> bool {
        if !self.watch {
            return false;
        }
        let base = if self.mode.is_64() { 0 } else { self.state.segments[seg::CS].base };
        let linear = base.wrapping_add(self.state.rip);
        let hits = (0..4).filter(|&n| self.breakpoint_enabled(n, 0) && self.state.dr[n] == linear);
        let hits = hits.fold(0, |bits, number| bits | 1 << number);
        self.pending_debug |= hits;
        // A fault, but the one that pushes RF as it is: its handler sets RF to get past (SDM vol. 3B, 17.3.1.1).
        hits != 0
    }

    /// Notes I/O breakpoints on `bytes` ports from `port` (CR4.DE); they trap after the instruction.
    pub(super) fn check_port_breakpoints(&mut self, port: u16, bytes: u64) {
        if !self.watch || self.state.cr4 & cr4::DE == 0 {
            return;
        }
        for number in 0..4 {
            let length = [1, 2, 8, 4][(self.state.dr7 >> (18 + number * 4) & 3) as usize];
            let start = self.state.dr[number] & !(length - 1);
            let port = u64::from(port);
            if self.breakpoint_enabled(number, 2) && port < start + length && start < port + bytes {
                self.pending_debug |= 1 << number;
                self.recheck = true;
            }
        }
    }

    /// Raises #DB for what is in [`Cpu::pending_debug`], with DR6 telling why.
    pub(crate) fn raise_pending_debug(&mut self) -> Result<(), Leave> {
        self.state.dr6 = self.state.dr6 & !0xf | std::mem::take(&mut self.pending_debug);
        self.state.dr7 &= !DR7_GENERAL_DETECT;
        Err(self.raise(vector::DB))
    }
}
