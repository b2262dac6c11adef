//! One vCPU as the interpreter works on it: the architectural state plus what is derived from it.

use std::ptr::NonNull;
use std::sync::Arc;

use engine::state::{cr0, cr4, efer, rflags, seg};
use engine::{CpuIo, CpuState, Error, Exit, Phase, VcpuConfig};
use memory::Gpa;

use crate::config::Check;
use crate::flags::Flags;
use crate::home::Home;
use crate::jit::After;
use crate::lockstep::Rehearsal;
use crate::mmu::{DataMode, Tlb, Where, Window, Written};
use crate::op::{Leave, NO_REG};
use crate::shared::{Link, Shared};
use crate::system::features::Features;
use crate::width::Width;

/// Exception vectors (Intel SDM vol. 3A, 6.15).
#[allow(dead_code)] // the full table is the datasheet; not every vector is raised by name
pub(crate) mod vector {
    pub(crate) const DE: u8 = 0;
    pub(crate) const DB: u8 = 1;
    pub(crate) const NMI: u8 = 2;
    pub(crate) const BP: u8 = 3;
    pub(crate) const OF: u8 = 4;
    pub(crate) const BR: u8 = 5;
    pub(crate) const UD: u8 = 6;
    pub(crate) const NM: u8 = 7;
    pub(crate) const DF: u8 = 8;
    pub(crate) const TS: u8 = 10;
    pub(crate) const NP: u8 = 11;
    pub(crate) const SS: u8 = 12;
    pub(crate) const GP: u8 = 13;
    pub(crate) const PF: u8 = 14;
    pub(crate) const MF: u8 = 16;
    pub(crate) const AC: u8 = 17;
    pub(crate) const XM: u8 = 19;
}

/// A fault on its way to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Exception {
    pub vector: u8,
    /// Pushed where the vector has one.
    pub error: Option<u32>,
    /// The linear address, for a page fault.
    pub address: u64,
}

/// Code and stack sizes, privilege and paging: what decoding and addressing depend on. Derived from the state by
/// [`Cpu::refresh`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Mode {
    /// log2 of the code segment's default size in bytes: 1, 2, or 3 for 64-bit code.
    pub code: u8,
    /// log2 of the stack pointer's size in bytes: 1, 2 or 3.
    pub stack: u8,
    /// 0..=3. Virtual-8086 mode is 3, real mode 0.
    pub cpl: u8,
    /// CR0.PE clear.
    pub real: bool,
    /// RFLAGS.VM set.
    pub v86: bool,
    /// EFER.LMA set: IA-32e mode, 64-bit or compatibility.
    pub long: bool,
}

impl Mode {
    /// 64-bit code.
    pub(crate) fn is_64(self) -> bool {
        self.code == 3
    }

    /// Segments are real-mode ones: real or virtual-8086 mode.
    pub(crate) fn real_segments(self) -> bool {
        self.real || self.v86
    }
}

/// The vCPU.
pub(crate) struct Cpu {
    /// Architectural state. The status bits of `rflags` live in `flags` while the vCPU runs.
    pub state: Home,
    /// CF, PF, AF, ZF, SF, OF.
    pub flags: Flags,
    /// Derived from `state`; see [`Cpu::refresh`].
    pub mode: Mode,
    /// Soft TLB.
    pub tlb: Tlb,
    /// Pages that the host has where the guest has them, but for a distance.
    pub window: Window,
    /// Where the soft TLB may have write entries for each page of RAM.
    pub written: Written,
    /// Pages whose code may have been overwritten: what was translated from them is to be looked at before it runs again.
    pub stale: Vec<Gpa>,
    /// How often this vCPU has overwritten code, each time with an entry in `stale`.
    pub code_writes: u64,
    /// What a callback that had translated code left wants done.
    pub after: After,
    /// Exceptions of translated code are for whoever runs it, not to be delivered at once.
    pub exceptions_held: bool,
    /// [`Tlb::generation`] up to which translated code has been told of flushes.
    pub seen_generation: u64,
    /// What of the vector and x87 state could be used when translated code was entered.
    pub seen_units: u16,
    /// The exception behind [`Leave::Raised`].
    pub exception: Exception,
    /// Leave the block after this instruction: something the loop must look at has changed.
    pub recheck: bool,
    /// Debug exceptions that are due before the next instruction, as DR6 bits.
    pub pending_debug: u64,
    /// The instruction that STI's shadow covers; elsewhere [`CpuState::shadow`] has passed, where it is STI's.
    pub sti_shadow_at: u64,
    /// What to leave with before the next instruction: the guest spins, or a hypercall waits.
    pub leaving: Option<Exit>,
    /// The next HLT, or the present one, ends at once.
    pub unhalted: bool,
    /// RFLAGS.RF is not to be cleared after this instruction: it loaded it itself (IRET), or is not done yet (REP).
    pub flags_loaded: bool,
    /// No single-step trap after this instruction, although RFLAGS.TF was set before it (INT n, task switches).
    pub no_step: bool,
    /// DR7 has a data or I/O breakpoint enabled.
    pub watch: bool,
    /// What the CPU model offers.
    pub features: Features,
    /// Id, CPUID, signal, ledger, TSC.
    pub config: VcpuConfig,
    /// Where stores are noted that may be taken back.
    pub rehearsal: Option<Box<Rehearsal>>,
    /// The VM.
    pub shared: Arc<Shared>,
    /// This vCPU as others see it.
    pub link: Arc<Link>,
    io: Option<NonNull<dyn CpuIo>>,
}

