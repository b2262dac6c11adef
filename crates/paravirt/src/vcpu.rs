//! One vCPU's side of the contract: the kvm dialect, and the native one where it is spoken. What both have is here: sleep,
//! stolen time, and the end of an interrupt without an exit (`eoi`).

use std::sync::Arc;

use contract::kvm::EOI_PENDING;
use contract::native::run_state;
use engine::{Answer, HypercallArgs, Ledger, MsrRefused};
use host::RunDelay;
use memory::Gpa;

use crate::eoi::Ends;
use crate::kvm::Reply;
use crate::stolen::Stolen;
use crate::{Features, KvmUsage, eoi, kvm, native};

/// What one vCPU has agreed with the host.
pub struct Vcpu {
    vm: Arc<kvm::Vm>,
    index: u32,
    kvm: kvm::Vcpu,
    /// Absent where the dialect is not spoken.
    native: Option<native::Vcpu>,
    stolen: Stolen,
    /// Where the guest may say that the interrupt in service has ended.
    offered: Option<Gpa>,
}

impl Vcpu {
    /// vCPU `index` of a VM, whose thread waits for processors as `delay` says; with the native dialect where there is
    /// `native`.
    pub fn new(index: u32, vm: Arc<kvm::Vm>, delay: Box<dyn RunDelay>, native: Option<native::Vcpu>) -> Self {
        let stolen = Stolen::new(Arc::clone(&vm.host), delay);
        let kvm = kvm::Vcpu::new(Arc::clone(&vm), index);
        Self { vm, index, kvm, native, stolen, offered: None }
    }

    /// What this vCPU does with the kvm dialect.
    pub fn usage(&self) -> &Arc<KvmUsage> {
        self.kvm.usage()
    }

    /// The native dialect's side.
    pub fn native(&mut self) -> Option<&mut native::Vcpu> {
        self.native.as_mut()
    }

    /// Forgets what was agreed: the vCPU was reset or got INIT.
    pub fn reset(&mut self) {
        self.offered = None; // what was in service is gone
        self.kvm.reset();
        if let Some(native) = &mut self.native {
            native.reset();
        }
    }

    /// RDMSR.
    ///
    /// # Errors
    /// [`MsrRefused`] for every MSR that is not a dialect's or not offered.
    pub fn msr_read(&self, index: u32) -> Result<u64, MsrRefused> {
        match &self.native {
            Some(native) if native::Vcpu::is_msr(index) => native.msr_read(index),
            _ => self.kvm.msr_read(index),
        }
    }

    /// WRMSR.
    ///
    /// # Errors
    /// [`MsrRefused`] for every MSR that is not a dialect's or not offered, and for a value that it does not take: bits that
    /// are reserved, an address that is not aligned or not RAM; nothing changes then.
    pub fn msr_write(&mut self, index: u32, value: u64) -> Result<(), MsrRefused> {
        self.hear_end(); // the byte may be about to move
        match &mut self.native {
            Some(native) if native::Vcpu::is_msr(index) => native.msr_write(index, value),
            _ => self.kvm.msr_write(index, value),
        }?;
        self.stolen.forget();
        self.tell_stolen();
        Ok(())
    }

    /// VMCALL or VMMCALL.
    pub fn hypercall(&mut self, call: HypercallArgs) -> Answer {
        let of_native = native::Vcpu::is_call(call.number) || self.vm.features == Features::NONE;
        if of_native && self.native.is_some() {
            self.hear_end(); // it may be about the end of an interrupt, or about the offer
        }
        if let Some(native) = self.native.as_mut().filter(|_| of_native) {
            return native.hypercall(call);
        }
        let value = match self.kvm.hypercall(call) {
            Reply::Value(value) => value,
            Reply::Yield => {
                self.give_way();
                0
            }
        };
        Answer::Now(value as u64)
    }

    /// The clock's pages are to be written anew: a TSC was moved.
    pub fn tsc_moved(&self) {
        self.vm.clock.tsc_moved();
    }

    /// The vCPU has stood still, and time has not.
    pub fn stopped(&self) {
        self.vm.clock.stopped(self.index);
    }

    /// From now on the vCPU executes guest code; what it has left for so far is in `ledger`.
    pub fn enter_guest(&self, ledger: &Ledger) {
        if let Some(native) = &self.native {
            native.account(ledger);
            native.set_in_guest(true);
        }
    }

    /// It no longer does.
    pub fn leave_guest(&self) {
        if let Some(native) = &self.native {
            native.set_in_guest(false);
        }
    }

    /// The vCPU sleeps in HLT, or no longer does.
    pub fn set_halted(&mut self, halted: bool) {
        let state = if halted { run_state::HALTED } else { run_state::RUNNING };
        match &self.native {
            Some(native) => native.set_run_state(state),
            None => self.vm.places[self.index as usize].set_run_state(state),
        }
        if halted { self.go_away() } else { self.come_back() }
    }

    /// The vCPU's thread is about to sleep, or to give its processor up. Guests see threads that the host's scheduler
    /// preempts as running: nobody tells the monitor.
    pub fn go_away(&self) {
        self.kvm.go_away();
        if let Some(native) = &self.native {
            native.set_preempted(true);
        }
    }

    /// It runs again.
    pub fn come_back(&mut self) {
        self.kvm.come_back();
        if let Some(native) = &self.native {
            native.set_preempted(false);
        }
        self.tell_stolen();
    }

    /// Lets somebody else have the processor.
    pub fn give_way(&mut self) {
        self.go_away();
        std::thread::yield_now();
        self.come_back();
    }

    /// To be called before anybody looks for an interrupt to deliver: brings the local APIC and the guest's stolen time up to
    /// date.
    #[inline]
    pub fn before_interrupt(&mut self) {
        self.hear_end();
        self.tell_stolen();
    }

    /// To be called before the vCPU's local APIC is accessed: the end that the guest has said in memory reaches it.
    #[inline]
    pub fn hear_end(&mut self) {
        if let Some(place) = self.offered.take() {
            self.hear_end_at(place);
        }
    }

    #[cold]
    fn hear_end_at(&self, place: Gpa) {
        eoi::hear(self, place);
    }

    /// True where the guest can say the end of an interrupt in memory.
    pub fn can_end_in_memory(&self) -> bool {
        self.place().is_some()
    }

    /// The interrupt that is being delivered may end in memory.
    pub fn offer_end(&mut self) {
        self.offered = eoi::offer(self);
    }

    #[inline]
    fn tell_stolen(&mut self) {
        let told = self.kvm.steal_time().is_some() || self.native.as_ref().is_some_and(native::Vcpu::tells_stolen);
        if told && let Some(ns) = self.stolen.news() {
            self.kvm.tell_stolen(ns);
            if let Some(native) = &self.native {
                native.tell_stolen(ns);
            }
        }
    }
}

impl Ends for Vcpu {
    type Place = Gpa;

    /// One byte at a time: the kvm dialect's where the guest has named one there.
    fn place(&self) -> Option<Gpa> {
        self.kvm.eoi_place().or_else(|| self.native.as_ref()?.eoi_place())
    }

    fn is_set(&self, place: Gpa) -> bool {
        !self.vm.ram.read_value::<u8>(place).is_ok_and(|byte| byte & EOI_PENDING == 0)
    }

    fn set(&self, place: Gpa, set: bool) {
        let _ = self.vm.ram.write_value(place, if set { &EOI_PENDING } else { &0 });
    }

    fn end(&self) {
        self.vm.interrupts.end(self.index);
    }
}
