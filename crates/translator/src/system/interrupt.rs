//! Delivery of exceptions and interrupts through the IVT or IDT (Intel SDM vol. 3A, chapter 6), and INT n.

use engine::state::{Segment, rflags, seg};
use iced_x86::{Instruction, Mnemonic};

use super::descriptor::{Descriptor, is_null, kind, selector_code};
use crate::cpu::{Cpu, Exception, size_mask, vector};
use crate::mmu::{Rights, canonical};
use crate::op::{Done, Handler, Leave, Op};

/// The processor is in the shutdown state: a fault while delivering a double fault.
pub(crate) struct ShutDown;

/// Where an event comes from; decides privilege checks, the EXT bit of error codes, and the pushed RF.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// An exception that pushes the address of the faulting instruction.
    Fault,
    /// An external interrupt, an NMI, or a trap-class exception.
    Hardware,
    /// INT n, INT3, INTO: the gate's DPL counts.
    Software,
}

/// Something to deliver.
#[derive(Clone, Copy, Debug)]
struct Event {
    vector: u8,
    error: Option<u32>,
    source: Source,
}

impl Event {
    /// EXT: not caused by the program itself (SDM vol. 3A, 6.13).
    fn external(self) -> u32 {
        u32::from(self.source != Source::Software)
    }

    /// Error code that names this event's own IDT entry.
    fn idt_code(self) -> u32 {
        u32::from(self.vector) << 3 | 2 | self.external()
    }
}

pub(super) fn select(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    Some(match instruction.mnemonic() {
        Mnemonic::Int => {
            op.imm = instruction.immediate8().into();
            int_n
        }
        Mnemonic::Int3 => {
            op.imm = vector::BP.into();
            int_3
        }
        Mnemonic::Into => into,
        Mnemonic::Int1 => int_1,
        _ => return None,
    })
}

/// INT n. In virtual-8086 mode it needs IOPL 3 (SDM vol. 3A, 20.2.7, without CR4.VME).
fn int_n(cpu: &mut Cpu, op: &Op) -> Done {
    if cpu.mode.v86 && cpu.state.rflags & rflags::IOPL != rflags::IOPL {
        return Err(cpu.gp());
    }
    software(cpu, op, op.imm as u8)
}

fn int_3(cpu: &mut Cpu, op: &Op) -> Done {
    software(cpu, op, vector::BP)
}

fn into(cpu: &mut Cpu, op: &Op) -> Done {
    if cpu.flags.of() { software(cpu, op, vector::OF) } else { Ok(()) }
}

fn software(cpu: &mut Cpu, op: &Op, vector: u8) -> Done {
    cpu.state.rip = op.next;
    cpu.no_step = true;
    cpu.deliver(Event { vector, error: None, source: Source::Software })?;
    Err(Leave::Boundary)
}

/// INT1 (ICEBP): #DB as if by hardware, without a DR6 bit of its own and without a DPL check. What MOV SS held back is
/// reported with it.
fn int_1(cpu: &mut Cpu, op: &Op) -> Done {
    let held = std::mem::take(&mut cpu.pending_debug);
    cpu.state.dr6 |= held;
    cpu.state.rip = op.next;
    cpu.no_step = true;
    cpu.deliver(Event { vector: vector::DB, error: None, source: Source::Hardware })?;
    Err(Leave::Boundary)
}

/// Contributory exceptions (SDM vol. 3A, table 6-4).
fn contributory(vector: u8) -> bool {
    matches!(vector, vector::DE | vector::TS | vector::NP | vector::SS | vector::GP)
}

impl Cpu {
    /// Delivers [`Cpu::exception`], RIP being what is to be pushed. Faults met on the way are delivered in its place, or as
    /// a double fault (SDM vol. 3A, table 6-5).
    pub(crate) fn deliver_exception(&mut self) -> Result<(), ShutDown> {
        let mut first = self.exception;
        loop {
            if first.vector == vector::PF {
                self.state.cr2 = first.address;
            }
            // Faults restart their instruction and push RF; #DB here is trap-class or sets RF itself.
            let trap = matches!(first.vector, vector::DB | vector::BP | vector::OF | vector::DF);
            let source = if trap { Source::Hardware } else { Source::Fault };
            if self.deliver(Event { vector: first.vector, error: first.error, source }).is_ok() {
                return Ok(());
            }
            let second = self.exception;
            let page_fault = first.vector == vector::PF;
            let severe = second.vector == vector::PF || contributory(second.vector);
            if first.vector == vector::DF && severe {
                return Err(ShutDown);
            }
            let double = contributory(first.vector) && contributory(second.vector) || page_fault && severe;
            first = if double { Exception { vector: vector::DF, error: Some(0), address: 0 } } else { second };
        }
    }

