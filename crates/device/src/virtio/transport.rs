//! The modern PCI transport (virtio 1.2, 4.1): one memory BAR with the four structures, found through capabilities.
//!
//! ```text
//!   BAR 0   0x0000 common configuration   0x1000 ISR   0x2000 device configuration   0x3000 notify (4 bytes a queue)
//!   BAR 2   MSI-X table and PBA (kept by the bus)
//! ```

use std::io;
use std::sync::Arc;

use memory::{Gpa, GuestRam};

use super::lane::Lanes;
use super::queue::{NO_VECTOR, QueueRegisters};
use super::state::{DeviceState, Link, status};
use super::{CounterValues, Doorbells, Queue, VirtioDevice, feature};
use crate::pci::{Bar, BarKind, Capability, ConfigSpace, Description, FunctionInterrupts, Identity, PciFunction};

/// PCI vendor of virtio devices.
const VENDOR: u16 = 0x1af4;
/// PCI device ID of virtio device type 0 (virtio 1.2, 4.1.2).
const DEVICE_BASE: u16 = 0x1040;
/// Capability ID: vendor-specific.
const VENDOR_CAPABILITY: u8 = 9;

/// Kinds of structures a capability points to (virtio 1.2, 4.1.4).
mod structure {
    pub(super) const COMMON: u8 = 1;
    pub(super) const NOTIFY: u8 = 2;
    pub(super) const ISR: u8 = 3;
    pub(super) const DEVICE: u8 = 4;
    pub(super) const PCI_ACCESS: u8 = 5;
}

/// Layout of BAR 0; each structure has a page of its own.
const COMMON_AT: u64 = 0x0000;
const ISR_AT: u64 = 0x1000;
const DEVICE_AT: u64 = 0x2000;
const NOTIFY_AT: u64 = 0x3000;
const PAGE: u64 = 0x1000;
const BAR_SIZE: u64 = 0x4000;
/// Bytes between the notify addresses of neighbouring queues.
const NOTIFY_STRIDE: u64 = 4;
/// The BAR of the MSI-X table.
const MSIX_BAR: u8 = 2;

/// Offsets in the common configuration (virtio 1.2, 4.1.4.3).
mod common {
    pub(super) const DEVICE_FEATURE_SELECT: usize = 0x00;
    pub(super) const DEVICE_FEATURE: usize = 0x04;
    pub(super) const DRIVER_FEATURE_SELECT: usize = 0x08;
    pub(super) const DRIVER_FEATURE: usize = 0x0c;
    pub(super) const CONFIG_VECTOR: usize = 0x10;
    pub(super) const NUM_QUEUES: usize = 0x12;
    pub(super) const STATUS: usize = 0x14;
    pub(super) const GENERATION: usize = 0x15;
    pub(super) const QUEUE_SELECT: usize = 0x16;
    pub(super) const QUEUE_SIZE: usize = 0x18;
    pub(super) const QUEUE_VECTOR: usize = 0x1a;
    pub(super) const QUEUE_ENABLE: usize = 0x1c;
    pub(super) const QUEUE_NOTIFY_OFF: usize = 0x1e;
    pub(super) const QUEUE_DESCRIPTORS: usize = 0x20;
    pub(super) const QUEUE_AVAILABLE: usize = 0x28;
    pub(super) const QUEUE_USED: usize = 0x30;
    pub(super) const QUEUE_RESET: usize = 0x3a;
    pub(super) const SIZE: usize = 0x40;
}

/// What the driver programs; gone after a reset.
struct Volatile {
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
}

impl Volatile {
    fn new(queues: &[Arc<Queue>]) -> Self {
        Self {
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues: queues.iter().map(|queue| QueueRegisters::new(queue.max_size())).collect(),
        }
    }
}

