//! The block device (virtio 1.2, 5.2): a disk behind one queue a vCPU, each served by a thread of its own.
//!
//! ```text
//!   queue n ── chain ──> Request (header, data, status) ── checked ──> Disk::read_at / write_at on guest slices
//! ```
//!
//! Deliberately absent: geometry, secure erase, lifetime metrics, zoned disks.

mod disk;
mod request;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

pub use disk::{Access, Disk, OpenError, RawDisk, SECTOR};
use memory::Backend;
use request::Server;

use super::{Fault, Lane, LaneWork, Link, Queue, VirtioDevice, Waker, read_structure};
use crate::log_limit::LogLimit;

/// Device feature bits (virtio 1.2, 5.2.3).
mod bit {
    pub(super) const SEG_MAX: u64 = 1 << 2;
    pub(super) const READ_ONLY: u64 = 1 << 5;
    pub(super) const BLK_SIZE: u64 = 1 << 6;
    pub(super) const FLUSH: u64 = 1 << 9;
    pub(super) const TOPOLOGY: u64 = 1 << 10;
    pub(super) const CONFIG_WCE: u64 = 1 << 11;
    pub(super) const MULTI_QUEUE: u64 = 1 << 12;
    pub(super) const DISCARD: u64 = 1 << 13;
    pub(super) const WRITE_ZEROES: u64 = 1 << 14;
}

/// Offset of `writeback` in the configuration (virtio 1.2, 5.2.4).
const CONFIG_WRITEBACK: usize = 32;
/// Bytes of the configuration up to the write-zeroes fields.
const CONFIG_SIZE: usize = 60;
/// Size of each queue.
const QUEUE_SIZE: u16 = 256;
/// The most queues offered.
const MAX_QUEUES: u16 = 64;
/// The most sectors one discard segment may name: 2 GiB.
const MAX_DISCARD_SECTORS: u32 = 1 << 22;
/// The most sectors one write-zeroes segment may name: 64 MiB, as it may have to be written out.
const MAX_ZEROES_SECTORS: u32 = 1 << 17;
/// The most segments in one discard or write-zeroes request.
const MAX_SEGMENTS: u32 = 32;
/// Completions after which the driver is told, though more requests wait.
const COMPLETIONS_PER_INTERRUPT: u32 = 16;

/// What all queues of one disk share.
struct Shared {
    disk: Box<dyn Disk>,
    serial: [u8; 20],
    /// The driver's wish in the configuration; counts where CONFIG_WCE is negotiated.
    writeback: AtomicBool,
    host_errors: LogLimit,
}

/// A disk for the guest.
pub struct Block {
    shared: Arc<Shared>,
    queues: u16,
}

impl Block {
    /// `disk` with `queues` queues (at least 1; more than the guest has vCPUs are of no use). Of `serial`, the first 20
    /// bytes count.
    pub fn new(disk: Box<dyn Disk>, serial: &str, queues: u16) -> Self {
        let mut id = [0; 20];
        id.iter_mut().zip(serial.bytes()).for_each(|(target, byte)| *target = byte);
        let host_errors = LogLimit::default();
        let shared = Shared { disk, serial: id, writeback: AtomicBool::new(true), host_errors };
        Self { shared: Arc::new(shared), queues: queues.clamp(1, MAX_QUEUES) }
    }

    /// struct virtio_blk_config, little-endian.
    fn config(&self) -> [u8; CONFIG_SIZE] {
        let mut config = [0; CONFIG_SIZE];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(self.shared.disk.length() / SECTOR).to_le_bytes());
        put(12, &u32::from(QUEUE_SIZE - 2).to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        put(24, &[3, 0]); // physical blocks of 2^3 sectors, aligned
        put(26, &8u16.to_le_bytes()); // smallest good I/O: one such block
        put(CONFIG_WRITEBACK, &[u8::from(self.shared.writeback.load(Ordering::SeqCst))]);
        put(34, &self.queues.to_le_bytes());
        put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
        put(40, &MAX_SEGMENTS.to_le_bytes());
        put(44, &8u32.to_le_bytes()); // discards smaller than a host page free nothing
        put(48, &MAX_ZEROES_SECTORS.to_le_bytes());
        put(52, &MAX_SEGMENTS.to_le_bytes());
        put(56, &[1]); // write-zeroes may unmap
        config
    }
}

impl VirtioDevice for Block {
    fn kind(&self) -> u16 {
        2
    }

    fn class(&self) -> u32 {
        0x01_80_00
    }

    fn features(&self) -> u64 {
        let always = bit::SEG_MAX | bit::BLK_SIZE | bit::FLUSH | bit::TOPOLOGY | bit::CONFIG_WCE | bit::MULTI_QUEUE;
        let by_access = if self.shared.disk.is_read_only() { bit::READ_ONLY } else { bit::DISCARD | bit::WRITE_ZEROES };
        always | by_access
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; self.queues.into()]
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        read_structure(&self.config(), offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        if let (CONFIG_WRITEBACK, &[value]) = (offset, data) {
            self.shared.writeback.store(value & 1 != 0, Ordering::SeqCst);
        }
    }

    fn lanes(&mut self, link: Link) -> Vec<Lane> {
        let lane = |queue| {
            let work = Work { shared: Arc::clone(&self.shared), link: link.clone() };
            Lane { name: format!("disk-q{queue}"), queues: vec![queue], waker: Waker::new(), work: Box::new(work) }
        };
        (0..self.queues).map(lane).collect()
    }

    fn reset(&mut self) {
        self.shared.writeback.store(true, Ordering::SeqCst);
    }
}

/// One queue's work.
struct Work {
    shared: Arc<Shared>,
    link: Link,
}

impl LaneWork for Work {
    fn run(&mut self, memory: &Backend, queues: &[Arc<Queue>]) -> Result<(), Fault> {
        // Held throughout: a reset waits for requests that are under way, as their data goes straight to guest RAM.
        let Some(mut queue) = queues[0].lock() else { return Ok(()) };
        let mut untold = 0;
        while let Some(chain) = queue.pop(memory)? {
            let server = Server { shared: &self.shared, link: &self.link };
            let head = chain.head;
            let written = server.serve(chain).map_err(|fault| queue.fault(fault))?;
            queue.complete(memory, head, written)?;
            untold += 1;
            if untold == COMPLETIONS_PER_INTERRUPT {
                untold = 0;
                queue.interrupt(memory)?;
            }
        }
        queue.interrupt(memory)
    }
}

#[cfg(test)]
mod tests;
