//! virtio 1.2 devices on PCI: the transport, its virtqueues, and a console, a block device and an entropy source.
//!
//! ```text
//!  vCPU ── common cfg, status, notify ──> VirtioPci ── kick ──> Lane thread ── pop ──> Queue ──> guest RAM
//!                                            │                     │  ▲                  │
//!                                            └── reset, enable ────┼──┼──────────────────┤
//!                                                                  ▼  │ wake             ▼
//!                                                       device's work (console, block, …)   MSI-X / INTx
//! ```
//!
//! A kick only wakes a thread; the vCPU goes on. The thread drains the queue, so one kick may stand for many requests
//! and one interrupt for many completions; [`Counters`] tells how many. A device is a [`VirtioDevice`]: what it is, its
//! configuration bytes, and the [`Lane`]s that serve its queues.
//!
//! What a driver does wrong in a ring or a request is a [`Fault`]: the device sets DEVICE_NEEDS_RESET, says so once,
//! and touches nothing until it is reset.
//!
//! Neighbours: [`crate::pci`] below; the machine makes devices and reads their [`Handle`]s. Deliberately absent: the
//! legacy and transitional interface, packed rings, MMIO (comes with the Firecracker persona).

use std::os::fd::BorrowedFd;

use memory::Gpa;

pub mod block;
mod chain;
pub mod console;
mod counters;
pub mod entropy;
mod lane;
mod queue;
mod state;
mod transport;

pub use chain::{Chain, Segments, Slice};
pub use counters::{CounterValues, Counters};
pub use lane::{Lane, LaneWork, Waker};
pub use queue::{Fault, Queue, RunningQueue};
pub use state::Link;
pub use transport::{Handle, VirtioPci};

/// Feature bits every device here offers or checks (virtio 1.2, 6).
pub mod feature {
    /// VIRTIO_F_INDIRECT_DESC: a descriptor may point to a table of descriptors.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// VIRTIO_F_EVENT_IDX: each side says when it wants to hear from the other.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// VIRTIO_F_VERSION_1: not a legacy driver.
    pub const VERSION_1: u64 = 1 << 32;
    /// VIRTIO_F_RING_RESET: queues can be reset one at a time.
    pub const RING_RESET: u64 = 1 << 40;
}

/// An engine's way of counting stores without telling of them; the machine brings it.
pub trait Doorbells: Send + Sync {
    /// From now on, a store to `gpa` adds one to the eventfd `counter` and is told nobody. False where that is refused.
    fn attach(&self, gpa: Gpa, counter: BorrowedFd) -> bool;
    /// Takes that back.
    fn detach(&self, gpa: Gpa, counter: BorrowedFd);
}

/// What a virtio device is, apart from how it is reached.
pub trait VirtioDevice: Send {
    /// Device type (virtio 1.2, 5), 1..=0x3f.
    fn kind(&self) -> u16;

    /// PCI class code, 0xCCSSPP.
    fn class(&self) -> u32;

    /// The device-specific feature bits it offers.
    fn features(&self) -> u64;

    /// The largest size of each of its queues, each a power of two.
    fn queue_sizes(&self) -> Vec<u16>;

    /// Reads its configuration structure; past its end reads as zero.
    fn read_config(&self, offset: usize, data: &mut [u8]);

    /// The driver writes to its configuration structure.
    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}

    /// The threads that serve its queues, each queue in exactly one. Called once.
    fn lanes(&mut self, link: Link) -> Vec<Lane>;

    /// The driver reset the device: back to the state it started in. No lane holds a queue at this moment.
    fn reset(&mut self) {}
}

/// Copies what lies at `offset` of a configuration structure; zero past its end.
fn read_structure(structure: &[u8], offset: usize, data: &mut [u8]) {
    for (index, byte) in data.iter_mut().enumerate() {
        *byte = structure.get(offset + index).copied().unwrap_or(0);
    }
}

#[cfg(test)]
mod malformed_tests;
#[cfg(test)]
mod test_driver;
