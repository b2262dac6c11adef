//! The entropy device (virtio 1.2, 5.4): whatever the driver posts is filled with random bytes.

use std::sync::Arc;

use host::Entropy;
use memory::Backend;

use super::{Fault, Lane, LaneWork, Link, Queue, VirtioDevice, Waker};

/// The most random bytes a request gets: what a device returns less than asked for is the driver's to ask again.
const MAX_BYTES: usize = 64 << 10;
/// Queue size; drivers post one request at a time.
const QUEUE_SIZE: u16 = 16;

/// An entropy device that draws from the host.
pub struct EntropyDevice {
    source: Arc<dyn Entropy>,
}

impl EntropyDevice {
    /// A device that draws from `source`.
    pub fn new(source: Arc<dyn Entropy>) -> Self {
        Self { source }
    }
}

impl VirtioDevice for EntropyDevice {
    fn kind(&self) -> u16 {
        4
    }

    fn class(&self) -> u32 {
        0x00_ff_00
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn read_config(&self, _offset: usize, data: &mut [u8]) {
        data.fill(0);
    }

    fn lanes(&mut self, link: Link) -> Vec<Lane> {
        let work = Work { source: Arc::clone(&self.source), link };
        vec![Lane { name: "entropy".into(), queues: vec![0], waker: Waker::new(), work: Box::new(work) }]
    }
}

struct Work {
    source: Arc<dyn Entropy>,
    link: Link,
}

impl LaneWork for Work {
    fn run(&mut self, memory: &Backend, queues: &[Arc<Queue>]) -> Result<(), Fault> {
        let Some(mut queue) = queues[0].lock() else { return Ok(()) };
        while let Some(chain) = queue.pop(memory)? {
            if chain.writable.is_empty() {
                return Err(queue.fault(Fault::Request("an entropy request without room for entropy")));
            }
            let mut bytes = vec![0; chain.writable.len().min(MAX_BYTES)];
            let written = match self.source.fill(&mut bytes) {
                Ok(()) => chain.writable.copy_from(&bytes),
                Err(error) => {
                    tracing::debug!("the host has no random bytes: {error}");
                    0
                }
            };
            self.link.counters().to_guest(written as u64);
            queue.complete(memory, chain.head, written as u32)?;
        }
        queue.interrupt(memory)
    }
}

#[cfg(test)]
mod tests {
    use host::fake::FakeEntropy;

    use super::*;
    use crate::virtio::test_driver::Driver;

    #[test]
    fn requests_are_filled_up_to_a_bound() {
        let mut driver = Driver::new(Box::new(EntropyDevice::new(Arc::new(FakeEntropy::default()))));
        driver.start(0);
        let small = driver.request(0, &[], &[4, 3]);
        assert_eq!(driver.finish(0, small), (vec![0, 1, 2, 3, 4, 5, 6], 7));
        let huge = driver.request(0, &[], &[MAX_BYTES + 1]);
        assert_eq!(driver.finish(0, huge).1, MAX_BYTES as u32);
        assert_eq!(driver.handle.counters().bytes_to_guest, 7 + MAX_BYTES as u64);
    }

    #[test]
    fn a_request_without_room_needs_a_reset() {
        let mut driver = Driver::new(Box::new(EntropyDevice::new(Arc::new(FakeEntropy::default()))));
        driver.start(0);
        driver.request(0, b"what?", &[]);
        driver.wait_for_fault();
    }
}