/// A virtio device as a PCI function.
pub struct VirtioPci {
    device: Box<dyn VirtioDevice>,
    ram: GuestRam,
    state: Arc<DeviceState>,
    queues: Vec<Arc<Queue>>,
    lanes: Arc<Lanes>,
    doorbells: Option<Arc<dyn Doorbells>>,
    /// The notify addresses that are doorbells now, and their queues.
    attached: Vec<(Gpa, usize)>,
    volatile: Volatile,
}

/// The machine's view of a running device.
#[derive(Clone)]
pub struct Handle {
    state: Arc<DeviceState>,
    lanes: Arc<Lanes>,
}

impl Handle {
    /// What the machine calls it.
    pub fn name(&self) -> &str {
        self.state.name()
    }

    /// Reads its counters.
    pub fn counters(&self) -> CounterValues {
        self.state.counters.read()
    }

    /// True once the driver has taken the device into use.
    pub fn is_running(&self) -> bool {
        self.state.is_running()
    }

    /// Serves what the driver has made available, ends the device's threads and waits for that. For the end of a run:
    /// output still on its way is delivered first, so this blocks as long as whoever takes it does.
    pub fn shutdown(&self) {
        self.lanes.join();
    }
}

impl VirtioPci {
    /// A function for `device`, with its threads started. `name` is for logs and counters. Where there are `doorbells`, kicks
    /// take that way.
    ///
    /// # Errors
    /// What the host said where it refuses a thread or an eventfd.
    pub fn new(
        name: &str,
        mut device: Box<dyn VirtioDevice>,
        ram: GuestRam,
        doorbells: Option<Arc<dyn Doorbells>>,
    ) -> io::Result<Self> {
        let state = Arc::new(DeviceState::new(name.to_owned()));
        let sizes = device.queue_sizes();
        let queues: Vec<_> = sizes.into_iter().map(|size| Arc::new(Queue::new(size, Arc::clone(&state)))).collect();
        let lanes = device.lanes(Link(Arc::clone(&state)));
        let lanes = Arc::new(Lanes::start(lanes, &queues, ram.backend(), &state, doorbells.is_some())?);
        let volatile = Volatile::new(&queues);
        Ok(Self { device, ram, state, queues, lanes, doorbells, attached: Vec::new(), volatile })
    }

    /// For the machine, before the function goes to the bus.
    pub fn handle(&self) -> Handle {
        Handle { state: Arc::clone(&self.state), lanes: Arc::clone(&self.lanes) }
    }

    fn offered(&self) -> u64 {
        let transport = feature::VERSION_1 | feature::EVENT_IDX | feature::INDIRECT_DESC | feature::RING_RESET;
        self.device.features() | transport
    }

    fn selected(&self) -> Option<(&Arc<Queue>, &QueueRegisters)> {
        let index = usize::from(self.volatile.queue_select);
        Some((self.queues.get(index)?, self.volatile.queues.get(index)?))
    }

    /// MSI-X vectors: one for the configuration, one a queue.
    fn vectors(&self) -> u16 {
        self.queues.len() as u16 + 1
    }

    fn accepted_vector(&self, vector: u16) -> u16 {
        if vector < self.vectors() { vector } else { NO_VECTOR }
    }

