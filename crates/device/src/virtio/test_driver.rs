//! A driver for tests: hand-built rings in guest RAM and register accesses, as a guest makes them.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use memory::{Gpa, GuestRam};

use super::{Doorbells, Handle, VirtioDevice, VirtioPci, feature};
use crate::bus::{Bus, MmioDevice};
use crate::interrupt::fixture::Recorder;
use crate::pci::{Ecam, PciBus, PciFunction, Windows};

pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
pub(super) const INDIRECT: u16 = 4;

pub(super) const STATUS: u64 = 0x14;
pub(super) const NEEDS_RESET: u64 = 0x40;
pub(super) const RAM: u64 = 64 << 20;

/// Where buffers are taken from, round and round.
const BUFFERS: std::ops::Range<u64> = (16 << 20)..(48 << 20);
/// Guest RAM each queue's rings take: descriptors, available at +0x2000, used at +0x3000.
const RINGS: u64 = 0x10000;

#[derive(Clone, Default)]
struct Ring {
    size: u16,
    next_descriptor: u16,
    available: u16,
    used: u16,
}

/// A request in flight: its head and where its writable buffers are.
pub(super) struct InFlight {
    head: u16,
    writable: Vec<(u64, usize)>,
}

pub(super) struct Driver {
    pub(super) function: Arc<Mutex<VirtioPci>>,
    pub(super) handle: Handle,
    pub(super) ram: GuestRam,
    pub(super) recorder: Arc<Recorder>,
    pub(super) bus: Arc<Bus>,
    pub(super) config: Ecam,
    rings: Vec<Ring>,
    next_buffer: u64,
}

impl Driver {
    pub(super) fn new(device: Box<dyn VirtioDevice>) -> Self {
        Self::with_doorbells(device, None)
    }

    pub(super) fn with_doorbells(device: Box<dyn VirtioDevice>, doorbells: Option<Arc<dyn Doorbells>>) -> Self {
        let ram = GuestRam::new(&[(Gpa(0), RAM)]).unwrap();
        let function = VirtioPci::new("test", device, ram.clone(), doorbells).unwrap();
        let handle = function.handle();
        let function = Arc::new(Mutex::new(function));
        let bus = Arc::new(Bus::default());
        let recorder = Arc::new(Recorder::default());
        let windows = Windows { memory: 0xc000_0000..0xd000_0000, memory64: 0..0, ports: 0..0 };
        let pci = PciBus::new(bus.clone(), recorder.clone(), windows, [16, 17, 18, 19]).unwrap();
        pci.add(function.clone()).unwrap();
        let config = pci.ecam();
        let mut driver =
            Self { function, handle, ram, recorder, bus, config, rings: Vec::new(), next_buffer: BUFFERS.start };
        driver.set_bus_master(true);
        driver
    }

    /// Reads `width` bytes of BAR 0.
    pub(super) fn read(&self, offset: u64, width: usize) -> u64 {
        let mut data = [0; 8];
        self.function.lock().unwrap().bar_read(0, offset, &mut data[..width]);
        u64::from_le_bytes(data)
    }

    pub(super) fn write(&self, offset: u64, width: usize, value: u64) {
        self.function.lock().unwrap().bar_write(0, offset, &value.to_le_bytes()[..width]);
    }

    /// A configuration-space register of the function.
    pub(super) fn config_read(&mut self, register: u64) -> u32 {
        let mut data = [0; 4];
        self.config.mmio_read((1 << 15) + register, &mut data);
        u32::from_le_bytes(data)
    }

    pub(super) fn config_write(&mut self, register: u64, value: u32) {
        self.config.mmio_write((1 << 15) + register, &value.to_le_bytes());
    }

    /// Lets the function access memory, or not; both decoders stay on.
    pub(super) fn set_bus_master(&mut self, on: bool) {
        self.config_write(0x04, if on { 7 } else { 3 });
    }

