//! Far JMP, CALL, RET and IRET: changes of code segment, privilege and task (Intel SDM vol. 2; vol. 3A, 5.8).

use engine::state::{Segment, rflags, seg};
use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::descriptor::{Descriptor, is_null, kind, selector_code};
use super::task::Why;
use crate::cpu::{Cpu, size_mask, vector};
use crate::mmu::{Access, Rights, canonical};
use crate::op::{Done, Handler, Leave, Op};

pub(super) fn select(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    let far = matches!(instruction.op0_kind(), OpKind::FarBranch16 | OpKind::FarBranch32);
    let memory = match instruction.code() {
        Code::Jmp_m1616 | Code::Call_m1616 => Some(1),
        Code::Jmp_m1632 | Code::Call_m1632 => Some(2),
        Code::Jmp_m1664 | Code::Call_m1664 => Some(3),
        _ => None,
    };
    match instruction.mnemonic() {
        Mnemonic::Jmp | Mnemonic::Call if far => {
            let (size, offset) = match instruction.op0_kind() {
                OpKind::FarBranch16 => (1, u64::from(instruction.far_branch16())),
                _ => (2, u64::from(instruction.far_branch32())),
            };
            op.size = size;
            op.imm = offset | u64::from(instruction.far_branch_selector()) << 32;
            Some(if instruction.mnemonic() == Mnemonic::Jmp { jmp_direct } else { call_direct })
        }
        Mnemonic::Jmp | Mnemonic::Call if memory.is_some() => {
            op.size = memory.unwrap_or(2);
            Some(if instruction.mnemonic() == Mnemonic::Jmp { jmp_indirect } else { call_indirect })
        }
        Mnemonic::Retf => {
            op.size = match instruction.code() {
                Code::Retfw | Code::Retfw_imm16 => 1,
                Code::Retfd | Code::Retfd_imm16 => 2,
                _ => 3,
            };
            Some(ret_far)
        }
        Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq => {
            op.size = match instruction.code() {
                Code::Iretw => 1,
                Code::Iretd => 2,
                _ => 3,
            };
            Some(iret)
        }
        _ => None,
    }
}

fn jmp_direct(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.far_jump((op.imm >> 32) as u16, op.imm & 0xffff_ffff, op)
}

fn call_direct(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.far_call((op.imm >> 32) as u16, op.imm & 0xffff_ffff, op)
}

fn jmp_indirect(cpu: &mut Cpu, op: &Op) -> Done {
    let (selector, offset) = cpu.far_pointer(op)?;
    cpu.far_jump(selector, offset, op)
}

fn call_indirect(cpu: &mut Cpu, op: &Op) -> Done {
    let (selector, offset) = cpu.far_pointer(op)?;
    cpu.far_call(selector, offset, op)
}

/// What a far pointer leads to.
enum Target {
    Code(Descriptor),
    Gate(Descriptor),
    Task,
}

impl Cpu {
    fn far_pointer(&mut self, op: &Op) -> Result<(u16, u64), Leave> {
        let bytes = 1_usize << op.size;
        let address = self.linear(&op.mem, bytes as u64 + 2, Access::Read)?;
        let mut buffer = [0; 10];
        self.read_bytes(address, &mut buffer[..bytes + 2], op.mem.segment, Rights::Current)?;
        let selector = u16::from_le_bytes([buffer[bytes], buffer[bytes + 1]]);
        let mut offset = [0; 8];
        offset[..bytes].copy_from_slice(&buffer[..bytes]);
        Ok((selector, u64::from_le_bytes(offset)))
    }

    /// Loads CS as real and virtual-8086 mode do, keeping what real mode keeps.
    pub(super) fn set_real_cs(&mut self, selector: u16, offset: u64) {
        let cs = &mut self.state.segments[seg::CS];
        cs.selector = selector;
        cs.base = u64::from(selector) << 4;
        if self.mode.v86 {
            *cs = Segment { attributes: 0xfb, ..Segment::real_mode(selector) };
        }
        self.state.rip = offset;
        self.refresh();
        self.recheck = true;
    }

