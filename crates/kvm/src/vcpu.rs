//! One vCPU: the loop around `KVM_RUN`, and its state to and from the kernel.
//!
//! ```text
//!   run ──> boundary (stop, INIT, NMI, PIC) ──> KVM_RUN ──> leave ──> CpuIo ──┐
//!            ▲  └──────> Exit ──> what is left of an access is finished       │
//!            └────────────────────────────────────────────────────────────────┘
//! ```
//!
//! An access that left guest code is not over before KVM_RUN is called once more: with the answer, it changes registers. So
//! before the vCPU is handed back, KVM_RUN is called to do that and nothing else.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use engine::state::{cr0, efer, seg};
use engine::{
    Answer, Cause, CpuIo, CpuState, Doze, Error, Exit, HypercallArgs, KernelState, Signals, Vcpu, VcpuConfig,
};
use kvm_bindings::{
    CpuId, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_UNINITIALIZED, Msrs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
};
use kvm_ioctls::VcpuFd;
use memory::Gpa;

use crate::kick::{Kick, this_thread};
use crate::kvm::{Vm, refused};
use crate::leave::{Leave, decode};
use crate::state::{MSRS, Parts};
use crate::stats::Stats;
use crate::{cpuid, failure, kernel_state, sys};

/// The kernel's counts reach the ledger at each return of [`Vcpu::run`], and after this many exits at the latest.
const EXITS_A_COUNT: u32 = 256;
/// The CPUID leaf that tells the components of the XSAVE area.
const XSAVE: u32 = 0xd;
/// Bytes of the longest instruction.
const LONGEST_INSTRUCTION: usize = 15;
/// Bytes of the longest single access to a port.
const WIDEST_PORT: usize = 4;

/// A vCPU of the host's KVM.
pub(crate) struct Runner {
    pub(crate) fd: VcpuFd,
    vm: Arc<Vm>,
    pub(crate) config: VcpuConfig,
    pub(crate) kick: Arc<Kick>,
    stats: Option<Stats>,
    exits: u32,
    /// The PIC may have something.
    pub(crate) external: bool,
    /// What the vCPU left for after it was reset in its sleep.
    pub(crate) left: Option<Leave>,
    /// The last exit's access is not over.
    unfinished: bool,
    failure: Option<String>,
}

impl Runner {
    pub(crate) fn new(vm: Arc<Vm>, config: VcpuConfig) -> Result<Self, Error> {
        let fd = vm.fd.create_vcpu(config.id.0.into()).map_err(|e| refused("a vCPU", e))?;
        let shown = cpuid::filtered(&config.cpuid, &vm.supported);
        let list = CpuId::from_entries(&cpuid::entries(&shown))
            .map_err(|error| Error::State(format!("CPUID has too many leaves for KVM: {error}")))?;
        fd.set_cpuid2(&list).map_err(|e| refused("the CPU model", e))?;
        vm.enforce(&fd).map_err(|e| refused("the enforcement of paravirtual features", e))?;
        let offset = config.tsc.offset();
        let kick = Kick::new(as_fd(&fd), vm.run_bytes).map_err(|e| refused("a vCPU's shared memory", e))?;
        let kick = Arc::new(kick);
        let kicks = Arc::clone(&kick);
        config.signal.on_raise(move || kicks.kick());
        let stats = if vm.has_stats { Stats::new(&fd).ok() } else { None };
        let runner = Self {
            fd,
            vm,
            config,
            kick,
            stats,
            exits: 0,
            external: false,
            left: None,
            unfinished: false,
            failure: None,
        };
        runner.set_tsc_offset(offset)?;
        runner.follow_tsc()?;
        Ok(runner)
    }

    fn run_until_exit(&mut self, io: &mut dyn CpuIo) -> Exit {
        let thread = this_thread();
        if let Some(exit) = self.left.take().and_then(|leave| self.answer(io, Ok(leave))) {
            return exit;
        }
        loop {
            self.kick.arm(thread);
            if let Some(exit) = self.boundary(io) {
                self.kick.disarm();
                return self.finish(io).unwrap_or(exit);
            }
            let left = self.enter();
            self.kick.disarm();
            self.exits += 1;
            if self.exits >= EXITS_A_COUNT {
                self.count();
            }
            if let Some(exit) = self.answer(io, left) {
                return exit;
            }
        }
    }