    /// Delivers an external interrupt.
    pub(crate) fn deliver_interrupt(&mut self, vector: u8) -> Result<(), Leave> {
        self.deliver(Event { vector, error: None, source: Source::Hardware })
    }

    /// Delivers an NMI and blocks further ones until IRET.
    pub(crate) fn deliver_nmi(&mut self) -> Result<(), Leave> {
        self.state.nmi_blocked = true;
        self.deliver(Event { vector: vector::NMI, error: None, source: Source::Hardware })
    }

    /// One delivery. Nothing of the state changes when it fails; the stack may have been written.
    fn deliver(&mut self, event: Event) -> Done {
        let result = if self.mode.real {
            self.deliver_real(event)
        } else if self.mode.long {
            self.deliver_long(event)
        } else {
            self.deliver_protected(event)
        };
        self.recheck = true;
        result
    }

    /// RFLAGS as pushed: faults push RF, so that a code breakpoint does not hit again.
    fn pushed_flags(&self, event: Event) -> u64 {
        let resume = if event.source == Source::Fault { rflags::RF } else { 0 };
        self.rflags() | resume
    }

    /// Clears what every delivery clears: TF, NT, RF, VM, and IF for an interrupt gate.
    fn clear_flags(&mut self, interrupt_gate: bool) {
        let interrupt = if interrupt_gate { rflags::IF } else { 0 };
        self.state.rflags &= !(rflags::TF | rflags::NT | rflags::RF | rflags::VM | interrupt);
    }

    /// Real mode: the interrupt vector table of far pointers (SDM vol. 3A, 20.1.4).
    fn deliver_real(&mut self, event: Event) -> Done {
        let offset = u64::from(event.vector) * 4;
        if offset + 3 > u64::from(self.state.idtr.limit) {
            return Err(self.raise_code(vector::GP, event.idt_code()));
        }
        let entry = self.read_linear::<u32>(self.state.idtr.base.wrapping_add(offset), 3, Rights::System)?;
        let before = self.state.gpr[4];
        let (flags, cs, ip) = (self.rflags(), self.state.segments[seg::CS].selector, self.state.rip);
        for value in [flags as u16, cs, ip as u16] {
            if let Err(fault) = self.push::<u16>(value) {
                self.state.gpr[4] = before;
                return Err(fault);
            }
        }
        self.state.rflags &= !(rflags::IF | rflags::TF | rflags::AC | rflags::RF);
        self.set_real_cs((entry >> 16) as u16, u64::from(entry & 0xffff));
        Ok(())
    }

    /// IA-32e mode: 16-byte gates, 64-bit handlers, a stack frame of five or six quadwords (SDM vol. 3A, 6.14).
    fn deliver_long(&mut self, event: Event) -> Done {
        let gate = self.idt_gate(event, 16)?;
        let target = self.gate_code(gate.gate_selector(), event.external())?;
        let selector = gate.gate_selector();
        if !target.long() || target.big() {
            return Err(self.raise_code(vector::GP, selector_code(selector) | event.external()));
        }
        let cpl = self.mode.cpl;
        let new_cpl = if target.is_conforming() { cpl } else { target.dpl() };
        let ist = (gate.low >> 32 & 7) as u8;
        let stack = if ist != 0 {
            self.tss_stack(36 + 8 * (u64::from(ist) - 1), event.external())?
        } else if new_cpl != cpl {
            self.tss_stack(4 + 8 * u64::from(new_cpl), event.external())?
        } else {
            self.state.gpr[4]
        };

        let mut frame = [0; 48];
        let words = [
            event.error.unwrap_or(0).into(),
            self.state.rip,
            self.state.segments[seg::CS].selector.into(),
            self.pushed_flags(event),
            self.state.gpr[4],
            self.state.segments[seg::SS].selector.into(),
        ];
        for (slot, word) in frame.chunks_exact_mut(8).zip(words) {
            slot.copy_from_slice(&u64::to_le_bytes(word));
        }
        let frame = if event.error.is_some() { &frame[..] } else { &frame[8..] };
        let top = stack & !15;
        let bottom = top.wrapping_sub(frame.len() as u64);
        if !canonical(bottom) || !canonical(top.wrapping_sub(1)) {
            return Err(self.raise_code(vector::SS, event.external()));
        }
        let rights = if new_cpl == 3 { Rights::Current } else { Rights::System };
        self.write_bytes(bottom, frame, seg::SS as u8, rights)?;
        if !canonical(gate.gate_offset()) {
            return Err(self.raise_code(vector::GP, event.external()));
        }

        let mut target = target;
        self.set_accessed(&mut target)?;
        self.state.gpr[4] = bottom;
        if new_cpl != cpl {
            self.state.segments[seg::SS] =
                Segment { selector: new_cpl.into(), attributes: u16::from(new_cpl) << 5, limit: 0, base: 0 };
        }
        self.state.segments[seg::CS] = target.segment(selector & !3 | u16::from(new_cpl));
        self.state.rip = gate.gate_offset();
        self.clear_flags(gate.kind() == kind::INTERRUPT_GATE);
        self.refresh();
        Ok(())
    }

