//! A type-0 configuration space: 256 bytes, and for each bit whether the guest may write or clear it.

/// Offsets of the type-0 header (PCI 3.0, 6.1).
pub(super) mod register {
    pub(crate) const VENDOR: usize = 0x00;
    pub(crate) const DEVICE: usize = 0x02;
    pub(crate) const COMMAND: usize = 0x04;
    pub(crate) const STATUS: usize = 0x06;
    pub(crate) const REVISION: usize = 0x08;
    pub(crate) const CLASS: usize = 0x09;
    pub(crate) const BARS: usize = 0x10;
    pub(crate) const SUBSYSTEM_VENDOR: usize = 0x2c;
    pub(crate) const SUBSYSTEM: usize = 0x2e;
    pub(crate) const CAPABILITIES: usize = 0x34;
    pub(crate) const INTERRUPT_LINE: usize = 0x3c;
    pub(crate) const INTERRUPT_PIN: usize = 0x3d;
}

/// Command register: I/O space decode.
pub(super) const COMMAND_IO: u16 = 1 << 0;
/// Command register: memory space decode.
pub(super) const COMMAND_MEMORY: u16 = 1 << 1;
/// Command register: the function may access memory, messages included.
const COMMAND_BUS_MASTER: u16 = 1 << 2;
/// Command register: INTx disable.
pub(super) const COMMAND_INTX_DISABLE: u16 = 1 << 10;
/// Writable command bits: I/O, memory, bus master, parity response, SERR#, INTx disable.
const COMMAND_WRITABLE: u16 = 0x0547;
/// Status register: an INTx is pending.
pub(super) const STATUS_INTERRUPT: u16 = 1 << 3;
/// Status register: the capabilities pointer means something.
const STATUS_CAPABILITIES: u16 = 1 << 4;
/// Status bits a guest clears by writing ones: parity and abort errors.
const STATUS_CLEARABLE: u16 = 0xf900;

/// Size of a conventional configuration space.
const SIZE: usize = 256;
/// Where capabilities begin: right behind the header.
const FIRST_CAPABILITY: usize = 0x40;

/// Who a function says it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
    /// Class, subclass and programming interface, 24 bits: 0xCCSSPP.
    pub class: u32,
    /// Revision ID.
    pub revision: u8,
}

/// What a BAR decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// I/O ports.
    Ports,
    /// Memory below 4 GiB.
    Memory32,
    /// Memory anywhere; takes two BAR registers.
    Memory64,
    /// The same, and reading it changes nothing.
    Prefetchable64,
}

/// One region of a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// The register it uses, 0..=5 (0..=4 for the wide kinds).
    pub index: u8,
    /// Ports or memory.
    pub kind: BarKind,
    /// Bytes, a power of two: at least 4 for ports, 16 for memory.
    pub size: u64,
}

impl Bar {
    /// True for an address of 64 bits.
    fn is_wide(self) -> bool {
        matches!(self.kind, BarKind::Memory64 | BarKind::Prefetchable64)
    }

    /// Registers it takes.
    fn registers(self) -> usize {
        if self.is_wide() { 2 } else { 1 }
    }

    /// The read-only low bits (PCI 3.0, 6.2.5.1).
    fn flags(self) -> u64 {
        match self.kind {
            BarKind::Ports => 0b01,
            BarKind::Memory32 => 0b0000,
            BarKind::Memory64 => 0b0100,
            BarKind::Prefetchable64 => 0b1100,
        }
    }

    /// True where the registers and the size are possible.
    pub(super) fn is_possible(self) -> bool {
        let least = if self.kind == BarKind::Ports { 4 } else { 16 };
        let most = if self.kind == BarKind::Ports { 256 } else { 1 << 31 };
        usize::from(self.index) + self.registers() <= 6
            && self.size.is_power_of_two()
            && (least..=most).contains(&self.size)
    }
}

/// A capability: its ID and what follows the two bytes of ID and next pointer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capability {
    /// Capability ID (PCI 3.0, appendix H).
    pub id: u8,
    /// The bytes from offset 2 on.
    pub body: Vec<u8>,
    /// Bits of `body` the guest may write; missing bytes are read-only.
    pub writable: Vec<u8>,
}

/// The configuration space of one function.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    clearable: [u8; SIZE],
    end_of_capabilities: usize,
    last_capability: Option<usize>,
}