    /// What is looked at before each entry.
    fn boundary(&mut self, io: &mut dyn CpuIo) -> Option<Exit> {
        let signal = Arc::clone(&self.config.signal);
        // Ordered after `immediate_exit` was cleared: see `kick.rs`.
        let pending = Signals::from_bits_retain(signal.word().load(Ordering::SeqCst));
        if pending.contains(Signals::STOP) {
            return Some(Exit::Stopped);
        }
        if io.stop_requested() {
            return Some(Exit::Device);
        }
        if pending.contains(Signals::INIT) {
            signal.take(Signals::INIT);
            self.config.ledger.record(Cause::Startup, 0);
            return Some(Exit::Init);
        }
        if pending.contains(Signals::ENGINE) {
            signal.take(Signals::ENGINE); // there is nothing that this engine asks itself
        }
        if pending.contains(Signals::NMI) {
            signal.take_nmi();
            if let Err(error) = self.fd.nmi() {
                return Some(self.fail(format!("KVM refuses an NMI: {error}")));
            }
        }
        if pending.contains(Signals::INTERRUPT) {
            signal.take(Signals::INTERRUPT);
            self.external = true;
        }
        if self.external { self.offer_external(io) } else { None }
    }

    /// An interrupt of the PIC: handed over where the guest takes one now, else KVM_RUN returns once it does.
    fn offer_external(&mut self, io: &mut dyn CpuIo) -> Option<Exit> {
        self.external = io.interrupt_pending();
        if self.external
            && self.kick.page().take_readiness()
            && let Some(vector) = io.take_interrupt()
        {
            if let Err(error) = sys::interrupt(&self.fd, vector) {
                return Some(self.fail(format!("KVM refuses the PIC's interrupt {vector:#x}: {error}")));
            }
            self.external = io.interrupt_pending();
        }
        self.kick.page().ask_for_window(self.external);
        None
    }

    /// Runs guest code.
    fn enter(&mut self) -> Result<Leave, kvm_ioctls::Error> {
        self.unfinished = false;
        match self.fd.run().map(drop) {
            Ok(()) => {
                let (reason, details) = self.kick.page().exit();
                Ok(decode(reason, &details))
            }
            // Kicked; or a processor that waited for its start-up IPI has got something.
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Ok(Leave::Nothing),
            Err(error) => Err(error),
        }
    }

    /// Does what the guest left for. Returns where that ends the run.
    fn answer(&mut self, io: &mut dyn CpuIo, left: Result<Leave, kvm_ioctls::Error>) -> Option<Exit> {
        let leave = match left {
            Ok(leave) => leave,
            Err(error) => return Some(self.fail(format!("KVM_RUN fails: {error}"))),
        };
        match leave {
            Leave::Port { write, port, width, count, offset } => {
                self.unfinished = true;
                if self.is_hypercall(write, port, count) {
                    return self.hypercall(io);
                }
                if !self.port(io, write, port, width, offset..offset + (width * count) as u64) {
                    return Some(self.fail(format!("KVM tells of an impossible access to port {port:#x}")));
                }
            }
            Leave::Mmio { write, gpa, mut data, length } => {
                self.unfinished = true;
                if write {
                    io.mmio_write(Gpa(gpa), &data[..length]);
                } else {
                    io.mmio_read(Gpa(gpa), &mut data[..length]);
                    self.kick.page().answer(|answer| answer.mmio.data = data);
                }
            }
            Leave::MsrRead { index } => {
                self.unfinished = true;
                let value = io.msr_read(index);
                let (error, data) = (value.is_err().into(), value.unwrap_or(0));
                self.kick.page().answer(|answer| (answer.msr.error, answer.msr.data) = (error, data));
            }
            Leave::MsrWrite { index, value } => {
                self.unfinished = true;
                if let Err(error) = self.follow_tsc() {
                    tracing::warn!(vcpu = self.config.id.0, "{error}"); // the machine may write a clock's page now
                }
                let error = io.msr_write(index, value).is_err().into();
                self.kick.page().answer(|answer| answer.msr.error = error);
            }
            Leave::EndOfInterrupt { vector } => io.end_of_interrupt(vector),
            Leave::Window | Leave::Nothing => {}
            Leave::Shutdown => {
                self.config.ledger.record(Cause::Shutdown, 0);
                return Some(Exit::Shutdown);
            }
            Leave::Internal { .. } if self.is_at_reset_vector() => {
                // INIT of the bootstrap processor: the local APIC has put it where firmware would be.
                self.config.ledger.record(Cause::Startup, 0);
                return Some(Exit::Init);
            }
            leave => return Some(self.cannot_go_on(&leave)),
        }
        None
    }

