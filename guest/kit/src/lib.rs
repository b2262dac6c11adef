//! The guest's half of the native dialect, for kernels without an operating system below them.
//!
//! ```text
//!   find ──> Found ──> Contract ──┬─> accept, terms, revocation         one a VM
//!                                 ├─> calls: wait, wake, time of day ...
//!                                 └─> Processor ──> now, timers, interrupts, exits   one a vCPU
//!   sync: Mutex, Condvar, Semaphore, SpinLock on wait-if-equal
//!   Batch: several calls in one exit
//! ```
//!
//! A kernel looks for the dialect, hands over memory for the shared pages, and accepts what it wants:
//!
//! ```no_run
//! use contract::native::feature;
//! use kit::{Contract, Shared, VcpuPage, VmMemory};
//!
//! static VM: VmMemory = VmMemory::new();
//! static PAGE: Shared<VcpuPage> = Shared::new();
//!
//! let found = kit::find_here().expect("a Cordial host");
//! // SAFETY: this kernel maps memory one to one, and runs at privilege level 0.
//! let contract = unsafe { Contract::start(found, &VM, |address| address as u64) };
//! contract.accept(feature::CLOCK | feature::WAIT)?;
//! let processor = contract.processor(&PAGE);
//! let now = processor.now(); // no exit
//! # Ok::<(), kit::Status>(())
//! ```
//!
//! The specification is docs/contract.md. Nothing here allocates, and nothing panics on what the host says.

#![no_std]

#[cfg(test)]
extern crate std;

mod batch;
mod call;
mod clock;
mod memory;
mod probe;
mod processor;
pub mod sync;
mod vm;

pub use batch::Batch;
pub use call::{Status, Waited};
pub use clock::nanoseconds;
pub use contract::native::{Terms, VcpuPage, VmPage};
pub use memory::{Shared, VmMemory};
pub use probe::{Found, find, find_here};
pub use processor::{Masked, Processor};
pub use vm::Contract;
