//! The VM's side of the contract: what is agreed, and the calls.
#![allow(unsafe_code)] // registers pages with the host, and calls it

use core::mem::offset_of;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use contract::native::{ANY, CallEntry, FOREVER, FlushRange, Terms, VcpuPage, VmPage, call as number, msr, waited};

use crate::call::{Status, Waited, call, result_of, write_msr};
use crate::memory::{Shared, VmMemory};
use crate::probe::Found;
use crate::processor::Processor;
use crate::sync::Waiting;

/// A VM's contract with its host.
pub struct Contract {
    found: Found,
    memory: &'static VmMemory,
    physical: fn(usize) -> u64,
    /// What we use: accepted, and not given up.
    used: AtomicU64,
}

impl Contract {
    /// Registers the VM's pages with the host. `physical` says where in guest-physical memory an address of ours is.
    ///
    /// # Safety
    /// Privilege level 0; `physical` is right for every object handed to this kit, each of which lies in RAM, in one piece,
    /// and stays; `memory` may be executed, and is used by no other contract.
    pub unsafe fn start(found: Found, memory: &'static VmMemory, physical: fn(usize) -> u64) -> Self {
        let contract = Self { found, memory, physical, used: AtomicU64::new(0) };
        let pages = [(msr::HYPERCALL_PAGE, memory.calls.address()), (msr::VM_PAGE, memory.vm.address())];
        for (register, address) in pages {
            // SAFETY: by the caller's promise the host is told of memory that is there for it.
            unsafe { contract.set(register, physical(address) | msr::PAGE_ENABLE) };
        }
        contract
    }

    /// Where the calling sequence is, which the host has filled in.
    pub fn calling_page(&self) -> usize {
        self.memory.calls.address()
    }

    /// What was found.
    pub fn found(&self) -> &Found {
        &self.found
    }

    /// Accepts features as well; the epoch.
    ///
    /// # Errors
    /// [`Status::NotOffered`] for any that is not; then none is accepted.
    pub fn accept(&self, features: u64) -> Result<u64, Status> {
        let epoch = self.call(number::ACCEPT, [features, 0, 0, 0])?;
        self.used.fetch_or(features, Ordering::SeqCst);
        Ok(epoch)
    }

    /// True where all of `features` are accepted and not given up.
    pub fn uses(&self, features: u64) -> bool {
        self.used.load(Ordering::Relaxed) & features == features
    }

    /// What the VM page says. No exit.
    pub fn terms(&self) -> Terms {
        let page = &self.memory.vm;
        loop {
            if let Some(terms) = Terms::read(|at| page.read(at), |at| page.read(at)) {
                return terms;
            }
            core::hint::spin_loop();
        }
    }

    /// How often the host woke up to raise timers, and how many it raised. No exit.
    pub fn timer_counts(&self) -> (u64, u64) {
        let page = &self.memory.vm;
        (page.read(offset_of!(VmPage, timer_wakeups)), page.read(offset_of!(VmPage, timers_raised)))
    }

    /// Gives up what the host revokes: to be called at the notification event, or now and then. `give_up` is told which
    /// features, after [`Contract::uses`] has stopped saying so and before the host is told; when it returns, nobody uses
    /// them. Returns what was given up.
    ///
    /// # Errors
    /// What the host said to the acknowledgement, but for an epoch that has moved on: then the news is looked at again.
    pub fn handle_revocation(&self, mut give_up: impl FnMut(u64)) -> Result<u64, Status> {
        let mut given_up = 0;
        loop {
            let terms = self.terms();
            if terms.revoking == 0 {
                return Ok(given_up);
            }
            self.used.fetch_and(!terms.revoking, Ordering::SeqCst);
            give_up(terms.revoking & !given_up);
            given_up |= terms.revoking;
            match self.call(number::REVOKE_ACK, [terms.epoch, 0, 0, 0]) {
                Ok(_) | Err(Status::StaleEpoch) => {}
                Err(status) => return Err(status),
            }
        }
    }