    /// An access to a port, one element after the other. False where the data is not where it should be.
    fn port(&self, io: &mut dyn CpuIo, write: bool, port: u16, width: usize, place: std::ops::Range<u64>) -> bool {
        let mut data = [0; WIDEST_PORT];
        let Some(data) = data.get_mut(..width).filter(|data| !data.is_empty()) else { return false };
        for at in place.step_by(width) {
            let page = self.kick.page();
            let there = if write {
                let there = page.copy_out(at, data);
                io.port_write(port, data);
                there
            } else {
                io.port_read(port, data);
                page.copy_in(at, data)
            };
            if !there {
                return false;
            }
        }
        true
    }

    fn is_hypercall(&self, write: bool, port: u16, count: usize) -> bool {
        write && count == 1 && self.vm.config.hypercall_port == Some(port)
    }

    /// A store to the hypercall port: number and arguments are in registers, the result goes to RAX.
    fn hypercall(&mut self, io: &mut dyn CpuIo) -> Option<Exit> {
        self.count(); // the guest can have been promised counters that are as of its last call
        let (regs, sregs) = match (self.fd.get_regs(), sys::sregs(&self.fd)) {
            (Ok(regs), Ok(sregs)) => (regs, sregs),
            _ => return Some(self.fail("KVM does not tell a vCPU's registers".into())),
        };
        let wide = sregs.efer & efer::LMA != 0 && sregs.cs.l != 0;
        let [number, args @ ..] = [regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rsi]
            .map(|value| if wide { value } else { u64::from(value as u32) });
        let result = match io.hypercall(HypercallArgs { number, args, cpl: sregs.ss.dpl, wide }) {
            Answer::Now(result) => result,
            // Behind the instruction, as the vCPU is to sleep there.
            Answer::Later => return Some(self.finish(io).unwrap_or(Exit::Waiting)),
        };
        // The registers again: the call may have taken a while, and it is RAX alone that changes.
        let set = self.fd.set_regs(&kvm_bindings::kvm_regs { rax: result, ..regs });
        set.err().map(|error| self.fail(format!("KVM refuses a hypercall's result: {error}")))
    }

    /// Does what is left of the last exit's access, so that the state is that between two instructions.
    fn finish(&mut self, io: &mut dyn CpuIo) -> Option<Exit> {
        while self.unfinished {
            self.kick.only_finish();
            let left = self.enter();
            if let Some(exit) = self.answer(io, left) {
                return Some(exit);
            }
        }
        None
    }

    fn count(&mut self) {
        self.exits = 0;
        if let Some(stats) = &mut self.stats {
            stats.add_to(&self.config.ledger);
        }
    }

    fn fail(&mut self, why: String) -> Exit {
        self.failure = Some(why);
        Exit::Failed
    }

    /// Ends the run with what KVM said, the instruction and the registers.
    fn cannot_go_on(&mut self, leave: &Leave) -> Exit {
        let what = failure::describe(leave).unwrap_or_else(|| format!("{leave:?}"));
        let told = matches!(leave, Leave::Internal { instruction, .. } if !instruction.is_empty());
        let code = if told { None } else { self.code_at_rip() };
        let code = code.map_or_else(String::new, |bytes| format!("; at RIP: {}", failure::hex(&bytes)));
        let registers =
            self.parts().map_or_else(|e| format!("(no registers: {e})"), |p| failure::registers(&p.state()));
        self.fail(format!("{what}{code}\n{registers}"))
    }

    /// The bytes that RIP points at, as the guest's page tables have them.
    fn code_at_rip(&self) -> Option<Vec<u8>> {
        let (regs, sregs) = (self.fd.get_regs().ok()?, sys::sregs(&self.fd).ok()?);
        let found =
            self.fd.translate_gva(sregs.cs.base.wrapping_add(regs.rip)).ok().filter(|found| found.valid != 0)?;
        let mut bytes = vec![0; LONGEST_INSTRUCTION];
        self.vm.ram.read(Gpa(found.physical_address), &mut bytes).ok().map(|()| bytes)
    }

