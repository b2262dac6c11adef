//! One vCPU's side of the contract.

use core::mem::offset_of;

use contract::kvm::{TIME_INFO_STOPPED, TimeInfo};
use contract::native::{EXIT_CAUSES, VcpuPage, call, feature};

use crate::call::Status;
use crate::clock;
use crate::memory::Shared;
use crate::vm::Contract;

/// The contract of the vCPU that executes this.
#[derive(Clone, Copy)]
pub struct Processor<'a> {
    contract: &'a Contract,
    page: &'static Shared<VcpuPage>,
}

impl<'a> Processor<'a> {
    pub(crate) fn new(contract: &'a Contract, page: &'static Shared<VcpuPage>) -> Self {
        Self { contract, page }
    }

    /// Nanoseconds since the VM started; zero where the clock is not accepted. No exit.
    pub fn now(&self) -> u64 {
        clock::now(self.page)
    }

    /// True where the host had this vCPU stand still since this was last asked: time went on, and who waited is not to blame.
    /// No exit.
    pub fn stood_still(&self) -> bool {
        let place = offset_of!(TimeInfo, flags);
        let flags: u8 = self.page.read(place);
        let stood = flags & TIME_INFO_STOPPED != 0;
        if stood {
            self.page.write(place, flags & !TIME_INFO_STOPPED);
        }
        stood
    }

    /// Raises `vector` on this vCPU at `deadline` (on the clock of [`Processor::now`]), or up to `slack` later. One exit.
    ///
    /// # Errors
    /// [`Status::BadArgument`] for a timer beyond the limit, or a vector below 16.
    pub fn set_timer(&self, timer: u32, deadline: u64, slack: u64, vector: u8) -> Result<bool, Status> {
        let deadline = deadline.max(1); // 0 would cancel
        self.contract.call(call::SET_TIMER, [timer.into(), deadline, slack, vector.into()]).map(|armed| armed != 0)
    }

    /// Cancels a timer; true where it was armed. One exit.
    ///
    /// # Errors
    /// [`Status::BadArgument`] for a timer beyond the limit.
    pub fn cancel_timer(&self, timer: u32) -> Result<bool, Status> {
        self.contract.call(call::SET_TIMER, [timer.into(), 0, 0, 0]).map(|armed| armed != 0)
    }

    /// Holds back maskable interrupts of this vCPU until the guard goes: a store each way, and an exit only where one came
    /// meanwhile. Guards nest.
    pub fn mask(&self) -> Masked<'a> {
        let before = self.page.read(offset_of!(VcpuPage, irq_mask));
        self.page.write(offset_of!(VcpuPage, irq_mask), 1_u8);
        Masked { processor: *self, before }
    }

    /// True where an interrupt waits for the mask to go. No exit.
    pub fn interrupt_waits(&self) -> bool {
        self.page.read::<u8>(offset_of!(VcpuPage, irq_pending)) != 0
    }

    /// Ends the interrupt in service. No exit where the host has said that it needs none; else one.
    ///
    /// # Errors
    /// [`Status::NotAccepted`] where it needs one, and `interrupts` is not in use.
    pub fn ack(&self) -> Result<(), Status> {
        if self.contract.uses(feature::EOI) && self.page.take(offset_of!(VcpuPage, eoi)) != 0 {
            return Ok(());
        }
        self.contract.call(call::ACK, [0; 4]).map(drop)
    }

    /// While `work` runs, this vCPU holds what others wait for: the host leaves it its processor for a bounded while. No exit.
    pub fn critical<R>(&self, work: impl FnOnce() -> R) -> R {
        let place = offset_of!(VcpuPage, critical);
        let before: u8 = self.page.read(place);
        self.page.write(place, 1_u8);
        let result = work();
        self.page.write(place, before);
        result
    }

    /// Nanoseconds in which this vCPU could have run and had no processor, as of a moment ago. No exit.
    pub fn stolen_ns(&self) -> u64 {
        self.page.read(offset_of!(VcpuPage, stolen_ns))
    }

    /// One of `contract::native::run_state`. No exit.
    pub fn run_state(&self) -> u32 {
        self.page.read(offset_of!(VcpuPage, run_state))
    }

    /// How often this vCPU has left for each of `contract::native::EXIT_CAUSES`; up to date behind
    /// [`Contract::sync`]. No exit.
    pub fn exits(&self) -> [u64; EXIT_CAUSES.len()] {
        core::array::from_fn(|cause| self.page.read(offset_of!(VcpuPage, exits) + cause * 8))
    }
}

/// Maskable interrupts wait while this is there.
#[must_use]
pub struct Masked<'a> {
    processor: Processor<'a>,
    before: u8,
}

impl Drop for Masked<'_> {
    fn drop(&mut self) {
        let page = self.processor.page;
        page.write(offset_of!(VcpuPage, irq_mask), self.before);
        if self.before == 0 && self.processor.interrupt_waits() {
            page.write(offset_of!(VcpuPage, irq_pending), 0_u8);
            if self.processor.contract.uses(feature::INTERRUPTS) {
                let _ = self.processor.contract.open_window(); // given up meanwhile: delivered anyway
            }
        }
    }
}
