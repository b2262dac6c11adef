//! The bus itself: slots, configuration cycles, and BARs that come and go on the machine's [`Bus`].

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memory::Gpa;

use super::config::{COMMAND_INTX_DISABLE, COMMAND_IO, COMMAND_MEMORY};
use super::interrupt::{Intx, SharedLine};
use super::msix::Msix;
use super::{Bar, BarKind, Capability, ConfigSpace, Description, FunctionInterrupts, Identity, PciFunction};
use crate::bus::{Bus, MmioDevice, PortDevice};
use crate::interrupt::{InterruptSink, IrqLine};
use crate::log_limit::LogLimit;

/// Device numbers on a bus.
const SLOTS: u8 = 32;
/// CONFIG_ADDRESS: configuration cycles are on (PCI 3.0, 3.2.2.3.2).
const ADDRESS_ENABLE: u32 = 1 << 31;
/// The bits of CONFIG_ADDRESS that exist: enable, bus, device, function, register.
const ADDRESS_BITS: u32 = 0x80ff_fffc;

/// Why a function could not be added.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// All device numbers are taken.
    #[error("all {SLOTS} slots of the PCI bus are taken")]
    NoSlot,
    /// A window has no room for a BAR.
    #[error("no room for a PCI BAR of {size:#x} bytes in its window")]
    NoRoom {
        /// Size of the BAR.
        size: u64,
    },
    /// The function's description contradicts itself or the specification.
    #[error("PCI function {vendor:04x}:{device:04x} describes itself impossibly: {what}")]
    Description {
        /// Its vendor ID.
        vendor: u16,
        /// Its device ID.
        device: u16,
        /// What is wrong.
        what: &'static str,
    },
}

/// A device number on the bus, 0..=31.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Slot(pub u8);

/// The address ranges functions live in: what ACPI's `_CRS` of the host bridge names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Windows {
    /// Memory below 4 GiB; all BARs start here, so that 32-bit guests reach them.
    pub memory: Range<u64>,
    /// Memory above 4 GiB a guest may move 64-bit BARs to; may be empty.
    pub memory64: Range<u64>,
    /// I/O ports.
    pub ports: Range<u16>,
}

/// Which interrupt a pin of a slot is wired to: one entry of ACPI's `_PRT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// Device number.
    pub slot: Slot,
    /// 0 for INTA# to 3 for INTD#.
    pub pin: u8,
    /// Global system interrupt, level-triggered.
    pub gsi: u32,
}

/// What answers at a BAR.
enum BarAccess {
    Function(Arc<Mutex<dyn PciFunction>>, u8),
    Msix(Arc<Msix>),
}

impl MmioDevice for BarAccess {
    fn mmio_read(&mut self, offset: u64, data: &mut [u8]) {
        match self {
            Self::Function(function, bar) => lock(function).bar_read(*bar, offset, data),
            Self::Msix(msix) => msix.read(offset, data),
        }
    }
    fn mmio_write(&mut self, offset: u64, data: &[u8]) {
        match self {
            Self::Function(function, bar) => lock(function).bar_write(*bar, offset, data),
            Self::Msix(msix) => msix.write(offset, data),
        }
    }
}

impl PortDevice for BarAccess {
    fn port_read(&mut self, offset: u16, data: &mut [u8]) {
        self.mmio_read(offset.into(), data);
    }
    fn port_write(&mut self, offset: u16, data: &[u8]) {
        self.mmio_write(offset.into(), data);
    }
}

/// One BAR and where it is at present.
struct Mapping {
    bar: Bar,
    access: Arc<Mutex<BarAccess>>,
    mapped: Option<u64>,
}

impl Mapping {
    fn wanted(&self, config: &ConfigSpace) -> Option<u64> {
        let decode = if self.bar.kind == BarKind::Ports { COMMAND_IO } else { COMMAND_MEMORY };
        let address = config.bar_address(self.bar);
        // Address 0 is what an unassigned BAR holds.
        (config.command() & decode != 0 && address != 0).then_some(address)
    }

    /// Tells the function where a memory BAR of its own is now.
    fn tell(&self) {
        if let (BarAccess::Function(function, bar), true) = (&*lock(&self.access), self.bar.kind != BarKind::Ports) {
            lock(function).bar_moved(*bar, self.mapped.map(Gpa));
        }
    }

    fn unmap(&mut self, bus: &Bus) {
        match self.mapped.take() {
            Some(address) if self.bar.kind == BarKind::Ports => bus.remove_ports(address as u16),
            Some(address) => bus.remove_mmio(Gpa(address)),
            None => {}
        }
    }