    /// The common configuration as it reads now.
    fn common_image(&self) -> [u8; common::SIZE] {
        let half = |value: u64, select: u32| match select {
            0 => value as u32,
            1 => (value >> 32) as u32,
            _ => 0,
        };
        let volatile = &self.volatile;
        let mut image = [0; common::SIZE];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(common::DEVICE_FEATURE_SELECT, &volatile.device_feature_select.to_le_bytes());
        put(common::DEVICE_FEATURE, &half(self.offered(), volatile.device_feature_select).to_le_bytes());
        put(common::DRIVER_FEATURE_SELECT, &volatile.driver_feature_select.to_le_bytes());
        put(common::DRIVER_FEATURE, &half(volatile.driver_features, volatile.driver_feature_select).to_le_bytes());
        put(common::CONFIG_VECTOR, &self.state.config_vector().to_le_bytes());
        put(common::NUM_QUEUES, &(self.queues.len() as u16).to_le_bytes());
        put(common::STATUS, &[self.state.status()]);
        put(common::GENERATION, &[self.state.generation()]);
        put(common::QUEUE_SELECT, &volatile.queue_select.to_le_bytes());
        if let Some((queue, registers)) = self.selected() {
            put(common::QUEUE_SIZE, &registers.size.to_le_bytes());
            put(common::QUEUE_VECTOR, &queue.vector().to_le_bytes());
            put(common::QUEUE_ENABLE, &u16::from(queue.is_enabled()).to_le_bytes());
            put(common::QUEUE_NOTIFY_OFF, &volatile.queue_select.to_le_bytes());
            put(common::QUEUE_DESCRIPTORS, &registers.descriptors.to_le_bytes());
            put(common::QUEUE_AVAILABLE, &registers.available.to_le_bytes());
            put(common::QUEUE_USED, &registers.used.to_le_bytes());
        } else {
            // A queue that is not there has size 0 and no vector.
            put(common::QUEUE_VECTOR, &NO_VECTOR.to_le_bytes());
        }
        image
    }

    /// A store to the common configuration, of a field's own width; others are dropped.
    fn write_common(&mut self, offset: usize, data: &[u8]) {
        match *data {
            [byte] if offset == common::STATUS => self.write_status(byte),
            [a, b] => self.write_common_word(offset, u16::from_le_bytes([a, b])),
            [a, b, c, d] => self.write_common_dword(offset, u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] => {
                self.write_common_dword(offset, u32::from_le_bytes([a, b, c, d]));
                self.write_common_dword(offset + 4, u32::from_le_bytes([e, f, g, h]));
            }
            _ => {}
        }
    }

    fn write_common_word(&mut self, offset: usize, value: u16) {
        match offset {
            common::CONFIG_VECTOR => self.state.set_config_vector(self.accepted_vector(value)),
            common::QUEUE_SELECT => self.volatile.queue_select = value,
            _ => self.write_queue_word(offset, value),
        }
    }

    fn write_queue_word(&mut self, offset: usize, value: u16) {
        let vector = self.accepted_vector(value);
        let ring_reset = self.state.features() & feature::RING_RESET != 0;
        let index = usize::from(self.volatile.queue_select);
        let (Some(queue), Some(registers)) = (self.queues.get(index), self.volatile.queues.get_mut(index)) else {
            return;
        };
        match (offset, value) {
            (common::QUEUE_VECTOR, _) => queue.set_vector(vector),
            (common::QUEUE_SIZE, _) if !queue.is_enabled() => registers.size = value,
            (common::QUEUE_ENABLE, 1) if !queue.is_enabled() => queue.enable(registers, self.ram.backend()),
            (common::QUEUE_RESET, 1) if ring_reset => {
                queue.disable();
                *registers = QueueRegisters::new(queue.max_size());
            }
            _ => {}
        }
    }

    fn write_common_dword(&mut self, offset: usize, value: u32) {
        let volatile = &mut self.volatile;
        match offset {
            common::DEVICE_FEATURE_SELECT => volatile.device_feature_select = value,
            common::DRIVER_FEATURE_SELECT => volatile.driver_feature_select = value,
            common::DRIVER_FEATURE if self.state.status() & status::FEATURES_OK == 0 => {
                match volatile.driver_feature_select {
                    0 => set_low(&mut volatile.driver_features, value),
                    1 => set_high(&mut volatile.driver_features, value),
                    _ => {}
                }
            }
            _ => self.write_queue_address(offset, value),
        }
    }

