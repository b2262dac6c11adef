//! Hardware task switches, outside IA-32e mode (Intel SDM vol. 3A, chapter 7).

use engine::state::{Segment, cr0, cr4, efer, rflags, seg};

use super::descriptor::{Descriptor, is_null, kind, selector_code};
use crate::cpu::{Cpu, vector};
use crate::mmu::Rights;
use crate::op::{Done, Leave};

/// What asks for a task switch (SDM vol. 3A, table 7-2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Why {
    /// JMP: the old task is no longer busy.
    Jump,
    /// CALL: nested, with a back link.
    Call,
    /// IRET with NT set: back to the task that called.
    Return,
    /// An interrupt or exception through a task gate: nested.
    Interrupt {
        /// EXT bit of error codes.
        external: u32,
    },
}

/// What a TSS keeps of a task.
#[derive(Clone, Copy, Debug, Default)]
struct Task {
    cr3: Option<u32>,
    eip: u32,
    eflags: u32,
    gpr: [u32; 8],
    /// ES, CS, SS, DS, FS, GS.
    selectors: [u16; 6],
    ldt: u16,
    trap: bool,
}

/// Offsets in the 32-bit TSS (SDM vol. 3A, figure 7-2) and the 16-bit one (figure 7-11).
struct Layout {
    wide: bool,
    eip: u64,
    registers: u64,
    selectors: u64,
    selector_step: u64,
    selector_count: usize,
    ldt: u64,
    /// Smallest limit that will do.
    limit: u32,
}

const LAYOUT_32: Layout = Layout {
    wide: true,
    eip: 32,
    registers: 40,
    selectors: 72,
    selector_step: 4,
    selector_count: 6,
    ldt: 96,
    limit: 103,
};
const LAYOUT_16: Layout = Layout {
    wide: false,
    eip: 14,
    registers: 18,
    selectors: 34,
    selector_step: 2,
    selector_count: 4,
    ldt: 42,
    limit: 43,
};

impl Layout {
    fn of(kind: u8) -> &'static Self {
        if kind & 8 != 0 { &LAYOUT_32 } else { &LAYOUT_16 }
    }

    fn bytes(&self) -> u64 {
        if self.wide { 4 } else { 2 }
    }
}

impl Cpu {
    /// Switches to the task whose TSS is `selector`. RIP must be where the old task goes on.
    pub(super) fn task_switch(&mut self, selector: u16, why: Why) -> Done {
        let (mut descriptor, code) = self.task_descriptor(selector, why)?;
        let new_base = descriptor.segment(selector).base;
        let layout = Layout::of(descriptor.kind());
        if descriptor.limit() < layout.limit {
            return Err(self.raise_code(vector::TS, code));
        }
        // Everything that can fail without having changed anything comes first.
        let task = self.read_task(new_base, layout)?;
        let old = self.state.tr;
        let old_layout = Layout::of(old.kind());
        self.probe_write(old.base, u64::from(old_layout.limit) + 1, 3, Rights::System)?;
        self.probe_write(new_base, u64::from(layout.limit) + 1, 3, Rights::System)?;

        if matches!(why, Why::Jump | Why::Return)
            && let Some(mut old_descriptor) = self.find_descriptor(old.selector)?
        {
            let idle = old_descriptor.kind() & !2;
            self.set_descriptor_kind(&mut old_descriptor, idle)?;
        }
        let mut flags = self.rflags() as u32;
        if why == Why::Return {
            flags &= !(rflags::NT as u32);
        }
        self.write_task(old.base, old_layout, flags)?;
        if matches!(why, Why::Call | Why::Interrupt { .. }) {
            self.write_linear(new_base, old.selector, 3, Rights::System)?;
        }
        if why != Why::Return {
            let busy = descriptor.kind() | 2;
            self.set_descriptor_kind(&mut descriptor, busy)?;
        }
        self.state.cr0 |= cr0::TS;
        self.state.tr = descriptor.segment(selector);
        let nested = matches!(why, Why::Call | Why::Interrupt { .. });
        self.load_task(&task, nested).map_err(|_| {
            self.refresh();
            Leave::RaisedInTask
        })
    }