    fn map(&mut self, bus: &Bus, address: u64) -> bool {
        let placed = match self.bar.kind {
            BarKind::Ports => {
                let start = u16::try_from(address);
                start.is_ok_and(|start| bus.add_ports(start, self.bar.size as u16, self.access.clone()).is_ok())
            }
            _ => bus.add_mmio(Gpa(address), self.bar.size, self.access.clone()).is_ok(),
        };
        if placed {
            self.mapped = Some(address);
        }
        placed
    }
}

/// A function in its slot.
struct Occupant {
    config: ConfigSpace,
    function: Arc<Mutex<dyn PciFunction>>,
    mappings: Vec<Mapping>,
    /// With the offset of its capability.
    msix: Option<(Arc<Msix>, usize)>,
    intx: Option<Arc<Intx>>,
}

impl Occupant {
    fn read(&mut self, offset: usize, data: &mut [u8]) {
        if let Some(intx) = &self.intx {
            self.config.set_interrupt_status(intx.is_pending());
        }
        lock(&self.function).before_config_read(&mut self.config, offset, data.len());
        self.config.read(offset, data);
    }

    fn write(&mut self, offset: usize, data: &[u8]) {
        self.config.write(offset, data);
        lock(&self.function).after_config_write(&mut self.config, offset, data.len());
        if let Some(intx) = &self.intx {
            intx.set_disabled(self.config.command() & COMMAND_INTX_DISABLE != 0);
        }
        if let Some((msix, at)) = &self.msix {
            msix.set_control((self.config.dword(*at) >> 16) as u16, self.config.is_bus_master());
        }
    }
}

/// Where the free part of each window begins.
#[derive(Clone, Copy)]
struct Room {
    memory: u64,
    ports: u64,
}

impl Room {
    fn allocate(&mut self, bar: Bar, windows: &Windows) -> Result<u64, Error> {
        let (next, end) = match bar.kind {
            BarKind::Ports => (&mut self.ports, u64::from(windows.ports.end)),
            _ => (&mut self.memory, windows.memory.end),
        };
        let start = next.checked_next_multiple_of(bar.size).filter(|&start| start < end && bar.size <= end - start);
        let start = start.ok_or(Error::NoRoom { size: bar.size })?;
        *next = start + bar.size;
        Ok(start)
    }
}

struct State {
    slots: BTreeMap<u8, Occupant>,
    room: Room,
}

struct Shared {
    state: Mutex<State>,
    bus: Arc<Bus>,
    sink: Arc<dyn InterruptSink>,
    lines: [Arc<SharedLine>; 4],
    windows: Windows,
    refused_maps: LogLimit,
}

/// Bus 0 with its host bridge in slot 0. Cheap to clone.
#[derive(Clone)]
pub struct PciBus(Arc<Shared>);

/// The host bridge's own function: nothing but an identity (Red Hat's generic PCIe host bridge, which no guest has
/// chipset quirks for).
struct HostBridge;

impl PciFunction for HostBridge {
    fn describe(&self) -> Description {
        let identity = Identity {
            vendor: 0x1b36,
            device: 0x0008,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
            class: 0x06_00_00,
            revision: 0,
        };
        Description { identity, bars: Vec::new(), capabilities: Vec::new(), msix: None, interrupt_pin: false }
    }
    fn connect(&mut self, _interrupts: FunctionInterrupts) {}
    fn bar_read(&mut self, _bar: u8, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn bar_write(&mut self, _bar: u8, _offset: u64, _data: &[u8]) {}
}

impl PciBus {
    /// A bus with a host bridge. BARs live in `windows` and on `bus`; messages go to `sink`; pins are wired to `gsis`
    /// by slot and pin in turn.
    ///
    /// # Errors
    /// None today: the host bridge needs no room.
    pub fn new(bus: Arc<Bus>, sink: Arc<dyn InterruptSink>, windows: Windows, gsis: [u32; 4]) -> Result<Self, Error> {
        let lines = gsis.map(|gsi| Arc::new(SharedLine::new(IrqLine::new(Arc::clone(&sink), gsi))));
        // Address 0 reads as an unassigned BAR.
        let room = Room { memory: windows.memory.start.max(1), ports: u64::from(windows.ports.start.max(1)) };
        let state = State { slots: BTreeMap::new(), room };
        let refused_maps = LogLimit::default();
        let shared = Shared { state: Mutex::new(state), bus, sink, lines, windows, refused_maps };
        let pci = Self(Arc::new(shared));
        pci.add(Arc::new(Mutex::new(HostBridge)))?;
        Ok(pci)
    }