// SAFETY: `io` is only set during `run`, on the thread that runs; everything else is owned or shared by design.
unsafe impl Send for Cpu {}

impl Cpu {
    pub(crate) fn new(shared: Arc<Shared>, config: VcpuConfig) -> Result<Self, Error> {
        let link = shared.link(Arc::clone(&config.signal));
        let end = shared.ram.regions().last().map_or(Gpa(0), |region| Gpa(region.start.0 + region.bytes));
        let window = Window::new(config.id.0);
        let state = Home::new(CpuState::reset())?;
        let front = state.file().map_err(|source| Error::Host { what: "a virtual processor's memory", source })?;
        let mut cpu = Self {
            state,
            flags: Flags::default(),
            mode: Mode::default(),
            tlb: Tlb::new(window.distance(), Some(front)),
            window,
            written: Written::new(end),
            stale: Vec::new(),
            code_writes: 0,
            after: After::Look,
            exceptions_held: shared.config.check == Check::Lockstep,
            seen_generation: 0,
            seen_units: 0,
            exception: Exception { vector: 0, error: None, address: 0 },
            recheck: false,
            pending_debug: 0,
            sti_shadow_at: 0,
            leaving: None,
            unhalted: false,
            flags_loaded: false,
            no_step: false,
            watch: false,
            features: Features::new(&config.cpuid),
            config,
            rehearsal: None,
            shared,
            link,
            io: None,
        };
        cpu.refresh();
        Ok(cpu)
    }

    /// Says what the time goes to from now on, for who profiles.
    #[inline(always)]
    pub(crate) fn now(&self, phase: Phase) {
        self.config.ledger.profile.now(phase);
    }

    /// Answers what other vCPUs ask about pages that hold code.
    pub(crate) fn answer_others(&mut self) {
        if self.link.asked() {
            let link = Arc::clone(&self.link);
            link.answer(|pages| {
                for gpa in pages {
                    self.forget_writes(gpa);
                    self.stale.push(gpa);
                }
            });
        }
    }

    /// Forgets how to write to the page of `gpa` without care.
    pub(crate) fn forget_writes(&mut self, gpa: Gpa) {
        match self.written.take(gpa) {
            Where::Nowhere => {}
            Where::At(address) => self.tlb.flush_write_page(address),
            Where::Anywhere => {
                self.tlb.flush_writes();
                self.written.clear();
            }
        }
    }

    /// Makes all other vCPUs forget how to write to the page of `gpa`, and what they translated from it if it is stale.
    pub(crate) fn tell_others(&mut self, gpa: Gpa) {
        let (shared, link) = (Arc::clone(&self.shared), Arc::clone(&self.link));
        shared.tell_others(&link, gpa, || self.answer_others());
    }