    fn write_queue_address(&mut self, offset: usize, value: u32) {
        let index = usize::from(self.volatile.queue_select);
        let (Some(queue), Some(registers)) = (self.queues.get(index), self.volatile.queues.get_mut(index)) else {
            return;
        };
        if queue.is_enabled() {
            return;
        }
        let address = match offset & !7 {
            common::QUEUE_DESCRIPTORS => &mut registers.descriptors,
            common::QUEUE_AVAILABLE => &mut registers.available,
            common::QUEUE_USED => &mut registers.used,
            _ => return,
        };
        match offset & 7 {
            0 => set_low(address, value),
            4 => set_high(address, value),
            _ => {}
        }
    }

    /// Device status (virtio 1.2, 3.1.1): bits are only ever added, all are taken back by writing 0.
    fn write_status(&mut self, value: u8) {
        if value == 0 {
            self.reset();
            return;
        }
        let mut added = value & !self.state.status() & !status::NEEDS_RESET;
        if added & status::FEATURES_OK != 0 {
            let wanted = self.volatile.driver_features;
            if wanted & !self.offered() != 0 || wanted & feature::VERSION_1 == 0 {
                added &= !status::FEATURES_OK;
            } else {
                self.state.set_features(wanted);
            }
        }
        if (self.state.status() | added) & status::FEATURES_OK == 0 {
            added &= !status::DRIVER_OK;
        }
        self.state.set_status_bits(added);
        if added & status::DRIVER_OK != 0 {
            self.lanes.wake_all();
        }
    }

    fn reset(&mut self) {
        self.state.reset();
        // Waits for lanes that are amid a request: after this no guest memory is touched. A fault they met meanwhile
        // belongs to the life that is over.
        self.queues.iter().for_each(|queue| queue.disable());
        self.state.reset();
        self.volatile = Volatile::new(&self.queues);
        self.device.reset();
    }

    /// The guest may have allowed accesses to its memory, or forbidden them: then none is under way on return.
    fn set_bus_master(&self, bus_master: bool) {
        match (self.state.set_bus_master(bus_master), bus_master) {
            (true, true) => self.lanes.wake_all(),
            (true, false) => self.queues.iter().for_each(|queue| queue.settle()),
            (false, _) => {}
        }
    }

    /// Has the engine count kicks where BAR 0 is now, and nowhere else.
    fn move_doorbells(&mut self, bar: Option<Gpa>) {
        let Some(doorbells) = &self.doorbells else { return };
        for (gpa, queue) in self.attached.drain(..) {
            if let Some(counter) = self.lanes.counter(queue) {
                doorbells.detach(gpa, counter);
            }
        }
        let Some(bar) = bar else { return };
        for queue in 0..self.queues.len() {
            let gpa = Gpa(bar.0 + NOTIFY_AT + NOTIFY_STRIDE * queue as u64);
            // Where it is refused, the store comes to `bar_write`.
            if self.lanes.counter(queue).is_some_and(|counter| doorbells.attach(gpa, counter)) {
                self.attached.push((gpa, queue));
            }
        }
    }

    /// The capability that gives access to BAR 0 through configuration space (virtio 1.2, 4.1.4.9).
    fn pci_access_window(config: &ConfigSpace) -> Option<usize> {
        config.capabilities().find(|&at| {
            let header = config.dword(at);
            header as u8 == VENDOR_CAPABILITY && (header >> 24) as u8 == structure::PCI_ACCESS
        })
    }

    /// Where the access window points now: the offset of its data, the offset in BAR 0, the width.
    fn pci_access_target(config: &ConfigSpace, offset: usize, length: usize) -> Option<(usize, u64, usize)> {
        let at = Self::pci_access_window(config)?;
        let data = at + 16;
        let touched = offset < data + 4 && data < offset + length;
        let (bar, target, width) = (config.dword(at + 4) as u8, config.dword(at + 8), config.dword(at + 12));
        let possible = bar == 0 && matches!(width, 1 | 2 | 4) && target % width == 0;
        (touched && possible && u64::from(target) < BAR_SIZE).then_some((data, target.into(), width as usize))
    }
}