    /// Puts a function in the next free slot, with its BARs assigned and decoded as firmware leaves them.
    ///
    /// # Errors
    /// [`Error`] where there is no slot or no room, or the description is impossible; the bus is unchanged then.
    pub fn add(&self, function: Arc<Mutex<dyn PciFunction>>) -> Result<Slot, Error> {
        let mut state = self.lock();
        let slot = (0..SLOTS).find(|slot| !state.slots.contains_key(slot)).ok_or(Error::NoSlot)?;
        let room = state.room;
        match self.occupy(&mut state.room, slot, &function) {
            Ok(occupant) => {
                let msix = occupant.msix.as_ref().map(|(msix, _)| Arc::clone(msix));
                lock(&function).connect(FunctionInterrupts::new(msix, occupant.intx.clone()));
                state.slots.insert(slot, occupant);
                self.remap(&mut state);
                Ok(Slot(slot))
            }
            Err(error) => {
                state.room = room;
                Err(error)
            }
        }
    }

    /// Builds the configuration space of a function and finds room for its BARs.
    fn occupy(&self, room: &mut Room, slot: u8, function: &Arc<Mutex<dyn PciFunction>>) -> Result<Occupant, Error> {
        let description = lock(function).describe();
        let Identity { vendor, device, .. } = description.identity;
        let refused = |what| Error::Description { vendor, device, what };
        let mut config = ConfigSpace::new(&description.identity);
        let mut mappings = Vec::new();
        let mut place = |bar: Bar, wanted: Option<Gpa>, access| -> Result<(), Error> {
            if !bar.is_possible() {
                return Err(refused("a BAR's size or index"));
            }
            config.add_bar(bar);
            let at = match wanted {
                Some(at) => at.0,
                None => room.allocate(bar, &self.0.windows)?,
            };
            config.set_bar_address(bar, at);
            mappings.push(Mapping { bar, access: Arc::new(Mutex::new(access)), mapped: None });
            Ok(())
        };
        for &bar in &description.bars {
            let wanted = lock(function).bar_place(bar.index);
            place(bar, wanted, BarAccess::Function(Arc::clone(function), bar.index))?;
        }
        let msix = match description.msix {
            Some((_, vectors)) if !(1..=2048).contains(&vectors) => return Err(refused("its number of MSI-X vectors")),
            Some((bar, vectors)) => Some(Arc::new(Msix::new(bar, vectors, Arc::clone(&self.0.sink)))),
            None => None,
        };
        if let Some(msix) = &msix {
            place(msix.bar(), None, BarAccess::Msix(Arc::clone(msix)))?;
        }

        let no_room = || refused("more capabilities than fit");
        let mut add = |capability: &Capability| config.add_capability(capability).ok_or_else(no_room);
        let msix = match msix {
            Some(msix) => Some((Arc::clone(&msix), add(&msix.capability())?)),
            None => None,
        };
        for capability in &description.capabilities {
            add(capability)?;
        }
        let intx = description.interrupt_pin.then(|| {
            let line = &self.0.lines[usize::from(slot) % 4];
            config.set_interrupt_pin(1, line.gsi() as u8);
            Arc::new(Intx::new(Arc::clone(line), slot))
        });
        config.enable(COMMAND_IO | COMMAND_MEMORY);
        Ok(Occupant { config, function: Arc::clone(function), mappings, msix, intx })
    }

    /// The windows BARs live in.
    pub fn windows(&self) -> &Windows {
        &self.0.windows
    }

    /// The wiring of all slots' pins.
    pub fn interrupt_routes(&self) -> Vec<Route> {
        let pins = (0..SLOTS).flat_map(|slot| (0..4).map(move |pin| (slot, pin)));
        pins.map(|(slot, pin)| Route { slot: Slot(slot), pin, gsi: self.0.lines[usize::from(slot + pin) % 4].gsi() })
            .collect()
    }

    /// The ports 0xCF8..=0xCFF. Byte accesses to port 0xCF9 go to `reset_control` where given: it lies in the middle.
    pub fn config_ports(&self, reset_control: Option<Arc<Mutex<dyn PortDevice>>>) -> ConfigPorts {
        ConfigPorts { pci: self.clone(), address: 0, reset_control }
    }