    /// Checks a new instruction pointer against the code segment it goes with.
    fn check_far_target(&mut self, offset: u64, code: &Descriptor) -> Done {
        let bad = if self.mode.long && code.long() { !canonical(offset) } else { offset > u64::from(code.limit()) };
        if bad { Err(self.gp()) } else { Ok(()) }
    }

    fn far_target(&mut self, selector: u16) -> Result<Target, Leave> {
        if is_null(selector) {
            return Err(self.gp());
        }
        let descriptor = self.descriptor(selector, vector::GP, 0)?;
        if descriptor.code_or_data() {
            let (cpl, dpl, rpl) = (self.mode.cpl, descriptor.dpl(), selector as u8 & 3);
            let allowed = descriptor.is_code()
                && if descriptor.is_conforming() { dpl <= cpl } else { rpl <= cpl && dpl == cpl }
                && !(self.mode.long && descriptor.long() && descriptor.big());
            if !allowed {
                return Err(self.gp_selector(selector));
            }
            if !descriptor.present() {
                return Err(self.raise_code(vector::NP, selector_code(selector)));
            }
            return Ok(Target::Code(descriptor));
        }
        let privileged = descriptor.dpl() >= self.mode.cpl && descriptor.dpl() >= selector as u8 & 3;
        let target = match descriptor.kind() {
            kind::CALL_GATE => Some(Target::Gate(descriptor)),
            kind::CALL_GATE_16 if !self.mode.long => Some(Target::Gate(descriptor)),
            kind::TASK_GATE | kind::TSS | kind::TSS_16 if !self.mode.long => Some(Target::Task),
            _ => None,
        };
        match target {
            Some(target) if privileged => {
                // Whether a TSS is present is the task switch's business.
                if !descriptor.present() && !matches!(descriptor.kind(), kind::TSS | kind::TSS_16) {
                    return Err(self.raise_code(vector::NP, selector_code(selector)));
                }
                Ok(target)
            }
            _ => Err(self.gp_selector(selector)),
        }
    }

    /// The selector a task gate or TSS selector stands for.
    fn task_selector(&mut self, selector: u16) -> Result<u16, Leave> {
        let descriptor = self.descriptor(selector, vector::GP, 0)?;
        Ok(if descriptor.kind() == kind::TASK_GATE { descriptor.gate_selector() } else { selector })
    }

    fn far_jump(&mut self, selector: u16, offset: u64, op: &Op) -> Done {
        if self.mode.real_segments() {
            if offset > self.code_limit() {
                return Err(self.gp());
            }
            self.set_real_cs(selector, offset);
            return Err(Leave::Boundary);
        }
        match self.far_target(selector)? {
            Target::Code(code) => {
                self.check_far_target(offset, &code)?;
                self.enter_code(selector, code, offset, self.mode.cpl)?;
            }
            Target::Gate(gate) => {
                let (code, offset) = self.gate_target(&gate, true)?;
                self.enter_code(gate.gate_selector(), code, offset, self.mode.cpl)?;
            }
            Target::Task => {
                let task = self.task_selector(selector)?;
                self.state.rip = op.next;
                self.task_switch_from(op, task, Why::Jump)?;
            }
        }
        Err(Leave::Boundary)
    }

    /// A task switch made by an instruction: RIP goes back where the switch fails.
    fn task_switch_from(&mut self, op: &Op, task: u16, why: Why) -> Done {
        self.state.rip = op.next;
        self.task_switch(task, why)
    }

    /// Loads CS with a checked descriptor at privilege `cpl`.
    fn enter_code(&mut self, selector: u16, mut code: Descriptor, offset: u64, cpl: u8) -> Done {
        self.set_accessed(&mut code)?;
        self.state.segments[seg::CS] = code.segment(selector & !3 | u16::from(cpl));
        self.state.rip = offset;
        self.refresh();
        self.recheck = true;
        Ok(())
    }

