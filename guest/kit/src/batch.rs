//! Several calls in one exit.

use contract::native::{CallEntry, call};

use crate::call::{Status, result_of};
use crate::vm::Contract;

/// Up to `N` calls that are made together. Calls that sleep cannot be among them.
pub struct Batch<const N: usize> {
    entries: [CallEntry; N],
    length: usize,
}

impl<const N: usize> Batch<N> {
    /// No calls.
    pub const fn new() -> Self {
        Self { entries: [CallEntry { number: 0, args: [0; 4], result: 0 }; N], length: 0 }
    }

    /// A timer, as [`Processor::set_timer`](crate::Processor::set_timer). False where the batch is full.
    pub fn set_timer(&mut self, contract: &Contract, timer: u32, deadline: u64, slack: u64, vector: u8) -> bool {
        self.push(contract.number(call::SET_TIMER), [timer.into(), deadline.max(1), slack, vector.into()])
    }

    /// An interrupt, as [`Contract::send_ipi`]. False where the batch is full.
    pub fn send_ipi(&mut self, contract: &Contract, vector: u8, first: u32, mask: u64) -> bool {
        self.push(contract.number(call::SEND_IPI), [vector.into(), first.into(), mask, 0])
    }

    fn push(&mut self, number: u64, args: [u64; 4]) -> bool {
        let Some(entry) = self.entries.get_mut(self.length) else { return false };
        *entry = CallEntry { number, args, result: 0 };
        self.length += 1;
        true
    }

    /// Makes the calls, in order; how many succeeded. One exit. The batch is empty afterwards, but for
    /// [`Batch::result`].
    ///
    /// # Errors
    /// [`Status::TooLong`] beyond the host's limit; none is made then.
    pub fn run(&mut self, contract: &Contract) -> Result<u64, Status> {
        let length = core::mem::take(&mut self.length);
        contract.multicall(&mut self.entries[..length])
    }

    /// What the call pushed as number `index` came to.
    pub fn result(&self, index: usize) -> Option<Result<u64, Status>> {
        self.entries.get(index).map(|entry| result_of(entry.result as u64))
    }
}

impl<const N: usize> Default for Batch<N> {
    fn default() -> Self {
        Self::new()
    }
}