    /// The enhanced configuration window of this bus, [`Ecam::SIZE`] bytes.
    pub fn ecam(&self) -> Ecam {
        Ecam { pci: self.clone() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Brings the machine's bus in line with all BARs and decode bits. A BAR moved on top of something else answers
    /// nowhere until the place is free.
    fn remap(&self, state: &mut State) {
        for occupant in state.slots.values_mut() {
            for mapping in &mut occupant.mappings {
                if mapping.mapped.is_some() && mapping.mapped != mapping.wanted(&occupant.config) {
                    mapping.unmap(&self.0.bus);
                    mapping.tell();
                }
            }
        }
        for (slot, occupant) in &mut state.slots {
            for mapping in occupant.mappings.iter_mut().filter(|mapping| mapping.mapped.is_none()) {
                let Some(address) = mapping.wanted(&occupant.config) else { continue };
                if mapping.map(&self.0.bus, address) {
                    mapping.tell();
                } else if let Some(times) = self.0.refused_maps.pass() {
                    let bar = mapping.bar.index;
                    tracing::debug!(
                        "PCI slot {slot}: BAR {bar} at {address:#x} is taken or impossible (seen {times} times)"
                    );
                }
            }
        }
    }

    /// A configuration read of bus 0; all ones where no function is.
    fn read(&self, device: u8, function: u8, offset: usize, data: &mut [u8]) {
        match self.lock().slots.get_mut(&device) {
            Some(occupant) if function == 0 => occupant.read(offset, data),
            _ => data.fill(0xff),
        }
    }

    /// A configuration write of bus 0.
    fn write(&self, device: u8, function: u8, offset: usize, data: &[u8]) {
        let mut state = self.lock();
        if let Some(occupant) = state.slots.get_mut(&device)
            && function == 0
        {
            occupant.write(offset, data);
            self.remap(&mut state);
        }
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Configuration mechanism #1: CONFIG_ADDRESS at 0xCF8, CONFIG_DATA at 0xCFC (PCI 3.0, 3.2.2.3.2).
pub struct ConfigPorts {
    pci: PciBus,
    address: u32,
    reset_control: Option<Arc<Mutex<dyn PortDevice>>>,
}

impl ConfigPorts {
    /// Where it belongs.
    pub const BASE: u16 = 0xcf8;
    /// How many ports it takes.
    pub const LENGTH: u16 = 8;

    /// The function and register an access to CONFIG_DATA names: (device, function, offset); only bus 0 exists.
    fn target(&self, offset: u16) -> Option<(u8, u8, usize)> {
        let address = self.address;
        let here = address & ADDRESS_ENABLE != 0 && (address >> 16) & 0xff == 0;
        here.then(|| {
            let register = (address & 0xfc) as usize + usize::from(offset & 3);
            ((address >> 11) as u8 & 0x1f, (address >> 8) as u8 & 7, register)
        })
    }
}

impl PortDevice for ConfigPorts {
    fn port_read(&mut self, offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        match (offset, data.len(), &self.reset_control) {
            (0, 4, _) => data.copy_from_slice(&self.address.to_le_bytes()),
            (1, 1, Some(reset)) => lock(reset).port_read(0, data),
            (0..4, ..) => {}
            _ => {
                if let Some((device, function, register)) = self.target(offset) {
                    self.pci.read(device, function, register, data);
                }
            }
        }
    }

    fn port_write(&mut self, offset: u16, data: &[u8]) {
        match (offset, data, &self.reset_control) {
            (0, &[a, b, c, d], _) => self.address = u32::from_le_bytes([a, b, c, d]) & ADDRESS_BITS,
            (1, [_], Some(reset)) => lock(reset).port_write(0, data),
            (0..4, ..) => {}
            _ => {
                if let Some((device, function, register)) = self.target(offset) {
                    self.pci.write(device, function, register, data);
                }
            }
        }
    }
}

/// The enhanced configuration window: 4 KiB a function (PCI Express Base, 7.2.2).
pub struct Ecam {
    pci: PciBus,
}

impl Ecam {
    /// Bytes of the window: one bus.
    pub const SIZE: u64 = 1 << 20;

    fn target(offset: u64) -> (u8, u8, usize) {
        ((offset >> 15) as u8 & 0x1f, (offset >> 12) as u8 & 7, (offset & 0xfff) as usize)
    }
}

impl MmioDevice for Ecam {
    fn mmio_read(&mut self, offset: u64, data: &mut [u8]) {
        let (device, function, register) = Self::target(offset);
        self.pci.read(device, function, register, data);
    }

    fn mmio_write(&mut self, offset: u64, data: &[u8]) {
        let (device, function, register) = Self::target(offset);
        self.pci.write(device, function, register, data);
    }
}

#[cfg(test)]
#[path = "bus_tests.rs"]
mod tests;