    /// The code segment and offset behind a call gate (SDM vol. 3A, 5.8.4).
    fn gate_target(&mut self, gate: &Descriptor, jump: bool) -> Result<(Descriptor, u64), Leave> {
        let selector = gate.gate_selector();
        if is_null(selector) {
            return Err(self.gp());
        }
        let code = self.descriptor(selector, vector::GP, 0)?;
        let (cpl, dpl) = (self.mode.cpl, code.dpl());
        let allowed = code.is_code()
            && dpl <= cpl
            && (!jump || code.is_conforming() || dpl == cpl)
            && (!self.mode.long || code.long() && !code.big());
        if !allowed {
            return Err(self.gp_selector(selector));
        }
        if !code.present() {
            return Err(self.raise_code(vector::NP, selector_code(selector)));
        }
        let offset = if gate.kind() == kind::CALL_GATE { gate.gate_offset() } else { gate.gate_offset() & 0xffff };
        self.check_far_target(offset, &code)?;
        Ok((code, offset))
    }

    fn far_call(&mut self, selector: u16, offset: u64, op: &Op) -> Done {
        let cs = self.state.segments[seg::CS].selector;
        if self.mode.real_segments() {
            if offset > self.code_limit() {
                return Err(self.gp());
            }
            self.push_all(&[cs.into(), op.next], op.size)?;
            self.set_real_cs(selector, offset);
            return Err(Leave::Boundary);
        }
        match self.far_target(selector)? {
            Target::Code(code) => {
                self.check_far_target(offset, &code)?;
                self.push_all(&[cs.into(), op.next], op.size)?;
                self.enter_code(selector, code, offset, self.mode.cpl)?;
            }
            Target::Gate(gate) => self.call_gate(&gate, op)?,
            Target::Task => {
                let task = self.task_selector(selector)?;
                self.task_switch_from(op, task, Why::Call)?;
            }
        }
        Err(Leave::Boundary)
    }

    fn call_gate(&mut self, gate: &Descriptor, op: &Op) -> Done {
        let (code, offset) = self.gate_target(gate, false)?;
        let selector = gate.gate_selector();
        let cs = self.state.segments[seg::CS].selector;
        let size = match (self.mode.long, gate.kind()) {
            (true, _) => 3,
            (false, kind::CALL_GATE) => 2,
            _ => 1,
        };
        if code.is_conforming() || code.dpl() == self.mode.cpl {
            self.push_all(&[cs.into(), op.next], size)?;
            return self.enter_code(selector, code, offset, self.mode.cpl);
        }
        let cpl = code.dpl();
        let (ss, rsp) = (self.state.segments[seg::SS].selector, self.state.gpr[4]);
        if self.mode.long {
            let stack = self.tss_stack(4 + 8 * u64::from(cpl), 0)?;
            let mut frame = [0; 32];
            for (slot, word) in frame.chunks_exact_mut(8).zip([op.next, cs.into(), rsp, ss.into()]) {
                slot.copy_from_slice(&u64::to_le_bytes(word));
            }
            let bottom = stack.wrapping_sub(32);
            if !canonical(bottom) || !canonical(stack.wrapping_sub(1)) {
                return Err(self.raise_code(vector::SS, 0));
            }
            self.write_bytes(bottom, &frame, seg::SS as u8, Rights::System)?;
            self.state.gpr[4] = bottom;
            self.state.segments[seg::SS] =
                Segment { selector: cpl.into(), attributes: u16::from(cpl) << 5, limit: 0, base: 0 };
        } else {
            let (new_ss, esp) = self.inner_stack(cpl, 0)?;
            let segment = self.inner_stack_segment(new_ss, cpl, 0)?;
            let mut words = vec![u32::from(ss), rsp as u32];
            words.extend(self.gate_parameters(gate, size)?);
            words.extend([u32::from(cs), op.next as u32]);
            self.push_frame(&words, size == 2, Some((segment, esp)), 0)?;
        }
        self.enter_code(selector, code, offset, cpl)
    }