impl ConfigSpace {
    /// A header without BARs or capabilities.
    pub(super) fn new(identity: &Identity) -> Self {
        let mut config = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            clearable: [0; SIZE],
            end_of_capabilities: FIRST_CAPABILITY,
            last_capability: None,
        };
        config.put(register::VENDOR, &identity.vendor.to_le_bytes());
        config.put(register::DEVICE, &identity.device.to_le_bytes());
        config.put(register::REVISION, &[identity.revision]);
        config.put(register::CLASS, &identity.class.to_le_bytes()[..3]);
        config.put(register::SUBSYSTEM_VENDOR, &identity.subsystem_vendor.to_le_bytes());
        config.put(register::SUBSYSTEM, &identity.subsystem.to_le_bytes());
        config.allow(register::COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        config.allow(register::INTERRUPT_LINE, &[0xff]);
        config.allow(0x0c, &[0xff]); // cache line size: software's scratch on a device without it
        config.clearable[register::STATUS..register::STATUS + 2].copy_from_slice(&STATUS_CLEARABLE.to_le_bytes());
        config
    }

    /// Reads `data.len()` bytes at `offset`; zero past the end.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(offset + index).copied().unwrap_or(0);
        }
    }

    /// Sets bytes regardless of what the guest may write. What lies past the end is dropped.
    pub fn put(&mut self, offset: usize, data: &[u8]) {
        for (target, byte) in self.bytes.iter_mut().skip(offset).zip(data) {
            *target = *byte;
        }
    }

    /// The 32-bit register at `offset`.
    pub fn dword(&self, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// A guest's write: only writable bits change, write-1-to-clear bits clear.
    pub(super) fn write(&mut self, offset: usize, data: &[u8]) {
        for (at, &byte) in (offset..SIZE).zip(data) {
            let writable = self.writable[at];
            self.bytes[at] = (self.bytes[at] & !writable & !(byte & self.clearable[at])) | (byte & writable);
        }
    }

    fn allow(&mut self, offset: usize, mask: &[u8]) {
        for (target, byte) in self.writable.iter_mut().skip(offset).zip(mask) {
            *target = *byte;
        }
    }

    /// The command register.
    pub(super) fn command(&self) -> u16 {
        self.dword(register::COMMAND) as u16
    }

    /// True where the guest lets the function access memory and send messages.
    pub fn is_bus_master(&self) -> bool {
        self.command() & COMMAND_BUS_MASTER != 0
    }

    /// Sets command bits, as firmware does.
    pub(super) fn enable(&mut self, command: u16) {
        let command = self.command() | command;
        self.put(register::COMMAND, &command.to_le_bytes());
    }

    /// Shows or hides the interrupt status bit.
    pub(super) fn set_interrupt_status(&mut self, pending: bool) {
        let status = (self.dword(register::COMMAND) >> 16) as u16 & !STATUS_INTERRUPT;
        let status = if pending { status | STATUS_INTERRUPT } else { status };
        self.put(register::STATUS, &status.to_le_bytes());
    }

    /// Names the pin (1 is INTA#) and the line firmware routed it to.
    pub(super) fn set_interrupt_pin(&mut self, pin: u8, line: u8) {
        self.put(register::INTERRUPT_PIN, &[pin]);
        self.put(register::INTERRUPT_LINE, &[line]);
    }

    /// Makes room for a BAR at address 0.
    pub(super) fn add_bar(&mut self, bar: Bar) {
        let at = register::BARS + 4 * usize::from(bar.index);
        let mask = !(bar.size - 1);
        let width = 4 * bar.registers();
        self.allow(at, &mask.to_le_bytes()[..width]);
        self.put(at, &bar.flags().to_le_bytes()[..width]);
    }

    /// Where a BAR is programmed to.
    pub(super) fn bar_address(&self, bar: Bar) -> u64 {
        let at = register::BARS + 4 * usize::from(bar.index);
        let low = u64::from(self.dword(at));
        let high = if bar.is_wide() { u64::from(self.dword(at + 4)) } else { 0 };
        (high << 32 | low) & !(bar.size - 1)
    }

    /// Programs a BAR, as firmware does.
    pub(super) fn set_bar_address(&mut self, bar: Bar, address: u64) {
        let at = register::BARS + 4 * usize::from(bar.index);
        let value = (address & !(bar.size - 1)) | bar.flags();
        self.put(at, &value.to_le_bytes()[..4 * bar.registers()]);
    }

    /// Offsets of all capabilities, in list order.
    pub fn capabilities(&self) -> impl Iterator<Item = usize> {
        let at = |pointer: u8| (pointer != 0).then_some(usize::from(pointer));
        std::iter::successors(at(self.bytes[register::CAPABILITIES]), move |&last| at(self.bytes[last + 1]))
    }

    /// Appends a capability; returns its offset, `None` where no room is left.
    pub(super) fn add_capability(&mut self, capability: &Capability) -> Option<usize> {
        let at = self.end_of_capabilities;
        let end = at + 2 + capability.body.len();
        if end > SIZE {
            return None;
        }
        self.put(at, &[capability.id, 0]);
        self.put(at + 2, &capability.body);
        self.allow(at + 2, &capability.writable);
        match self.last_capability {
            Some(last) => self.put(last + 1, &[at as u8]),
            None => {
                self.put(register::CAPABILITIES, &[at as u8]);
                let status = (self.dword(register::COMMAND) >> 16) as u16 | STATUS_CAPABILITIES;
                self.put(register::STATUS, &status.to_le_bytes());
            }
        }
        self.last_capability = Some(at);
        self.end_of_capabilities = end.next_multiple_of(4);
        Some(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDENTITY: Identity = Identity {
        vendor: 0x1af4,
        device: 0x1042,
        subsystem_vendor: 0x1af4,
        subsystem: 7,
        class: 0x01_80_00,
        revision: 1,
    };

    #[test]
    fn identity_is_read_only_and_command_bits_are_not() {
        let mut config = ConfigSpace::new(&IDENTITY);
        config.write(0, &[0xff; 4]);
        assert_eq!(config.dword(0), 0x1042_1af4);
        assert_eq!(config.dword(8), 0x0180_0001);
        config.write(register::COMMAND, &[0xff, 0xff]);
        assert_eq!(config.command(), COMMAND_WRITABLE);
        config.write(register::COMMAND, &[0]);
        assert_eq!(config.command(), COMMAND_WRITABLE & 0xff00, "a byte write leaves the other byte");
    }

    #[test]
    fn status_errors_clear_by_writing_ones_and_only_then() {
        let mut config = ConfigSpace::new(&IDENTITY);
        config.put(register::STATUS, &0xf910u16.to_le_bytes());
        config.write(register::STATUS, &[0, 0]);
        assert_eq!(config.dword(4) >> 16, 0xf910);
        config.write(register::STATUS, &0x2010u16.to_le_bytes());
        assert_eq!(config.dword(4) >> 16, 0xd910, "the capabilities bit is read-only");
    }

    #[test]
    fn sizing_a_bar_reads_back_its_mask_and_flags() {
        let mut config = ConfigSpace::new(&IDENTITY);
        let wide = Bar { index: 0, kind: BarKind::Memory64, size: 0x4000 };
        let ports = Bar { index: 2, kind: BarKind::Ports, size: 0x20 };
        config.add_bar(wide);
        config.add_bar(ports);
        config.write(0x10, &[0xff; 12]);
        assert_eq!(config.dword(0x10), 0xffff_c004);
        assert_eq!(config.dword(0x14), 0xffff_ffff);
        assert_eq!(config.dword(0x18), 0xffff_ffe1);
        config.write(0x1c, &[0xff; 4]);
        assert_eq!(config.dword(0x1c), 0, "a BAR that is not there reads as zero");
        config.set_bar_address(wide, 0x12_3456_8000);
        assert_eq!(config.bar_address(wide), 0x12_3456_8000);
    }

    #[test]
    fn capabilities_form_a_list_until_room_is_out() {
        let mut config = ConfigSpace::new(&IDENTITY);
        let capability = |id, bytes| Capability { id, body: vec![id; bytes], writable: vec![0, 0xf0] };
        assert_eq!(config.add_capability(&capability(9, 14)), Some(0x40));
        assert_eq!(config.add_capability(&capability(5, 3)), Some(0x50));
        assert_eq!(config.add_capability(&capability(6, 100)), Some(0x58));
        assert_eq!(config.add_capability(&capability(7, 100)), None);
        assert_eq!(config.dword(0x34), 0x40);
        assert_eq!(config.dword(0x40), 0x0909_5009);
        assert_eq!(config.dword(0x50) & 0xffff, 0x5805);
        assert_eq!(config.dword(0x58) & 0xffff, 0x0006);
        config.write(0x42, &[0xff, 0xff]);
        assert_eq!(config.dword(0x40), 0xf909_5009);
    }
}