    fn is_at_reset_vector(&self) -> bool {
        let (Ok(regs), Ok(sregs)) = (self.fd.get_regs(), sys::sregs(&self.fd)) else { return false };
        let reset = CpuState::reset();
        let at = (regs.rip, sregs.cs.base, sregs.cr0 & cr0::PE);
        at == (reset.rip, reset.segments[seg::CS].base, 0) && self.vm.ram.region(Gpa(at.0 + at.1)).is_none()
    }

    /// The state as the kernel has it.
    fn parts(&self) -> Result<Parts, Error> {
        let read = |e: kvm_ioctls::Error| refused("a vCPU's state", e);
        Ok(Parts {
            regs: self.fd.get_regs().map_err(read)?,
            sregs: sys::sregs(&self.fd).map_err(|e| refused("a vCPU's state", e))?,
            debug: self.fd.get_debug_regs().map_err(read)?,
            events: self.fd.get_vcpu_events().map_err(read)?,
            xcrs: self.fd.get_xcrs().map_err(read)?,
            xsave: Box::new(self.fd.get_xsave().map_err(read)?.region),
            msrs: MSRS.iter().map(|number| self.msr(*number).unwrap_or(0)).collect(),
            mp_state: self.fd.get_mp_state().map_err(read)?.mp_state,
        })
    }

    /// Has the machine know where the guest's counter really is: guests move it without an exit, and a KVM without hardware
    /// may not move it at all.
    pub(crate) fn follow_tsc(&self) -> Result<(), Error> {
        let offset = sys::tsc_offset(&self.fd).map_err(|e| refused("a time-stamp counter's offset", e))?;
        self.config.tsc.adjust(offset.wrapping_sub(self.config.tsc.offset()));
        Ok(())
    }

    pub(crate) fn set_tsc_offset(&self, offset: u64) -> Result<(), Error> {
        sys::set_tsc_offset(&self.fd, offset).map_err(|e| refused("a time-stamp counter's offset", e))
    }

    fn msr(&self, index: u32) -> Option<u64> {
        let mut msrs = Msrs::from_entries(&[kvm_msr_entry { index, ..kvm_msr_entry::default() }]).ok()?;
        (self.fd.get_msrs(&mut msrs).ok()? == 1).then(|| msrs.as_slice()[0].data)
    }

    fn set_msr(&self, index: u32, data: u64) -> bool {
        let entry = kvm_msr_entry { index, data, ..kvm_msr_entry::default() };
        Msrs::from_entries(&[entry]).is_ok_and(|msrs| self.fd.set_msrs(&msrs).is_ok_and(|done| done == 1))
    }

    fn set_parts(&self, parts: &Parts) -> Result<(), Error> {
        let impossible = |what: &'static str| move |error: kvm_ioctls::Error| impossible(what, &error);
        sys::set_sregs(&self.fd, &parts.sregs)
            .map_err(|error| self::impossible("segments and control registers", &error))?;
        self.fd.set_regs(&parts.regs).map_err(impossible("registers"))?;
        self.fd.set_xcrs(&parts.xcrs).map_err(impossible("XCR0"))?;
        // SAFETY: the models show no component beyond AVX, so that the kernel reads the 4096 bytes of the structure alone.
        unsafe { self.fd.set_xsave(&parts.kvm_xsave()) }.map_err(impossible("x87, SSE and AVX registers"))?;
        self.fd.set_debug_regs(&parts.debug).map_err(impossible("debug registers"))?;
        let reset = Parts::of(&CpuState::reset(), &parts.sregs);
        for ((number, value), unset) in MSRS.iter().zip(&parts.msrs).zip(&reset.msrs) {
            // One that the model does not have stays what it is where there is nothing to lose.
            if !self.set_msr(*number, *value) && value != unset {
                return Err(Error::State(format!("KVM does not take {value:#x} for MSR {number:#x}")));
            }
        }
        self.fd.set_vcpu_events(&parts.events).map_err(impossible("interrupt shadow and NMI blocking"))?;
        self.fd.set_mp_state(kvm_mp_state { mp_state: parts.mp_state }).map_err(impossible("activity"))
    }

