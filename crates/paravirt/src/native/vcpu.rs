//! One vCPU's side of the dialect: its MSRs, its page, its sleep.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use contract::native::{FOREVER, call, feature, msr, offset, run_state, waited};
use engine::{Answer, Cause, Ledger, MsrRefused};
use memory::{Gpa, PAGE_SIZE};

use super::pages::{page_of, register_of};
use super::vm::Vm;
use super::wait::Ended;
use crate::processors::{Grace, Place, end_flush};

/// Vectors below are the architecture's (Intel SDM vol. 3A, 6.3.2).
pub(super) const FIRST_VECTOR: u64 = 16;

/// A vCPU in the middle of a `wait`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asleep {
    /// Go on sleeping, for this long at most.
    For(Option<Duration>),
    /// It is over: the value for RAX.
    Over(u64),
}

/// What one vCPU has agreed with the host.
pub struct Vcpu {
    pub(super) vm: Arc<Vm>,
    pub(super) index: u32,
    page: Option<Gpa>,
    /// When the present wait is over, on the host's monotonic clock as far as the guest may know it.
    deadline: Option<u64>,
    grace: Grace,
    /// vCPUs that the present call has forget their translations, and what it answers once they have.
    pub(super) flushing: Vec<usize>,
    flushed: u64,
}

impl Vcpu {
    /// vCPU `index` of a VM.
    pub fn new(vm: Arc<Vm>, index: u32) -> Self {
        Self { vm, index, page: None, deadline: None, grace: Grace::default(), flushing: Vec::new(), flushed: 0 }
    }

    /// Forgets what was agreed: the vCPU was reset or got INIT.
    pub fn reset(&mut self) {
        self.vm.waits.end(self.index, Ended::Interrupted);
        self.flushing.clear();
        self.vm.cancel_timers(self.index as usize);
        self.place().event.store(0, Ordering::SeqCst);
        self.set_page(None);
    }

    /// True for the MSRs of this dialect.
    pub fn is_msr(index: u32) -> bool {
        (msr::BASE..msr::BASE + msr::COUNT).contains(&index)
    }

    /// True for the numbers of this dialect's calls, those without a meaning included.
    pub fn is_call(number: u64) -> bool {
        number.wrapping_sub(call::BASE) <= 0xffff
    }

    /// RDMSR.
    ///
    /// # Errors
    /// [`MsrRefused`] for what [`Vcpu::is_msr`] denies.
    pub fn msr_read(&self, index: u32) -> Result<u64, MsrRefused> {
        match index.checked_sub(msr::BASE) {
            Some(msr::HYPERCALL_PAGE) => Ok(self.vm.pages.hypercall_register()),
            Some(msr::VM_PAGE) => Ok(self.vm.pages.vm_register()),
            Some(msr::VCPU_PAGE) => Ok(register_of(self.page)),
            Some(msr::EVENT) => Ok(self.place().event.load(Ordering::SeqCst).into()),
            _ => Err(MsrRefused),
        }
    }

    /// WRMSR.
    ///
    /// # Errors
    /// [`MsrRefused`] for what [`Vcpu::is_msr`] denies, for a page that is not aligned or not RAM, and for a vector of the
    /// architecture's; nothing changes then.
    pub fn msr_write(&mut self, index: u32, value: u64) -> Result<(), MsrRefused> {
        match index.checked_sub(msr::BASE) {
            Some(msr::HYPERCALL_PAGE) => {
                self.vm.pages.set_hypercall_page(page_of(&self.vm.ram, value)?, self.vm.calling);
            }
            Some(msr::VM_PAGE) => self.vm.set_vm_page(page_of(&self.vm.ram, value)?),
            Some(msr::VCPU_PAGE) => {
                let page = page_of(&self.vm.ram, value)?;
                self.set_page(page);
            }
            Some(msr::EVENT) => {
                if value != 0 && !(FIRST_VECTOR..=0xff).contains(&value) {
                    return Err(MsrRefused);
                }
                self.place().event.store(value as u8, Ordering::SeqCst);
            }
            _ => return Err(MsrRefused),
        }
        Ok(())
    }

    fn set_page(&mut self, page: Option<Gpa>) {
        self.page = page;
        if let Some(page) = page {
            // All but the version of the time, which goes on.
            let _ = self.vm.ram.fill(Gpa(page.0 + 4), 0, PAGE_SIZE - 4);
        }
        self.vm.set_vcpu_page(self.index, page);
    }

    /// Answers with `value`: now, or once those have flushed that the call is about.
    pub(super) fn after_flush(&mut self, value: u64) -> Answer {
        if self.flushing.is_empty() {
            return Answer::Now(value);
        }
        self.flushed = value;
        Answer::Later
    }

