//! A virtqueue: what the driver programmed, checked once, and the requests that come out of it.
//!
//! ```text
//!   disabled ── enable (checked) ──> enabled ── device running ──> pop, complete, interrupt
//!      ▲                                │
//!      └────── queue or device reset ───┘   (waits for whoever holds the queue)
//! ```
//!
//! While the function is no bus master, an enabled queue rests: nothing of it is read or written.

use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memory::Backend;
use virtio_queue::{QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::state::DeviceState;
use super::{Chain, feature};

/// VIRTQ_AVAIL_F_NO_INTERRUPT: the driver polls.
const NO_INTERRUPT: u16 = 1;
/// VIRTIO_MSI_NO_VECTOR: no interrupt for this.
pub(super) const NO_VECTOR: u16 = 0xffff;

/// What a driver did that its device cannot serve. The device needs a reset.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Fault {
    /// The queue was enabled with an impossible size.
    #[error("queue size {size} is not a power of two up to {max}")]
    Size {
        /// What the driver chose.
        size: u16,
        /// The most the device offers.
        max: u16,
    },
    /// A ring is not aligned as virtio 1.2, 2.7 wants it.
    #[error("{ring} at {address:#x} is not aligned")]
    Alignment {
        /// Which part.
        ring: &'static str,
        /// Where the driver put it.
        address: u64,
    },
    /// A ring lies outside guest RAM.
    #[error("{ring} at {address:#x} is not in guest memory")]
    Ring {
        /// Which part.
        ring: &'static str,
        /// Where the driver put it.
        address: u64,
    },
    /// The available index is more than a queue's worth ahead.
    #[error("available index jumped by more than the queue size")]
    AvailableIndex,
    /// The available ring names a descriptor that is not there.
    #[error("descriptor {head} is past the queue's {size}")]
    Head {
        /// What the available ring says.
        head: u16,
        /// The queue's size.
        size: u16,
    },
    /// A chain that does not end: a cycle, a wild index, or an indirect table that is nested, ill-sized or elsewhere.
    #[error("descriptor chain does not end")]
    BrokenChain,
    /// More descriptors than the device serves.
    #[error("descriptor chain is too long")]
    ChainTooLong,
    /// A descriptor of no bytes.
    #[error("descriptor of zero length")]
    ZeroLength,
    /// A buffer outside guest RAM.
    #[error("buffer of {length:#x} bytes at {address:#x} is not in guest memory")]
    Address {
        /// First byte.
        address: u64,
        /// Bytes.
        length: u32,
    },
    /// Device-readable after device-writable descriptors (virtio 1.2, 2.7.4.2).
    #[error("readable descriptor after a writable one")]
    ReadableAfterWritable,
    /// The chain does not hold what this kind of device needs.
    #[error("malformed request: {0}")]
    Request(&'static str),
    /// Guest RAM refused an access to a ring that was checked before.
    #[error("ring access failed: {0}")]
    Access(String),
}

impl From<virtio_queue::Error> for Fault {
    fn from(error: virtio_queue::Error) -> Self {
        match error {
            virtio_queue::Error::InvalidAvailRingIndex => Self::AvailableIndex,
            other => Self::Access(other.to_string()),
        }
    }
}

/// What the driver writes into the common configuration before it enables a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct QueueRegisters {
    pub(super) size: u16,
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
}

impl QueueRegisters {
    /// The state after reset.
    pub(super) fn new(max_size: u16) -> Self {
        Self { size: max_size, descriptors: 0, available: 0, used: 0 }
    }

    /// Checks all of it against virtio 1.2, 2.7 and the guest's RAM.
    fn check(&self, max: u16, memory: &Backend) -> Result<(), Fault> {
        let size = self.size;
        if !size.is_power_of_two() || size > max {
            return Err(Fault::Size { size, max });
        }
        let entries = usize::from(size);
        let rings = [
            ("descriptor table", self.descriptors, 16, 16 * entries),
            ("available ring", self.available, 2, 6 + 2 * entries),
            ("used ring", self.used, 4, 6 + 8 * entries),
        ];
        for (ring, address, alignment, bytes) in rings {
            if address % alignment != 0 {
                return Err(Fault::Alignment { ring, address });
            }
            // The library takes an available ring at 0 for an unset one, so no ring may live there.
            let in_space = address != 0 && address.checked_add(bytes as u64).is_some();
            if !in_space || !memory.check_range(GuestAddress(address), bytes) {
                return Err(Fault::Ring { ring, address });
            }
        }
        Ok(())
    }
}

struct Inner {
    ring: Option<virtio_queue::Queue>,
    /// The driver was told not to kick.
    quiet: bool,
    /// Requests have been completed since the last look at whether the driver wants to know.
    untold: bool,
}

/// One virtqueue of a device, shared by the transport and the lane that serves it.
pub struct Queue {
    inner: Mutex<Inner>,
    max_size: u16,
    vector: AtomicU16,
    /// Moves whenever the queue is enabled: requests of an older life must not be completed.
    life: AtomicU64,
    device: Arc<DeviceState>,
}

impl Queue {
    pub(super) fn new(max_size: u16, device: Arc<DeviceState>) -> Self {
        let inner = Mutex::new(Inner { ring: None, quiet: false, untold: false });
        Self { inner, max_size, vector: AtomicU16::new(NO_VECTOR), life: AtomicU64::new(0), device }
    }

    fn lock_inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The largest size offered.
    pub(super) fn max_size(&self) -> u16 {
        self.max_size
    }

    /// The MSI-X vector of this queue.
    pub(super) fn vector(&self) -> u16 {
        self.vector.load(Ordering::SeqCst)
    }

    pub(super) fn set_vector(&self, vector: u16) {
        self.vector.store(vector, Ordering::SeqCst);
    }