    /// The gate for an event, with the checks every mode makes.
    fn idt_gate(&mut self, event: Event, bytes: u64) -> Result<Descriptor, Leave> {
        let offset = u64::from(event.vector) * bytes;
        if offset + bytes - 1 > u64::from(self.state.idtr.limit) {
            return Err(self.raise_code(vector::GP, event.idt_code()));
        }
        let at = self.state.idtr.base.wrapping_add(offset);
        let low = self.read_linear::<u64>(at, 3, Rights::System)?;
        let high = if bytes == 16 { self.read_linear::<u32>(at.wrapping_add(8), 3, Rights::System)? } else { 0 };
        let gate = Descriptor { low, high, at };
        let known = match gate.kind() {
            kind::INTERRUPT_GATE | kind::TRAP_GATE => true,
            kind::INTERRUPT_GATE_16 | kind::TRAP_GATE_16 | kind::TASK_GATE => bytes == 8,
            _ => false,
        };
        let denied = event.source == Source::Software && gate.dpl() < self.mode.cpl;
        if gate.code_or_data() || !known || denied {
            return Err(self.raise_code(vector::GP, event.idt_code()));
        }
        if !gate.present() {
            return Err(self.raise_code(vector::NP, event.idt_code()));
        }
        Ok(gate)
    }

    /// The code segment a gate leads to.
    fn gate_code(&mut self, selector: u16, external: u32) -> Result<Descriptor, Leave> {
        if is_null(selector) {
            return Err(self.raise_code(vector::GP, external));
        }
        let code = self.descriptor(selector, vector::GP, external)?;
        if !code.is_code() || code.dpl() > self.mode.cpl {
            return Err(self.raise_code(vector::GP, selector_code(selector) | external));
        }
        if !code.present() {
            return Err(self.raise_code(vector::NP, selector_code(selector) | external));
        }
        Ok(code)
    }

    /// A stack pointer from the 64-bit TSS (SDM vol. 3A, 7.7).
    pub(super) fn tss_stack(&mut self, offset: u64, external: u32) -> Result<u64, Leave> {
        let tr = self.state.tr;
        if offset + 7 > u64::from(tr.limit) {
            return Err(self.raise_code(vector::TS, selector_code(tr.selector) | external));
        }
        self.read_linear(tr.base.wrapping_add(offset), 3, Rights::System)
    }

    /// Protected and virtual-8086 mode outside IA-32e mode (SDM vol. 3A, 6.12).
    fn deliver_protected(&mut self, event: Event) -> Done {
        let gate = self.idt_gate(event, 8)?;
        if gate.kind() == kind::TASK_GATE {
            return self.deliver_to_task(&gate, event);
        }
        let wide = gate.kind() & 8 != 0;
        let selector = gate.gate_selector();
        let external = event.external();
        let mut target = self.gate_code(selector, external)?;
        let cpl = self.mode.cpl;
        let from_v86 = self.mode.v86;
        let new_cpl = if target.is_conforming() { cpl } else { target.dpl() };
        if from_v86 && new_cpl != 0 {
            return Err(self.raise_code(vector::GP, selector_code(selector) | external));
        }
        let offset = if wide { gate.gate_offset() } else { gate.gate_offset() & 0xffff };

        let stack = if new_cpl != cpl {
            let (ss, esp) = self.inner_stack(new_cpl, external)?;
            let segment = self.inner_stack_segment(ss, new_cpl, external)?;
            Some((segment, esp))
        } else {
            None
        };
        if offset > u64::from(target.limit()) {
            return Err(self.raise_code(vector::GP, external));
        }

        let mut words = [0_u32; 10];
        let mut count = 0;
        let mut add = |word: u32| {
            words[count] = word;
            count += 1;
        };
        if from_v86 {
            for number in [seg::GS, seg::FS, seg::DS, seg::ES] {
                add(self.state.segments[number].selector.into());
            }
        }
        if stack.is_some() {
            add(self.state.segments[seg::SS].selector.into());
            add(self.state.gpr[4] as u32);
        }
        add(self.pushed_flags(event) as u32);
        add(self.state.segments[seg::CS].selector.into());
        add(self.state.rip as u32);
        if let Some(error) = event.error {
            add(error);
        }
        self.push_frame(&words[..count], wide, stack, external)?;

        self.set_accessed(&mut target)?;
        if from_v86 {
            for number in [seg::GS, seg::FS, seg::DS, seg::ES] {
                self.state.segments[number] = Segment::default();
            }
        }
        self.state.segments[seg::CS] = target.segment(selector & !3 | u16::from(new_cpl));
        self.state.rip = offset;
        self.clear_flags(matches!(gate.kind(), kind::INTERRUPT_GATE | kind::INTERRUPT_GATE_16));
        self.refresh();
        Ok(())
    }