    /// Where the call that is answered later is about flushes: waits for them. The value for RAX. Out of guest code.
    pub fn finish_flush(&mut self) -> Option<u64> {
        let targets = std::mem::take(&mut self.flushing);
        end_flush(&self.vm.places, &targets);
        (!targets.is_empty()).then_some(self.flushed)
    }

    /// Sleeps until `deadline` at most.
    pub(super) fn sleep_until(&mut self, timeout: u64) {
        let now = self.vm.host.monotonic_ns();
        self.deadline = (timeout != FOREVER).then(|| now.saturating_add(timeout));
        self.set_run_state(run_state::WAITING);
    }

    /// Where a wait stands: asked before each stretch of sleep.
    pub fn asleep(&mut self) -> Asleep {
        if self.vm.waits.is_woken(self.index) {
            return Asleep::Over(self.end_wait(Ended::Interrupted));
        }
        match self.deadline.map(|deadline| self.vm.host.ns_until(deadline)) {
            Some(0) => Asleep::Over(self.end_wait(Ended::TimedOut)),
            left => Asleep::For(left.map(Duration::from_nanos)),
        }
    }

    /// Something else is for this vCPU: ends its wait. The value for RAX.
    pub fn interrupt_wait(&mut self) -> u64 {
        self.end_wait(Ended::Interrupted)
    }

    fn end_wait(&mut self, why: Ended) -> u64 {
        self.set_run_state(run_state::RUNNING);
        match self.vm.waits.end(self.index, why) {
            Ended::Woken => waited::WOKEN,
            Ended::TimedOut => waited::TIMED_OUT,
            Ended::Interrupted => waited::INTERRUPTED,
        }
    }

    /// What the vCPU does, for the others and for the guest.
    pub(crate) fn set_run_state(&self, state: u32) {
        self.place().set_run_state(state);
        if let Some(page) = self.page_for(feature::RUN_STATE) {
            let _ = self.vm.ram.write_value(Gpa(page.0 + offset::RUN_STATE), &state);
        }
    }

    /// Tells the guest whether the vCPU's thread may be without a processor.
    pub(crate) fn set_preempted(&self, preempted: bool) {
        if let Some(page) = self.page_for(feature::STEAL) {
            let _ = self.vm.ram.write_value(Gpa(page.0 + offset::PREEMPTED), &u32::from(preempted));
        }
    }

    /// True where the guest wants to know what was stolen from it.
    pub(crate) fn tells_stolen(&self) -> bool {
        self.page_for(feature::STEAL).is_some()
    }

    /// Tells it, in nanoseconds.
    pub(crate) fn tell_stolen(&self, ns: u64) {
        if let Some(page) = self.page_for(feature::STEAL) {
            let _ = self.vm.ram.write_value(Gpa(page.0 + offset::STOLEN_NS), &ns);
        }
    }

    /// Where the guest says the end of an interrupt, if anywhere.
    pub(crate) fn eoi_place(&self) -> Option<Gpa> {
        self.page_for(feature::EOI).map(|page| Gpa(page.0 + offset::EOI))
    }

    /// From now on the vCPU executes guest code, or no longer does.
    pub(crate) fn set_in_guest(&self, inside: bool) {
        self.place().set_in_guest(inside);
    }

    /// True where the guest keeps its processor although it spins: asked each time it would be given up.
    pub fn keeps_processor(&mut self) -> bool {
        let critical = self.byte(feature::CRITICAL, offset::CRITICAL) != 0;
        self.place().take_grace() || self.grace.keeps(critical)
    }

    /// True while the guest has masked interrupts by the byte in its page.
    pub fn masks_interrupts(&self) -> bool {
        self.byte(feature::INTERRUPTS, offset::IRQ_MASK) != 0
    }

    /// Tells the guest that an interrupt waits for its mask.
    pub fn note_interrupt(&self) {
        if let Some(page) = self.page_for(feature::INTERRUPTS) {
            let _ = self.vm.ram.write_value(Gpa(page.0 + offset::IRQ_PENDING), &1_u8);
        }
    }

    /// Brings the exit ledger in the page up to date.
    pub fn account(&self, ledger: &Ledger) {
        if let Some(page) = self.page_for(feature::LEDGER) {
            let counts = Cause::ALL.map(|cause| ledger.count(cause));
            let _ = self.vm.ram.write_value(Gpa(page.0 + offset::EXITS), &counts);
        }
    }

    /// The vCPU page, where there is one and `feature` is accepted.
    fn page_for(&self, feature: u64) -> Option<Gpa> {
        self.page.filter(|_| self.vm.agreement.honours(feature))
    }

    fn byte(&self, feature: u64, offset: u64) -> u8 {
        self.page_for(feature).and_then(|page| self.vm.ram.read_value(Gpa(page.0 + offset)).ok()).unwrap_or(0)
    }

    pub(super) fn place(&self) -> &Place {
        &self.vm.places[self.index as usize]
    }
}

const _: () = assert!(Cause::ALL.len() == contract::native::EXIT_CAUSES.len());