    /// The TSS descriptor and the error code that names it.
    fn task_descriptor(&mut self, selector: u16, why: Why) -> Result<(Descriptor, u32), Leave> {
        let external = if let Why::Interrupt { external } = why { external } else { 0 };
        let (fault, wanted) = if why == Why::Return { (vector::TS, 2) } else { (vector::GP, 0) };
        let code = selector_code(selector) | external;
        if is_null(selector) || selector & 4 != 0 {
            return Err(self.raise_code(fault, code));
        }
        let descriptor = self.descriptor(selector, fault, external)?;
        let busy = descriptor.kind() & 2;
        let is_tss = matches!(descriptor.kind(), kind::TSS | kind::TSS_BUSY | kind::TSS_16 | kind::TSS_16_BUSY);
        if descriptor.code_or_data() || !is_tss || busy != wanted {
            return Err(self.raise_code(fault, code));
        }
        if !descriptor.present() {
            return Err(self.raise_code(vector::NP, code));
        }
        Ok((descriptor, code))
    }

    fn tss_word(&mut self, base: u64, offset: u64, wide: bool) -> Result<u32, Leave> {
        let at = base.wrapping_add(offset) & 0xffff_ffff;
        Ok(if wide {
            self.read_linear::<u32>(at, 3, Rights::System)?
        } else {
            self.read_linear::<u16>(at, 3, Rights::System)?.into()
        })
    }

    fn read_task(&mut self, base: u64, layout: &Layout) -> Result<Task, Leave> {
        let wide = layout.wide;
        let step = layout.bytes();
        let mut task = Task {
            cr3: if wide { Some(self.tss_word(base, 28, true)?) } else { None },
            eip: self.tss_word(base, layout.eip, wide)?,
            eflags: self.tss_word(base, layout.eip + step, wide)?,
            ldt: self.tss_word(base, layout.ldt, false)? as u16,
            trap: wide && self.tss_word(base, 100, false)? & 1 != 0,
            ..Task::default()
        };
        for number in 0..8 {
            // EAX, ECX, EDX, EBX, ESP, EBP, ESI, EDI: the encoding's order.
            let word = self.tss_word(base, layout.registers + number * step, wide)?;
            task.gpr[number as usize] = if wide { word } else { word | 0xffff_0000 };
        }
        for number in 0..layout.selector_count {
            let at = layout.selectors + number as u64 * layout.selector_step;
            task.selectors[number] = self.tss_word(base, at, false)? as u16;
        }
        Ok(task)
    }

    fn write_task(&mut self, base: u64, layout: &Layout, flags: u32) -> Done {
        let step = layout.bytes();
        let rip = self.state.rip as u32;
        self.put_tss_word(base, layout.eip, rip, layout.wide)?;
        self.put_tss_word(base, layout.eip + step, flags, layout.wide)?;
        for number in 0..8 {
            let value = self.state.gpr[number as usize] as u32;
            self.put_tss_word(base, layout.registers + number * step, value, layout.wide)?;
        }
        for number in 0..layout.selector_count {
            let at = layout.selectors + number as u64 * layout.selector_step;
            self.put_tss_word(base, at, self.state.segments[number].selector.into(), false)?;
        }
        Ok(())
    }

    fn put_tss_word(&mut self, base: u64, offset: u64, value: u32, wide: bool) -> Done {
        let at = base.wrapping_add(offset) & 0xffff_ffff;
        if wide {
            self.write_linear(at, value, 3, Rights::System)
        } else {
            self.write_linear(at, value as u16, 3, Rights::System)
        }
    }

    /// Loads the new task's registers. From here on faults belong to the new task.
    fn load_task(&mut self, task: &Task, nested: bool) -> Done {
        let state = &mut *self.state;
        if let Some(cr3) = task.cr3
            && state.cr0 & cr0::PG != 0
        {
            state.cr3 = cr3.into();
            if state.cr4 & cr4::PAE != 0 && state.efer & efer::LMA == 0 {
                self.load_pdptrs()?;
            }
            self.tlb.flush_all();
        }
        for (register, value) in self.state.gpr.iter_mut().zip(task.gpr) {
            *register = value.into();
        }
        self.state.rip = task.eip.into();
        let nest = if nested { rflags::NT } else { 0 };
        self.set_rflags(u64::from(task.eflags) & 0x3f_7fd7 | nest);
        self.no_step = true;
        self.state.dr7 &= !0x155; // local breakpoints are the task's (SDM vol. 3A, 7.2.1)
        if task.trap {
            self.pending_debug |= 1 << 15; // BT
        }
        for (number, selector) in task.selectors.into_iter().enumerate() {
            // Not yet valid; faults below must find no descriptor cached from the old task.
            let v86 = self.state.rflags & rflags::VM != 0;
            self.state.segments[number] = if v86 {
                Segment { attributes: 0xf3, ..Segment::real_mode(selector) }
            } else {
                Segment {
                    selector,
                    attributes: if number == seg::SS { (selector & 3) << 5 } else { 0 },
                    ..Segment::default()
                }
            };
        }
        self.load_task_ldt(task.ldt)?;
        if self.state.rflags & rflags::VM != 0 {
            self.refresh();
            return Ok(());
        }
        self.load_task_segments(task)
    }