    /// The parameters a call gate copies from the outer stack, in the order to push them.
    fn gate_parameters(&mut self, gate: &Descriptor, size: u8) -> Result<Vec<u32>, Leave> {
        let count = gate.low >> 32 & 31;
        let bytes = 1_u64 << size;
        let mut parameters = Vec::with_capacity(count as usize);
        for position in (0..count).rev() {
            let offset = self.state.gpr[4].wrapping_add(position * bytes);
            let address = self.stack_linear(offset, bytes, Access::Read)?;
            let word = match size {
                1 => self.read_linear::<u16>(address, seg::SS as u8, Rights::Current)?.into(),
                _ => self.read_linear::<u32>(address, seg::SS as u8, Rights::Current)?,
            };
            parameters.push(word);
        }
        Ok(parameters)
    }

    /// Pushes values of `size` (log2 of bytes), all or none.
    pub(super) fn push_all(&mut self, values: &[u64], size: u8) -> Done {
        let before = self.state.gpr[4];
        for &value in values {
            if let Err(fault) = self.push_sized(size, value) {
                self.state.gpr[4] = before;
                return Err(fault);
            }
        }
        Ok(())
    }

    /// Pushes the low `size` (log2 of bytes) of a value.
    pub(crate) fn push_sized(&mut self, size: u8, value: u64) -> Done {
        match size {
            1 => self.push(value as u16),
            2 => self.push(value as u32),
            _ => self.push(value),
        }
    }

    /// Pops a value of `size` (log2 of bytes).
    pub(crate) fn pop_sized(&mut self, size: u8) -> Result<u64, Leave> {
        Ok(match size {
            1 => self.pop::<u16>()?.into(),
            2 => self.pop::<u32>()?.into(),
            _ => self.pop::<u64>()?,
        })
    }

    /// The code segment a far return or IRET goes to, checked (SDM vol. 2, RET and IRET).
    fn return_code(&mut self, selector: u16) -> Result<Descriptor, Leave> {
        if is_null(selector) {
            return Err(self.gp());
        }
        let code = self.descriptor(selector, vector::GP, 0)?;
        let (rpl, dpl) = (selector as u8 & 3, code.dpl());
        let allowed = code.is_code()
            && rpl >= self.mode.cpl
            && if code.is_conforming() { dpl <= rpl } else { dpl == rpl }
            && !(self.mode.long && code.long() && code.big());
        if !allowed {
            return Err(self.gp_selector(selector));
        }
        if !code.present() {
            return Err(self.raise_code(vector::NP, selector_code(selector)));
        }
        Ok(code)
    }

    /// The stack segment of an outer level a return goes to.
    fn return_stack(&mut self, selector: u16, cpl: u8, code: &Descriptor) -> Result<Segment, Leave> {
        if is_null(selector) {
            let allowed = self.mode.long && code.long() && cpl != 3 && selector as u8 & 3 == cpl;
            if !allowed {
                return Err(self.gp());
            }
            return Ok(Segment { selector, attributes: u16::from(cpl) << 5, limit: 0, base: 0 });
        }
        let mut descriptor = self.descriptor(selector, vector::GP, 0)?;
        if selector as u8 & 3 != cpl || descriptor.dpl() != cpl || !descriptor.is_writable_data() {
            return Err(self.gp_selector(selector));
        }
        if !descriptor.present() {
            return Err(self.raise_code(vector::SS, selector_code(selector)));
        }
        self.set_accessed(&mut descriptor)?;
        Ok(descriptor.segment(selector))
    }