    /// True between enable and reset.
    pub(super) fn is_enabled(&self) -> bool {
        self.lock_inner().ring.is_some()
    }

    /// Starts the queue as the driver programmed it.
    pub(super) fn enable(&self, registers: &QueueRegisters, memory: &Backend) {
        let mut inner = self.lock_inner();
        let ring = registers.check(self.max_size, memory).and_then(|()| {
            let state = QueueState {
                max_size: self.max_size,
                next_avail: 0,
                next_used: 0,
                event_idx_enabled: self.device.features() & feature::EVENT_IDX != 0,
                size: registers.size,
                ready: true,
                desc_table: registers.descriptors,
                avail_ring: registers.available,
                used_ring: registers.used,
            };
            Ok(virtio_queue::Queue::try_from(state)?)
        });
        match ring {
            Ok(ring) => {
                self.life.fetch_add(1, Ordering::SeqCst);
                *inner = Inner { ring: Some(ring), quiet: false, untold: false };
            }
            Err(fault) => self.device.fail(&fault),
        }
    }

    /// Stops the queue and waits until nobody uses it any more.
    pub(super) fn disable(&self) {
        self.lock_inner().ring = None;
        self.set_vector(NO_VECTOR);
    }

    /// Waits until nobody uses the queue. Who takes it afterwards sees what the device's state was before.
    pub(super) fn settle(&self) {
        drop(self.lock_inner());
    }

    /// Gives back the request popped last, to be popped again: the device may not finish it now. Nothing happens where
    /// the queue has begun another life than `life`.
    pub fn put_back(&self, life: u64) {
        let mut inner = self.lock_inner();
        if let Some(ring) = &mut inner.ring
            && self.life.load(Ordering::SeqCst) == life
        {
            ring.set_next_avail(ring.next_avail().wrapping_sub(1));
        }
    }

    /// Takes the queue for a while; `None` where it is not enabled or its device must not serve it.
    pub fn lock(&self) -> Option<RunningQueue<'_>> {
        let inner = self.lock_inner();
        (inner.ring.is_some() && self.device.serves()).then_some(RunningQueue { inner, queue: self })
    }
}

/// A queue in use. While it is held, the driver's reset of the queue or the device waits.
pub struct RunningQueue<'q> {
    inner: MutexGuard<'q, Inner>,
    queue: &'q Queue,
}

impl RunningQueue<'_> {
    /// Which life of the queue this is: after unlocking and locking again, requests are only still owed an answer
    /// where it is the same.
    pub fn life(&self) -> u64 {
        self.queue.life.load(Ordering::SeqCst)
    }

    /// The next request, `None` where the driver has no more for now; it will kick when it does.
    ///
    /// # Errors
    /// A [`Fault`] of the driver; the device needs a reset then.
    pub fn pop<'m>(&mut self, memory: &'m Backend) -> Result<Option<Chain<'m>>, Fault> {
        if !self.queue.device.serves() {
            return Ok(None);
        }
        let popped = self.try_pop(memory);
        popped.map_err(|fault| self.fault(fault))
    }

    fn try_pop<'m>(&mut self, memory: &'m Backend) -> Result<Option<Chain<'m>>, Fault> {
        let inner = &mut *self.inner;
        let Some(ring) = &mut inner.ring else { return Ok(None) };
        loop {
            if let Some(descriptors) = ring.iter(memory)?.next() {
                if !inner.quiet {
                    inner.quiet = true;
                    ring.disable_notification(memory)?;
                }
                self.queue.device.counters.request();
                let (head, size) = (descriptors.head_index(), ring.size());
                if head >= size {
                    return Err(Fault::Head { head, size });
                }
                return Chain::walk(memory, descriptors).map(Some);
            }
            inner.quiet = false;
            if !ring.enable_notification(memory)? {
                return Ok(None);
            }
        }
    }

    /// Returns a request to the driver with `written` bytes in its writable part.
    ///
    /// # Errors
    /// A [`Fault`] where the used ring cannot be written.
    pub fn complete(&mut self, memory: &Backend, head: u16, written: u32) -> Result<(), Fault> {
        let Some(ring) = &mut self.inner.ring else { return Ok(()) };
        let result = ring.add_used(memory, head, written);
        self.inner.untold = true;
        result.map_err(|error| self.fault(error.into()))
    }

    /// Interrupts the driver about completions since the last time, where it wants to know.
    ///
    /// # Errors
    /// A [`Fault`] where the rings cannot be read.
    pub fn interrupt(&mut self, memory: &Backend) -> Result<(), Fault> {
        let wanted = self.interrupt_wanted(memory).map_err(|fault| self.fault(fault))?;
        if wanted {
            self.queue.device.queue_interrupt(self.queue.vector());
        }
        Ok(())
    }

    fn interrupt_wanted(&mut self, memory: &Backend) -> Result<bool, Fault> {
        if !std::mem::take(&mut self.inner.untold) {
            return Ok(false);
        }
        let Some(ring) = &mut self.inner.ring else { return Ok(false) };
        let wanted = ring.needs_notification(memory)?;
        if ring.event_idx_enabled() {
            return Ok(wanted);
        }
        // The library leaves the flag of virtio 1.2, 2.7.7 to us.
        let flags: u16 = memory
            .load(GuestAddress(ring.avail_ring()), Ordering::Relaxed)
            .map_err(|error| Fault::Access(error.to_string()))?;
        Ok(wanted && u16::from_le(flags) & NO_INTERRUPT == 0)
    }

    /// Says that a request breaks the device's own rules: the device needs a reset. Done while the queue is held, so
    /// that a fault never reaches past the reset that follows it.
    pub fn fault(&self, fault: Fault) -> Fault {
        self.queue.device.fail(&fault);
        fault
    }
}
