//! Where everything lies in guest-physical memory: a pure function of the plan.
//!
//! ```text
//!   0x0000_0000  RAM; the boot structures of the loader lie in its first 636 KiB
//!   0x0009_fc00  EBDA                                                    reserved
//!   0x000a_0000  legacy video hole (no display: plain RAM the guest is not told of)
//!   0x000e_0000  ACPI tables, RSDP first                                 reserved
//!   0x000f_0000  SMBIOS tables, entry point first                        reserved
//!   0x0010_0000  RAM, up to 3 GiB
//!   0xc000_0000  32-bit PCI window; pages of the contract device at its end
//!   0xe000_0000  PCI configuration space (ECAM)                          reserved
//!   0xfec0_0000  I/O APIC      0xfed0_0000  HPET      0xfee0_0000  local APICs, MSI
//! 0x1_0000_0000  RAM beyond 3 GiB
//!           ...  64-bit PCI window, from the next 1 GiB boundary
//! ```

use std::ops::Range;

use memory::Gpa;

use crate::Plan;

/// One past the last byte of RAM below the legacy hole that the guest may use.
pub const LOW_MEMORY_END: u64 = EBDA;
/// The extended BIOS data area, 1 KiB; the BIOS data area's word at 0x40e names it.
pub const EBDA: u64 = 0x9_fc00;
/// The legacy video hole.
pub const VIDEO_HOLE: Range<u64> = 0xa_0000..0xe_0000;
/// The ACPI tables: within the range that guests without a boot protocol scan for the RSDP (ACPI 6.5, 5.2.5.1).
pub const ACPI_TABLES: Range<u64> = 0xe_0000..0xf_0000;
/// The SMBIOS tables: all of the range that guests scan for the entry point (DSP0134, 5.2).
pub const SMBIOS: Range<u64> = 0xf_0000..0x10_0000;
/// The RSDP.
pub const RSDP: Gpa = Gpa(ACPI_TABLES.start);
/// Where RAM goes on after the legacy hole.
pub const HIGH_MEMORY: u64 = 0x10_0000;
/// RAM below 4 GiB ends here at the latest.
pub const LOW_RAM_LIMIT: u64 = 0xc000_0000;
/// Where PCI memory BARs below 4 GiB go.
pub const PCI_WINDOW_32: Range<u64> = LOW_RAM_LIMIT..ECAM;
/// Where the contract device has its pages: at the end of the window, which others fill from its beginning.
pub const CONTRACT_PAGES: Gpa = Gpa(PCI_WINDOW_32.end - contract::native::device::page::SIZE);
/// PCI Express configuration space of bus 0, the only one.
pub const ECAM: u64 = 0xe000_0000;
/// Bytes of [`ECAM`].
pub const ECAM_BYTES: u64 = device::pci::Ecam::SIZE;
/// The I/O APIC's registers.
pub const IO_APIC: u64 = device::interrupt::ioapic::BASE;
/// The HPET's registers.
pub const HPET: u64 = device::emulated::hpet::BASE;
/// The local APICs' registers, and where message-signalled interrupts are written.
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// RAM beyond [`LOW_RAM_LIMIT`].
pub const RAM_ABOVE_4G: u64 = 1 << 32;
/// Bytes of the 64-bit PCI window.
pub const PCI_WINDOW_64_BYTES: u64 = 64 << 30;

/// Ports for PCI BARs.
pub const PCI_PORTS: Range<u16> = 0xc000..0xf000;

/// The keyboard controller's interrupt.
pub const KEYBOARD_GSI: u32 = 1;
/// Where the PIT's ISA interrupt 0 arrives at the I/O APIC.
pub const PIT_GSI: u32 = 2;
/// The lines PCI interrupt pins are wired to, rotated by slot.
pub const PCI_GSIS: [u32; 4] = [16, 17, 18, 19];

/// What the firmware memory map calls a range (ACPI 6.5, table 15.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Usage {
    /// RAM.
    Ram = 1,
    /// Not for the operating system.
    Reserved = 2,
}

/// One entry of the firmware memory map ("e820").
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapEntry {
    /// Guest-physical addresses.
    pub range: Range<u64>,
    /// What they are for.
    pub usage: Usage,
}