    /// After a return to an outer level: data segments it may not use become null (SDM vol. 3A, 5.8.6).
    fn drop_inner_segments(&mut self) {
        for number in [seg::ES, seg::DS, seg::FS, seg::GS] {
            let segment = &mut self.state.segments[number];
            let conforming = segment.kind() & 0b1100 == 0b1100;
            if segment.attributes != 0 && !conforming && segment.dpl() < self.mode.cpl {
                *segment = Segment { base: segment.base, ..Segment::default() };
                if number < seg::FS {
                    segment.base = 0;
                }
            }
        }
    }

    /// Commits a return: CS:RIP, and SS:RSP where the stack changes too.
    fn return_to(&mut self, selector: u16, mut code: Descriptor, rip: u64, stack: Option<(Segment, u64)>) -> Done {
        let outer = selector as u8 & 3 != self.mode.cpl;
        self.set_accessed(&mut code)?;
        self.state.segments[seg::CS] = code.segment(selector);
        self.state.rip = rip;
        if let Some((segment, rsp)) = stack {
            self.state.segments[seg::SS] = segment;
            self.refresh();
            self.set_stack_pointer(rsp);
        }
        self.refresh();
        if outer {
            self.drop_inner_segments();
        }
        self.recheck = true;
        Ok(())
    }

    /// Reads `count` stack slots of `size` without moving RSP.
    fn peek_stack<const N: usize>(&mut self, size: u8, skip: u64) -> Result<[u64; N], Leave> {
        let before = self.state.gpr[4];
        let bytes = 1_u64 << size;
        self.set_stack_pointer(before.wrapping_add(skip * bytes));
        let mut values = [0; N];
        for value in &mut values {
            match self.pop_sized(size) {
                Ok(popped) => *value = popped,
                Err(fault) => {
                    self.state.gpr[4] = before;
                    return Err(fault);
                }
            }
        }
        self.state.gpr[4] = before;
        Ok(values)
    }
}

fn ret_far(cpu: &mut Cpu, op: &Op) -> Done {
    let size = op.size;
    let bytes = 1_u64 << size;
    let release = op.imm & 0xffff;
    let [rip, selector] = cpu.peek_stack::<2>(size, 0)?;
    let selector = selector as u16;
    let after = cpu.state.gpr[4].wrapping_add(2 * bytes + release);
    if cpu.mode.real_segments() {
        if rip > cpu.code_limit() {
            return Err(cpu.gp());
        }
        cpu.set_stack_pointer(after);
        cpu.set_real_cs(selector, rip);
        return Err(Leave::Boundary);
    }
    let code = cpu.return_code(selector)?;
    let cpl = selector as u8 & 3;
    if cpl == cpu.mode.cpl {
        cpu.check_far_target(rip, &code)?;
        cpu.set_stack_pointer(after);
        cpu.return_to(selector, code, rip, None)?;
        return Err(Leave::Boundary);
    }
    let before = cpu.state.gpr[4];
    cpu.set_stack_pointer(before.wrapping_add(release));
    let outer = cpu.peek_stack::<2>(size, 2);
    cpu.state.gpr[4] = before;
    let [rsp, ss] = outer?;
    let segment = cpu.return_stack(ss as u16, cpl, &code)?;
    cpu.check_far_target(rip, &code)?;
    cpu.return_to(selector, code, rip, Some((segment, rsp.wrapping_add(release))))?;
    Err(Leave::Boundary)
}

/// Flags IRET and POPF may change, by privilege.
fn iret_flags(cpu: &Cpu, size: u8) -> u64 {
    let mut mask = rflags::STATUS | rflags::TF | rflags::DF | rflags::NT;
    if size > 1 {
        mask |= rflags::RF | rflags::AC | rflags::ID;
    }
    let iopl = (cpu.state.rflags & rflags::IOPL) >> 12;
    if u64::from(cpu.mode.cpl) <= iopl {
        mask |= rflags::IF;
    }
    if cpu.mode.cpl == 0 {
        mask |= rflags::IOPL;
        if size > 1 {
            mask |= rflags::VIF | rflags::VIP;
        }
    }
    mask
}