    /// Makes `io` reachable through [`Cpu::io`] until [`Cpu::detach_io`], which the caller calls before `io` goes away.
    pub(crate) fn attach_io(&mut self, io: &mut dyn CpuIo) {
        // SAFETY: only the lifetime is erased; `Runner::run`, the one caller, detaches before it returns.
        self.io =
            Some(unsafe { std::mem::transmute::<NonNull<dyn CpuIo + '_>, NonNull<dyn CpuIo>>(NonNull::from(io)) });
    }

    /// Ends what [`Cpu::attach_io`] began.
    pub(crate) fn detach_io(&mut self) {
        self.io = None;
    }

    /// The machine around this vCPU. Only while running; what is asked for outside goes nowhere.
    pub(crate) fn io(&mut self) -> &mut dyn CpuIo {
        match self.io {
            // SAFETY: set by `attach_io` from an exclusive reference that lives until `detach_io`.
            Some(mut io) => unsafe { io.as_mut() },
            None => unreachable!("device access outside of run"),
        }
    }

    /// After each call of [`Cpu::io`] that reached a device: the machine may want the run to end.
    pub(crate) fn after_device(&mut self) {
        if self.io().stop_requested() {
            self.recheck = true;
        }
    }

    /// Derives mode and data mode from the state. After every change of CS, SS, CR0, CR4, EFER, RFLAGS.{VM, AC} or DR7.
    pub(crate) fn refresh(&mut self) {
        let state = &*self.state;
        let real = state.cr0 & cr0::PE == 0;
        let v86 = !real && state.rflags & rflags::VM != 0;
        let long = state.efer & efer::LMA != 0;
        let code_segment = &state.segments[seg::CS];
        let code = match (long && code_segment.long(), code_segment.big()) {
            (true, _) => 3,
            (false, true) => 2,
            (false, false) => 1,
        };
        let stack = match (code, state.segments[seg::SS].big()) {
            (3, _) => 3,
            (_, true) => 2,
            (_, false) => 1,
        };
        let cpl = match (real, v86) {
            (true, _) => 0,
            (_, true) => 3,
            _ => state.segments[seg::SS].dpl(),
        };
        let mode = Mode { code, stack, cpl, real, v86, long };
        self.watch = state.dr7 & 0xff != 0;
        let access_control = state.rflags & rflags::AC != 0;
        let align = state.cr0 & cr0::AM != 0 && access_control && cpl == 3;
        let data_mode = if self.watch || align {
            DataMode::Slow
        } else if cpl == 3 {
            DataMode::User
        } else if state.cr4 & cr4::SMAP != 0 && access_control {
            DataMode::SupervisorAny
        } else {
            DataMode::Supervisor
        };
        self.state.hot_mut().data_mode = data_mode as u64;
        if mode != self.mode {
            self.mode = mode;
            self.recheck = true;
        }
    }

    /// Which soft-TLB tables explicit data accesses use.
    #[inline(always)]
    pub(crate) fn data_mode(&self) -> DataMode {
        DataMode::from_number(self.state.hot().data_mode)
    }

    /// All of RFLAGS.
    pub(crate) fn rflags(&self) -> u64 {
        (self.state.rflags & !rflags::STATUS) | self.flags.status()
    }

    /// Replaces all of RFLAGS. The caller decides which bits may change.
    pub(crate) fn set_rflags(&mut self, value: u64) {
        let value = value | rflags::FIXED;
        self.state.rflags = value & !rflags::STATUS;
        self.flags.set_status(value);
        self.refresh();
        self.recheck = true; // IF or TF may have changed
    }

    /// Reads a general-purpose register operand: `at` is a byte offset into the register file.
    #[inline(always)]
    pub(crate) fn get<W: Width>(&self, at: u8) -> W {
        debug_assert!(at != NO_REG);
        // SAFETY: masked to 0..=127, and the decoder aligns offsets of wide registers; at most 120 + 8 bytes are read.
        unsafe { W::load(self.state.gpr.as_ptr().cast::<u8>().add((at & 127) as usize)) }
    }

    /// Writes a general-purpose register operand; 32-bit writes clear the upper half.
    #[inline(always)]
    pub(crate) fn set<W: Width>(&mut self, at: u8, value: W) {
        debug_assert!(at != NO_REG);
        if W::BYTES == 4 {
            self.state.gpr[((at >> 3) & 15) as usize] = value.zext();
        } else {
            // SAFETY: as in `get`.
            unsafe { value.store(self.state.gpr.as_mut_ptr().cast::<u8>().add((at & 127) as usize)) }
        }
    }

    /// Reads a general-purpose register by number, zero-extended from `size` (log2 of bytes).
    pub(crate) fn gpr(&self, number: usize, size: u8) -> u64 {
        self.state.gpr[number & 15] & size_mask(size)
    }

    /// Writes the low `size` (log2 of bytes) of a general-purpose register; 32-bit writes clear the upper half.
    pub(crate) fn set_gpr(&mut self, number: usize, size: u8, value: u64) {
        let register = &mut self.state.gpr[number & 15];
        *register = match size {
            3 => value,
            2 => value & 0xffff_ffff,
            _ => (*register & !size_mask(size)) | (value & size_mask(size)),
        };
    }

    /// Raises an exception without error code.
    pub(crate) fn raise(&mut self, vector: u8) -> Leave {
        self.exception = Exception { vector, error: None, address: 0 };
        Leave::Raised
    }

    /// Raises an exception with an error code.
    pub(crate) fn raise_code(&mut self, vector: u8, error: u32) -> Leave {
        self.exception = Exception { vector, error: Some(error), address: 0 };
        Leave::Raised
    }

    /// #GP(0).
    pub(crate) fn gp(&mut self) -> Leave {
        self.raise_code(vector::GP, 0)
    }

    /// #UD.
    pub(crate) fn ud(&mut self) -> Leave {
        self.raise(vector::UD)
    }

    /// The mask instruction addresses are truncated to.
    pub(crate) fn code_mask(&self) -> u64 {
        size_mask(self.mode.code)
    }
}

/// All ones in `size` (log2 of bytes).
pub(crate) const fn size_mask(size: u8) -> u64 {
    u64::MAX >> (64 - (8 << size))
}