/// The addresses that depend on the plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// RAM, `(start, bytes)`, ascending.
    pub ram: Vec<(Gpa, u64)>,
    /// What the guest is told about memory, ascending.
    pub memory_map: Vec<MapEntry>,
    /// Where PCI memory BARs above 4 GiB go.
    pub pci_window_64: Range<u64>,
}

impl Layout {
    /// The layout of `plan`.
    pub fn new(plan: &Plan) -> Self {
        let low = plan.memory.min(LOW_RAM_LIMIT);
        let high = plan.memory - low;
        let mut ram = vec![(Gpa(0), low)];
        let mut memory_map = vec![
            MapEntry { range: 0..LOW_MEMORY_END, usage: Usage::Ram },
            MapEntry { range: EBDA..VIDEO_HOLE.start, usage: Usage::Reserved },
            MapEntry { range: ACPI_TABLES.start..SMBIOS.end, usage: Usage::Reserved },
            MapEntry { range: HIGH_MEMORY..low, usage: Usage::Ram },
            MapEntry { range: ECAM..ECAM + ECAM_BYTES, usage: Usage::Reserved },
        ];
        if high > 0 {
            ram.push((Gpa(RAM_ABOVE_4G), high));
            memory_map.push(MapEntry { range: RAM_ABOVE_4G..RAM_ABOVE_4G + high, usage: Usage::Ram });
        }
        let window = (RAM_ABOVE_4G + high).next_multiple_of(1 << 30);
        Self { ram, memory_map, pci_window_64: window..window + PCI_WINDOW_64_BYTES }
    }

    /// The ranges of the memory map the guest may use as RAM, ascending.
    pub fn usable(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.memory_map.iter().filter(|entry| entry.usage == Usage::Ram).map(|entry| entry.range.clone())
    }

    /// One past the last byte of RAM below 4 GiB.
    pub fn low_ram_end(&self) -> u64 {
        self.ram[0].1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(memory: u64) -> Layout {
        Layout::new(&Plan { memory, ..Plan::new("vmlinuz") })
    }

    #[test]
    fn a_gigabyte_stays_below_the_hole() {
        let layout = layout(1 << 30);
        assert_eq!(layout.ram, [(Gpa(0), 1 << 30)]);
        assert_eq!(layout.usable().collect::<Vec<_>>(), [0..0x9_fc00, 0x10_0000..0x4000_0000]);
        assert_eq!(layout.pci_window_64, 0x1_0000_0000..0x11_0000_0000);
        assert_eq!(layout.low_ram_end(), 1 << 30);
    }

    #[test]
    fn memory_beyond_three_gigabytes_goes_above_four() {
        assert_eq!(layout(3 << 30).ram, [(Gpa(0), 3 << 30)]);
        let just_more = layout((3 << 30) + 0x1000);
        assert_eq!(just_more.ram, [(Gpa(0), 3 << 30), (Gpa(1 << 32), 0x1000)]);
        assert_eq!(just_more.memory_map.last().unwrap().range, 0x1_0000_0000..0x1_0000_1000);
        assert_eq!(just_more.pci_window_64.start, 0x1_4000_0000);
        assert_eq!(just_more.usable().count(), 3);
    }

    #[test]
    fn nothing_overlaps_whatever_the_size() {
        for memory in [2 << 20, 16 << 20, 3 << 30, (3 << 30) + 0x1000, 8 << 30, crate::plan::MAX_MEMORY] {
            let layout = layout(memory);
            assert_eq!(layout.ram.iter().map(|piece| piece.1).sum::<u64>(), memory);
            assert!(layout.memory_map.windows(2).all(|pair| pair[0].range.end <= pair[1].range.start), "{layout:?}");
            assert!(layout.memory_map.iter().all(|entry| !entry.range.is_empty()));
            for device in [IO_APIC, HPET, LOCAL_APIC, PCI_WINDOW_32.start, layout.pci_window_64.start] {
                assert!(layout.ram.iter().all(|&(start, bytes)| device.wrapping_sub(start.0) >= bytes));
            }
            assert!(layout.pci_window_64.end <= 1 << 40);
        }
    }
}