    /// Turns MSI-X on; vector n is sent as data n.
    pub(super) fn enable_messages(&mut self) {
        let table = u64::from(self.config_read(0x18) & !0xf);
        let vectors = (self.config_read(0x40) >> 16 & 0x7ff) + 1;
        for vector in 0..u64::from(vectors) {
            self.bus.mmio_write(Gpa(table + vector * 16), &0xfee0_0000u64.to_le_bytes());
            self.bus.mmio_write(Gpa(table + vector * 16 + 8), &vector.to_le_bytes());
        }
        self.config_write(0x40, 0x8000_0000);
    }

    /// Status and features, up to FEATURES_OK; returns the status.
    pub(super) fn negotiate(&mut self, features: u64) -> u64 {
        self.write(STATUS, 1, 0);
        self.write(STATUS, 1, 3);
        for half in 0..2 {
            self.write(0x08, 4, half);
            self.write(0x0c, 4, features >> (32 * half) & 0xffff_ffff);
        }
        self.write(STATUS, 1, 0xb);
        self.read(STATUS, 1)
    }

    /// Programs queue `index`, without enabling it.
    pub(super) fn program(&mut self, index: u16, size: u16) {
        let base = RINGS * (u64::from(index) + 1);
        self.write(0x16, 2, index.into());
        self.write(0x18, 2, size.into());
        self.write(0x1a, 2, u64::from(index) + 1);
        self.write(0x20, 8, base);
        self.write(0x28, 4, base + 0x2000);
        self.write(0x2c, 4, 0);
        self.write(0x30, 8, base + 0x3000);
        self.ram.fill(Gpa(base), 0, RINGS).unwrap();
    }

    /// Brings the device up with all queues at full size; `features` besides those of the transport.
    pub(super) fn start(&mut self, features: u64) {
        let transport = feature::VERSION_1 | feature::EVENT_IDX | feature::INDIRECT_DESC | feature::RING_RESET;
        self.start_with(transport | features);
    }

    pub(super) fn start_with(&mut self, features: u64) {
        assert_eq!(self.negotiate(features), 0xb);
        let queues = self.read(0x12, 2) as u16;
        self.rings.clear();
        for index in 0..queues {
            self.write(0x16, 2, index.into());
            let size = self.read(0x18, 2) as u16;
            self.program(index, size);
            self.write(0x1c, 2, 1);
            self.rings.push(Ring { size, ..Ring::default() });
        }
        self.write(STATUS, 1, 0xf);
        assert_eq!(self.read(STATUS, 1), 0xf);
    }

    pub(super) fn buffer(&mut self, bytes: usize) -> u64 {
        let bytes = bytes as u64;
        if self.next_buffer + bytes > BUFFERS.end {
            self.next_buffer = BUFFERS.start;
        }
        let at = self.next_buffer;
        self.next_buffer += bytes;
        at
    }

    /// Writes one entry of a descriptor table at `table`.
    pub(super) fn descriptor_at(&self, table: u64, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let low = [address.to_le_bytes(), [0; 8]].concat();
        let mut entry: [u8; 16] = low.try_into().unwrap();
        entry[8..12].copy_from_slice(&length.to_le_bytes());
        entry[12..14].copy_from_slice(&flags.to_le_bytes());
        entry[14..].copy_from_slice(&next.to_le_bytes());
        self.ram.write(Gpa(table + 16 * u64::from(index)), &entry).unwrap();
    }

    /// Writes descriptor `index` of queue 0.
    pub(super) fn descriptor(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        self.descriptor_at(RINGS, index, address, length, flags, next);
    }

    /// Makes `head` available without a kick.
    pub(super) fn offer(&mut self, queue: u16, head: u16) {
        let ring = &mut self.rings[usize::from(queue)];
        let base = RINGS * (u64::from(queue) + 1) + 0x2000;
        let slot = u64::from(ring.available % ring.size);
        self.ram.write_value(Gpa(base + 4 + 2 * slot), &head).unwrap();
        ring.available = ring.available.wrapping_add(1);
        self.ram.write_value(Gpa(base + 2), &ring.available).unwrap();
    }

    /// Sets the available index of a queue to anything.
    pub(super) fn set_available_index(&self, queue: u16, index: u16) {
        self.ram.write_value(Gpa(RINGS * (u64::from(queue) + 1) + 0x2002), &index).unwrap();
    }