fn set_low(target: &mut u64, value: u32) {
    *target = *target & !0xffff_ffff | u64::from(value);
}

fn set_high(target: &mut u64, value: u32) {
    *target = *target & 0xffff_ffff | u64::from(value) << 32;
}

/// A capability that points to a structure (struct virtio_pci_cap).
fn pointer(kind: u8, at: u64, length: u64, more: &[u8]) -> Capability {
    let mut body = vec![16 + more.len() as u8, kind, 0, 0, 0, 0];
    body.extend((at as u32).to_le_bytes());
    body.extend((length as u32).to_le_bytes());
    body.extend(more);
    Capability { id: VENDOR_CAPABILITY, body, writable: Vec::new() }
}

impl PciFunction for VirtioPci {
    fn describe(&self) -> Description {
        let kind = self.device.kind();
        let identity = Identity {
            vendor: VENDOR,
            device: DEVICE_BASE + kind,
            subsystem_vendor: VENDOR,
            subsystem: DEVICE_BASE + kind,
            class: self.device.class(),
            revision: 1,
        };
        let mut access = pointer(structure::PCI_ACCESS, 0, 0, &[0; 4]);
        access.writable = [&[0, 0, 0xff, 0, 0, 0][..], &[0xff; 12]].concat();
        let capabilities = vec![
            pointer(structure::COMMON, COMMON_AT, common::SIZE as u64, &[]),
            pointer(structure::ISR, ISR_AT, 1, &[]),
            pointer(structure::DEVICE, DEVICE_AT, PAGE, &[]),
            pointer(
                structure::NOTIFY,
                NOTIFY_AT,
                NOTIFY_STRIDE * self.queues.len() as u64,
                &(NOTIFY_STRIDE as u32).to_le_bytes(),
            ),
            access,
        ];
        Description {
            identity,
            bars: vec![Bar { index: 0, kind: BarKind::Memory64, size: BAR_SIZE }],
            capabilities,
            msix: Some((MSIX_BAR, self.vectors())),
            interrupt_pin: true,
        }
    }

    fn connect(&mut self, interrupts: FunctionInterrupts) {
        self.state.connect(interrupts);
    }

    fn bar_read(&mut self, _bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let within = (offset % PAGE) as usize;
        match offset - offset % PAGE {
            COMMON_AT => super::read_structure(&self.common_image(), within, data),
            ISR_AT if within == 0 => data[0] = self.state.take_isr(),
            DEVICE_AT => self.device.read_config(within, data),
            _ => {}
        }
    }

    fn bar_write(&mut self, _bar: u8, offset: u64, data: &[u8]) {
        let within = (offset % PAGE) as usize;
        match offset - offset % PAGE {
            COMMON_AT => self.write_common(within, data),
            DEVICE_AT => self.device.write_config(within, data),
            NOTIFY_AT => {
                self.state.counters.kicks(1);
                self.lanes.kick(within / NOTIFY_STRIDE as usize);
            }
            _ => {}
        }
    }

    fn bar_moved(&mut self, bar: u8, at: Option<Gpa>) {
        if bar == 0 {
            self.move_doorbells(at);
        }
    }

    fn before_config_read(&mut self, config: &mut ConfigSpace, offset: usize, length: usize) {
        if let Some((data, target, width)) = Self::pci_access_target(config, offset, length) {
            let mut bytes = [0; 4];
            self.bar_read(0, target, &mut bytes[..width]);
            config.put(data, &bytes);
        }
    }

    fn after_config_write(&mut self, config: &mut ConfigSpace, offset: usize, length: usize) {
        self.set_bus_master(config.is_bus_master());
        if let Some((data, target, width)) = Self::pci_access_target(config, offset, length) {
            let bytes = config.dword(data).to_le_bytes();
            self.bar_write(0, target, &bytes[..width]);
        }
    }
}

#[cfg(test)]
#[path = "transport_tests.rs"]
mod tests;