fn iret(cpu: &mut Cpu, op: &Op) -> Done {
    let size = op.size;
    if cpu.mode.real_segments() {
        return iret_real(cpu, size);
    }
    if cpu.state.rflags & rflags::NT != 0 {
        if cpu.mode.long {
            return Err(cpu.gp());
        }
        let link = cpu.read_linear::<u16>(cpu.state.tr.base, 3, Rights::System)?;
        cpu.state.rip = op.next;
        cpu.task_switch(link, Why::Return)?;
        cpu.state.nmi_blocked = false;
        return Err(Leave::Boundary);
    }
    let [rip, selector, flags] = cpu.peek_stack::<3>(size, 0)?;
    let selector = selector as u16;
    if size == 2 && flags & rflags::VM != 0 && cpu.mode.cpl == 0 && !cpu.mode.long {
        return iret_to_v86(cpu, rip, selector, flags);
    }
    let code = cpu.return_code(selector)?;
    let cpl = selector as u8 & 3;
    let mask = iret_flags(cpu, size);
    let stack = if cpu.mode.is_64() || cpl != cpu.mode.cpl {
        let [rsp, ss] = cpu.peek_stack::<2>(size, 3)?;
        Some((cpu.return_stack(ss as u16, cpl, &code)?, rsp))
    } else {
        None
    };
    cpu.check_far_target(rip, &code)?;
    if stack.is_none() {
        cpu.set_stack_pointer(cpu.state.gpr[4].wrapping_add(3 << size));
    }
    let flags = cpu.rflags() & !mask & !rflags::RF | flags & mask;
    cpu.return_to(selector, code, rip, stack)?;
    finish_iret(cpu, flags);
    Err(Leave::Boundary)
}

fn finish_iret(cpu: &mut Cpu, flags: u64) {
    cpu.set_rflags(flags);
    cpu.state.nmi_blocked = false;
    cpu.flags_loaded = true;
}

/// Real mode, and virtual-8086 mode with IOPL 3 (#GP(0) otherwise).
fn iret_real(cpu: &mut Cpu, size: u8) -> Done {
    if cpu.mode.v86 && cpu.state.rflags & rflags::IOPL != rflags::IOPL {
        return Err(cpu.gp());
    }
    let [rip, selector, flags] = cpu.peek_stack::<3>(size, 0)?;
    if rip > cpu.code_limit() {
        return Err(cpu.gp());
    }
    let mut mask = iret_flags(cpu, size) & !(rflags::VIF | rflags::VIP);
    if cpu.mode.v86 {
        mask &= !rflags::IOPL;
    }
    cpu.set_stack_pointer(cpu.state.gpr[4].wrapping_add(3 << size));
    let flags = cpu.rflags() & !mask & !rflags::RF | flags & mask;
    cpu.set_real_cs(selector as u16, rip & size_mask(size));
    finish_iret(cpu, flags);
    Err(Leave::Boundary)
}

/// IRETD from CPL 0 with VM set in the image: ESP, SS, ES, DS, FS and GS follow (SDM vol. 3A, 20.2.2).
fn iret_to_v86(cpu: &mut Cpu, rip: u64, selector: u16, flags: u64) -> Done {
    let [esp, ss, es, ds, fs, gs] = cpu.peek_stack::<6>(2, 3)?;
    if rip > 0xffff {
        return Err(cpu.gp());
    }
    for (number, value) in [(seg::CS, selector), (seg::SS, ss as u16), (seg::ES, es as u16), (seg::DS, ds as u16)]
        .into_iter()
        .chain([(seg::FS, fs as u16), (seg::GS, gs as u16)])
    {
        cpu.state.segments[number] = Segment { attributes: 0xf3, ..Segment::real_mode(value) };
    }
    cpu.state.rip = rip;
    cpu.state.gpr[4] = esp & 0xffff_ffff;
    finish_iret(cpu, flags & 0x3f_7fd7);
    Err(Leave::Boundary)
}