    /// Sets the flags of the available ring.
    pub(super) fn set_available_flags(&self, queue: u16, flags: u16) {
        self.ram.write_value(Gpa(RINGS * (u64::from(queue) + 1) + 0x2000), &flags).unwrap();
    }

    /// Says after which used index an interrupt is wanted.
    pub(super) fn set_used_event(&self, queue: u16, index: u16) {
        let size = u64::from(self.rings[usize::from(queue)].size);
        self.ram.write_value(Gpa(RINGS * (u64::from(queue) + 1) + 0x2004 + 2 * size), &index).unwrap();
    }

    pub(super) fn kick(&self, queue: u16) {
        self.write(0x3000 + 4 * u64::from(queue), 2, queue.into());
    }

    /// Makes a request available without a kick.
    pub(super) fn prepare(&mut self, queue: u16, readable: &[&[u8]], writable: &[usize]) -> InFlight {
        let base = RINGS * (u64::from(queue) + 1);
        let (size, head) = {
            let ring = &self.rings[usize::from(queue)];
            (ring.size, ring.next_descriptor)
        };
        let count = (readable.len() + writable.len()) as u16;
        let mut places = Vec::new();
        for bytes in readable {
            let at = self.buffer(bytes.len());
            self.ram.write(Gpa(at), bytes).unwrap();
            places.push((at, bytes.len(), 0));
        }
        for &bytes in writable {
            let at = self.buffer(bytes);
            places.push((at, bytes, WRITE));
        }
        for (number, &(at, bytes, flags)) in (0..).zip(&places) {
            let more = if number + 1 < count { NEXT } else { 0 };
            self.descriptor_at(
                base,
                (head + number) % size,
                at,
                bytes as u32,
                flags | more,
                (head + number + 1) % size,
            );
        }
        self.rings[usize::from(queue)].next_descriptor = (head + count) % size;
        self.offer(queue, head);
        let writable = places.iter().filter(|place| place.2 == WRITE).map(|place| (place.0, place.1)).collect();
        InFlight { head, writable }
    }

    /// One readable part, some writable parts, and a kick.
    pub(super) fn request(&mut self, queue: u16, readable: &[u8], writable: &[usize]) -> InFlight {
        let parts: &[&[u8]] = if readable.is_empty() { &[] } else { &[readable] };
        let request = self.prepare(queue, parts, writable);
        self.kick(queue);
        request
    }

    pub(super) fn used_index(&self, queue: u16) -> u16 {
        self.ram.read_value(Gpa(RINGS * (u64::from(queue) + 1) + 0x3002)).unwrap()
    }

    /// The next completion, if there is one: head and written length.
    pub(super) fn poll_used(&mut self, queue: u16) -> Option<(u16, u32)> {
        let base = RINGS * (u64::from(queue) + 1) + 0x3000;
        let index = self.used_index(queue);
        let ring = &mut self.rings[usize::from(queue)];
        if ring.used == index {
            return None;
        }
        let at = base + 4 + 8 * u64::from(ring.used % ring.size);
        ring.used = ring.used.wrapping_add(1);
        Some((self.ram.read_value::<u32>(Gpa(at)).unwrap() as u16, self.ram.read_value(Gpa(at + 4)).unwrap()))
    }

    /// Waits for a request: all its writable bytes, and the length the device says it wrote.
    pub(super) fn finish(&mut self, queue: u16, request: InFlight) -> (Vec<u8>, u32) {
        let (head, written) = wait_for(|| self.poll_used(queue));
        assert_eq!(head, request.head, "completions in order");
        let mut bytes = Vec::new();
        for (at, length) in request.writable {
            let mut part = vec![0; length];
            self.ram.read(Gpa(at), &mut part).unwrap();
            bytes.extend(part);
        }
        (bytes, written)
    }

    /// Waits until the device says it needs a reset.
    pub(super) fn wait_for_fault(&mut self) {
        wait_for(|| (self.read(STATUS, 1) & NEEDS_RESET != 0).then_some(()));
    }
}

/// Polls until something is there. A test that waits for what never comes fails rather than hangs.
pub(super) fn wait_for<T>(mut poll: impl FnMut() -> Option<T>) -> T {
    for _ in 0..30_000 {
        if let Some(value) = poll() {
            return value;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("nothing came");
}