    /// Pushes words on the current or a new stack, all or nothing, and makes the new stack current.
    pub(super) fn push_frame(
        &mut self,
        words: &[u32],
        wide: bool,
        stack: Option<(Segment, u64)>,
        external: u32,
    ) -> Done {
        let old = (self.state.segments[seg::SS], self.state.gpr[4], self.mode);
        if let Some((segment, esp)) = stack {
            self.state.segments[seg::SS] = segment;
            self.mode.stack = if segment.big() { 2 } else { 1 };
            self.mode.cpl = segment.dpl();
            self.mode.v86 = false;
            self.set_stack_pointer(esp);
        }
        let result = self.push_words(words, wide);
        if result.is_err() {
            (self.state.segments[seg::SS], self.state.gpr[4], self.mode) = old;
            if self.exception.vector == vector::SS {
                // The stack segment's own limit: the error code names the new segment, if there is one.
                let code = stack.map_or(0, |(segment, _)| selector_code(segment.selector));
                self.exception.error = Some(code | external);
            }
        }
        result
    }

    fn push_words(&mut self, words: &[u32], wide: bool) -> Done {
        let bytes: u64 = if wide { 4 } else { 2 };
        let mask = size_mask(self.mode.stack);
        let mut pointer = self.state.gpr[4];
        let rights = if self.mode.cpl == 3 { Rights::Current } else { Rights::System };
        for &word in words {
            pointer = pointer.wrapping_sub(bytes) & mask;
            let address = self.segmented(seg::SS, pointer, bytes, crate::mmu::Access::Write)?;
            if wide {
                self.write_linear(address, word, seg::SS as u8, rights)?;
            } else {
                self.write_linear(address, word as u16, seg::SS as u8, rights)?;
            }
        }
        self.set_stack_pointer(pointer);
        Ok(())
    }

    /// SS:ESP for an inner privilege level from the 16- or 32-bit TSS (SDM vol. 3A, 5.8.5).
    pub(super) fn inner_stack(&mut self, cpl: u8, external: u32) -> Result<(u16, u64), Leave> {
        let tr = self.state.tr;
        let wide = tr.kind() & 8 != 0;
        let (offset, size) = if wide { (4 + 8 * u64::from(cpl), 4) } else { (2 + 4 * u64::from(cpl), 2) };
        if offset + size + 1 > u64::from(tr.limit) {
            return Err(self.raise_code(vector::TS, selector_code(tr.selector) | external));
        }
        let at = tr.base.wrapping_add(offset);
        let esp = if wide {
            self.read_linear::<u32>(at, 3, Rights::System)?.into()
        } else {
            self.read_linear::<u16>(at, 3, Rights::System)?.into()
        };
        let ss = self.read_linear::<u16>(at.wrapping_add(size), 3, Rights::System)?;
        Ok((ss, esp))
    }

    /// Checks the stack segment of an inner level: #TS where it will not do.
    pub(super) fn inner_stack_segment(&mut self, selector: u16, cpl: u8, external: u32) -> Result<Segment, Leave> {
        let code = selector_code(selector) | external;
        if is_null(selector) {
            return Err(self.raise_code(vector::TS, external));
        }
        let mut descriptor = self.descriptor(selector, vector::TS, external)?;
        if selector as u8 & 3 != cpl || descriptor.dpl() != cpl || !descriptor.is_writable_data() {
            return Err(self.raise_code(vector::TS, code));
        }
        if !descriptor.present() {
            return Err(self.raise_code(vector::SS, code));
        }
        self.set_accessed(&mut descriptor)?;
        Ok(descriptor.segment(selector))
    }

    /// A task gate in the IDT: a task switch, with the error code pushed on the new task's stack.
    fn deliver_to_task(&mut self, gate: &Descriptor, event: Event) -> Done {
        self.task_switch(gate.gate_selector(), super::task::Why::Interrupt { external: event.external() })?;
        if let Some(error) = event.error {
            let wide = self.state.tr.kind() & 8 != 0;
            self.push_frame(&[error], wide, None, event.external())?;
        }
        Ok(())
    }
}