    fn kernel_state(&self) -> Result<KernelState, Error> {
        let read = |e: kvm_ioctls::Error| refused("a local APIC's state", e);
        let state = self.fd.get_mp_state().map_err(read)?.mp_state;
        let known = kernel_state::MSRS.into_iter().flatten();
        Ok(KernelState {
            apic_base: sys::sregs(&self.fd).map_err(|e| refused("a local APIC's state", e))?.apic_base,
            apic: kernel_state::bytes(&self.fd.get_lapic().map_err(read)?.regs),
            waits_for_startup: matches!(state, KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED),
            event: kernel_state::event(&self.fd.get_vcpu_events().map_err(read)?),
            msrs: known.filter_map(|number| Some((number, self.msr(number)?))).collect(),
        })
    }
}

fn as_fd(fd: &VcpuFd) -> std::os::fd::BorrowedFd<'_> {
    // SAFETY: the descriptor is open for as long as `fd` is borrowed.
    unsafe { std::os::fd::BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(fd)) }
}

fn impossible(what: &'static str, error: &dyn std::fmt::Display) -> Error {
    Error::State(format!("KVM does not take the {what}: {error}"))
}

impl Vcpu for Runner {
    /// KVM_KVMCLOCK_CTRL (Linux, Documentation/virt/kvm/api.rst, 4.70). A guest without kvmclock is not to be told: EINVAL.
    fn stopped(&mut self) {
        let _ = self.fd.kvmclock_ctrl();
    }

    fn answer(&mut self, value: u64) {
        let set = self.fd.get_regs().and_then(|regs| self.fd.set_regs(&kvm_bindings::kvm_regs { rax: value, ..regs }));
        if let Err(error) = set {
            tracing::error!("KVM refuses a hypercall's result: {error}");
        }
    }

    fn doze(&mut self, io: &mut dyn CpuIo) -> Doze {
        self.sleep(io)
    }

    fn run(&mut self, io: &mut dyn CpuIo) -> Exit {
        let exit = self.run_until_exit(io);
        self.count();
        exit
    }

    fn failure(&mut self) -> Option<String> {
        self.failure.take()
    }

    fn save(&mut self) -> Box<CpuState> {
        if let Err(error) = self.follow_tsc() {
            tracing::warn!(vcpu = self.config.id.0, "{error}");
        }
        match self.parts() {
            Ok(parts) => parts.state(),
            Err(error) => {
                tracing::error!(vcpu = self.config.id.0, "the state of a vCPU is lost: {error}");
                Box::new(CpuState::reset())
            }
        }
    }

    fn load(&mut self, state: &CpuState) -> Result<(), Error> {
        let current = sys::sregs(&self.fd).map_err(|e| refused("a vCPU's state", e))?;
        self.set_tsc_offset(self.config.tsc.offset())?;
        self.follow_tsc()?;
        let mut parts = Parts::of(state, &current);
        parts.limit_components(self.vm.supported.answer(XSAVE, 0).eax);
        self.set_parts(&parts)
    }

    fn save_kernel_state(&mut self) -> Option<KernelState> {
        let state = self.kernel_state();
        state.inspect_err(|error| tracing::error!(vcpu = self.config.id.0, "{error}")).ok()
    }

    fn load_kernel_state(&mut self, state: &KernelState) -> Result<(), Error> {
        let read = |e: kvm_ioctls::Error| refused("a local APIC's state", e);
        let mut sregs = sys::sregs(&self.fd).map_err(|e| refused("a local APIC's state", e))?;
        sregs.apic_base = state.apic_base;
        sys::set_sregs(&self.fd, &sregs).map_err(|error| impossible("APIC base", &error))?;
        let apic = kvm_lapic_state { regs: kernel_state::registers(&state.apic) };
        self.fd.set_lapic(&apic).map_err(|error| impossible("local APIC", &error))?;
        for &(number, value) in &state.msrs {
            if self.msr(number) != Some(value) && !self.set_msr(number, value) {
                return Err(Error::State(format!("KVM does not take {value:#x} for MSR {number:#x}")));
            }
        }
        let events = self.fd.get_vcpu_events().map_err(read)?;
        let events = kernel_state::with_event(events, state.event);
        self.fd.set_vcpu_events(&events).map_err(|error| impossible("event in delivery", &error))?;
        if state.waits_for_startup {
            let waiting = kvm_mp_state { mp_state: KVM_MP_STATE_UNINITIALIZED };
            self.fd.set_mp_state(waiting).map_err(|error| impossible("wait for a start-up IPI", &error))?;
        }
        Ok(())
    }
}