    fn load_task_ldt(&mut self, selector: u16) -> Done {
        self.state.ldtr = Segment { selector, ..Segment::default() };
        if is_null(selector) {
            return Ok(());
        }
        if selector & 4 != 0 {
            return Err(self.raise_code(vector::TS, selector_code(selector)));
        }
        let ldt = self.descriptor(selector, vector::TS, 0)?;
        if ldt.code_or_data() || ldt.kind() != kind::LDT || !ldt.present() {
            return Err(self.raise_code(vector::TS, selector_code(selector)));
        }
        self.state.ldtr = ldt.segment(selector);
        Ok(())
    }

    fn load_task_segments(&mut self, task: &Task) -> Done {
        let cs = task.selectors[seg::CS];
        let cpl = cs as u8 & 3;
        if is_null(cs) {
            return Err(self.raise_code(vector::TS, 0));
        }
        let mut code = self.descriptor(cs, vector::TS, 0)?;
        let fits = code.is_code() && if code.is_conforming() { code.dpl() <= cpl } else { code.dpl() == cpl };
        if !fits {
            return Err(self.raise_code(vector::TS, selector_code(cs)));
        }
        if !code.present() {
            return Err(self.raise_code(vector::NP, selector_code(cs)));
        }
        self.set_accessed(&mut code)?;
        let stack = self.inner_stack_segment(task.selectors[seg::SS], cpl, 0)?;
        self.state.segments[seg::SS] = stack;
        self.state.segments[seg::CS] = code.segment(cs);
        self.refresh();
        for number in [seg::ES, seg::DS, seg::FS, seg::GS] {
            let selector = task.selectors[number];
            match self.checked_segment(number, selector, cpl) {
                Ok(segment) => self.state.segments[number] = segment,
                Err(leave) => {
                    if self.exception.vector == vector::GP {
                        self.exception.vector = vector::TS;
                    }
                    return Err(leave);
                }
            }
        }
        if u64::from(task.eip) > self.code_limit() {
            return Err(self.gp());
        }
        Ok(())
    }

    /// Loads the four PAE page-directory-pointer entries from CR3 (SDM vol. 3A, 4.4.1): #GP(0) for reserved bits.
    pub(super) fn load_pdptrs(&mut self) -> Done {
        let table = self.state.cr3 & 0xffff_ffe0;
        let mut entries = [0_u64; 4];
        for (index, entry) in entries.iter_mut().enumerate() {
            let gpa = memory::Gpa(table + index as u64 * 8);
            *entry = self.shared.ram.read_value(gpa).unwrap_or(0);
            let reserved = !((1 << self.features.physical_bits) - 1) | 0x1e6;
            if *entry & 1 != 0 && *entry & reserved != 0 {
                return Err(self.gp());
            }
        }
        self.state.pdptrs = entries;
        Ok(())
    }

    /// Whether the I/O permission bitmap of the TSS allows `bytes` ports from `port` (SDM vol. 1, 18.5.2).
    pub(super) fn port_permitted(&mut self, port: u16, bytes: u64) -> Result<bool, Leave> {
        let tr = self.state.tr;
        let limit = u64::from(tr.limit);
        if tr.kind() & 8 == 0 || limit < 103 {
            return Ok(false);
        }
        let map = u64::from(self.read_linear::<u16>(tr.base.wrapping_add(102), 3, Rights::System)?);
        let at = map + u64::from(port >> 3);
        // The processor always reads two bytes.
        if at + 1 > limit {
            return Ok(false);
        }
        let bits = self.read_linear::<u16>(tr.base.wrapping_add(at), 3, Rights::System)?;
        let wanted = ((1_u16 << bytes) - 1) << (port & 7);
        Ok(bits & wanted == 0)
    }
}