    /// The contract of the vCPU that calls this, with its page.
    pub fn processor(&self, page: &'static Shared<VcpuPage>) -> Processor<'_> {
        // SAFETY: `start`'s caller promised that `physical` is right; the page is for the host.
        unsafe { self.set(msr::VCPU_PAGE, (self.physical)(page.address()) | msr::PAGE_ENABLE) };
        Processor::new(self, page)
    }

    /// Has this vCPU get `vector` when the VM page has news; 0 for not any more.
    ///
    /// # Errors
    /// [`Status::BadArgument`] for 1 to 15, which are the architecture's.
    pub fn set_event(&self, vector: u8) -> Result<(), Status> {
        if (1..16).contains(&vector) {
            return Err(Status::BadArgument);
        }
        // SAFETY: a vector that the kernel asks for.
        unsafe { self.set(msr::EVENT, vector.into()) };
        Ok(())
    }

    /// The time of day, nanoseconds since 1970-01-01 UTC, as fine as the host's policy. One exit.
    ///
    /// # Errors
    /// [`Status::TooOften`] beyond the policy's rate.
    pub fn time_of_day(&self) -> Result<u64, Status> {
        self.call(number::TIME_OF_DAY, [0; 4])
    }

    /// Nothing, but the exit ledger is up to date behind it. One exit.
    pub fn sync(&self) {
        let _ = self.call(number::NOP, [0; 4]); // cannot fail at privilege level 0
    }

    /// Has the host look for interrupts that could not be delivered while they were masked: what the end of
    /// [`Processor::mask`] does where one came. One exit.
    ///
    /// # Errors
    /// [`Status::NotAccepted`] where the feature is not in use.
    pub fn open_window(&self) -> Result<(), Status> {
        self.call(number::IRQ_WINDOW, [0; 4]).map(drop)
    }

    /// Gives the processor to `vcpu`, or to whoever can use it. True where it was given. One exit.
    ///
    /// # Errors
    /// [`Status::NoVcpu`] where there is none.
    pub fn yield_to(&self, vcpu: Option<u32>) -> Result<bool, Status> {
        self.call(number::YIELD_TO, [vcpu.map_or(ANY, u64::from), 0, 0, 0]).map(|given| given != 0)
    }

    /// Has `vcpu` keep its processor for a bounded while. One exit.
    ///
    /// # Errors
    /// [`Status::NoVcpu`] where there is none.
    pub fn boost(&self, vcpu: u32) -> Result<(), Status> {
        self.call(number::BOOST, [vcpu.into(), 0, 0, 0]).map(drop)
    }

    /// Interrupts the vCPUs `first + n` for each bit n of `mask`. One exit, however many.
    ///
    /// # Errors
    /// [`Status::NoVcpu`], [`Status::BadArgument`]; nobody is interrupted then.
    pub fn send_ipi(&self, vector: u8, first: u32, mask: u64) -> Result<u64, Status> {
        self.call(number::SEND_IPI, [vector.into(), first.into(), mask, 0])
    }

    /// Has those vCPUs forget translations of `ranges`, or all where there are none. One exit, however many.
    ///
    /// # Errors
    /// [`Status::NoVcpu`], [`Status::TooLong`], [`Status::BadArgument`]; nothing is forgotten then.
    pub fn flush_tlb(&self, first: u32, mask: u64, ranges: &[FlushRange]) -> Result<u64, Status> {
        let list = if ranges.is_empty() { 0 } else { (self.physical)(ranges.as_ptr() as usize) };
        self.call(number::FLUSH_TLB, [mask, first.into(), list, ranges.len() as u64])
    }

    /// Sleeps while `word` holds `expected`, `timeout` nanoseconds at most. One exit.
    ///
    /// # Errors
    /// [`Status::NotAccepted`] where the feature is not in use.
    pub fn wait(&self, word: &AtomicU32, expected: u32, timeout: Option<u64>) -> Result<Waited, Status> {
        let args = [self.physical_of(word), expected.into(), timeout.unwrap_or(FOREVER), 0];
        Ok(match self.call(number::WAIT, args)? {
            waited::WOKEN => Waited::Woken,
            waited::DIFFERED => Waited::Differed,
            waited::TIMED_OUT => Waited::TimedOut,
            _ => Waited::Interrupted,
        })
    }

    /// Wakes up to `most` vCPUs that wait for `word`; how many. One exit.
    ///
    /// # Errors
    /// [`Status::NotAccepted`] where the feature is not in use.
    pub fn wake(&self, word: &AtomicU32, most: u64) -> Result<u64, Status> {
        self.call(number::WAKE, [self.physical_of(word), most, 0, 0])
    }

    /// Makes several calls in one exit; how many succeeded. Their results are in the entries.
    pub(crate) fn multicall(&self, entries: &mut [CallEntry]) -> Result<u64, Status> {
        let list = (self.physical)(entries.as_mut_ptr() as usize);
        self.call(number::MULTICALL, [list, entries.len() as u64, 0, 0])
    }

    /// Any call, by its number in `contract::native::call`.
    ///
    /// # Errors
    /// What the host says.
    pub(crate) fn call(&self, number: u64, args: [u64; 4]) -> Result<u64, Status> {
        // SAFETY: `start` had the host fill the page. Callers name memory of ours that is for the host to use.
        let rax = unsafe { call(self.memory.calls.address(), u64::from(self.found.calls) + number, args) };
        result_of(rax)
    }

    /// The number by which a call of an entry goes.
    pub(crate) fn number(&self, call: u64) -> u64 {
        u64::from(self.found.calls) + call
    }

    fn physical_of(&self, word: &AtomicU32) -> u64 {
        (self.physical)(word.as_ptr() as usize)
    }

    /// # Safety
    /// As [`write_msr`].
    unsafe fn set(&self, register: u32, value: u64) {
        // SAFETY: by the caller's promise.
        unsafe { write_msr(self.found.msrs + register, value) };
    }
}

impl Waiting for Contract {
    fn wait(&self, word: &AtomicU32, expected: u32) {
        // Where the feature is revoked, sleeping becomes spinning; whoever waits looks at its word again.
        if !self.uses(contract::native::feature::WAIT) || Contract::wait(self, word, expected, None).is_err() {
            core::hint::spin_loop();
        }
    }

    fn wake(&self, word: &AtomicU32, most: u64) {
        if self.uses(contract::native::feature::WAIT) {
            let _ = Contract::wake(self, word, most);
        }
    }
}
