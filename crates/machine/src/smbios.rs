//! SMBIOS tables (DMTF DSP0134, 3.0): who made the machine and how much memory it has, for guests that print or match it.
//!
//! ```text
//!   entry point, found by scanning 0xf0000..0x100000 ──> structures: formatted area, strings, two NULs ... 127
//! ```
//!
//! Deliberately absent: what CPUID, PCI and ACPI say better (processors, caches, slots), serial numbers, and an UUID: the
//! machine has none, and says so.

use memory::{Gpa, GuestRam};

use crate::acpi::checksum;
use crate::layout::{self, Layout};

/// Version of the specification: structures have the lengths it gives.
const VERSION: [u8; 3] = [3, 0, 0];
const ENTRY_BYTES: usize = 24;
/// Where the structures lie, behind the entry point.
const STRUCTURES: u64 = layout::SMBIOS.start + 0x20;
/// Handles: structures are numbered in order; this one means there is no such structure.
const NO_HANDLE: u16 = 0xfffe;

/// Structure types (chapter 7).
mod kind {
    pub(super) const FIRMWARE: u8 = 0;
    pub(super) const SYSTEM: u8 = 1;
    pub(super) const CHASSIS: u8 = 3;
    pub(super) const OEM_STRINGS: u8 = 11;
    pub(super) const MEMORY_ARRAY: u8 = 16;
    pub(super) const MEMORY_DEVICE: u8 = 17;
    pub(super) const MAPPED_ADDRESSES: u8 = 19;
    pub(super) const BOOT_STATUS: u8 = 32;
    pub(super) const END: u8 = 127;
}

const MAKER: &str = "Cordial";
const PRODUCT: &str = "Virtual machine";
/// Guests take a date before 2008 for a sign of old, broken firmware. It is no build's date: tables are the same anywhere.
const DATE: &str = "01/01/2026";

/// Writes the tables into their place.
///
/// # Errors
/// [`memory::Error`] where there is no memory below 1 MiB, which every machine has.
pub fn install(layout: &Layout, ram: &GuestRam) -> Result<(), memory::Error> {
    let structures = structures(layout, env!("CARGO_PKG_VERSION"));
    ram.write(Gpa(layout::SMBIOS.start), &entry_point(structures.len() as u32))?;
    ram.write(Gpa(STRUCTURES), &structures)
}

/// The 64-bit entry point (5.2.2), of structures of `bytes` bytes.
fn entry_point(bytes: u32) -> [u8; ENTRY_BYTES] {
    let mut entry = [0; ENTRY_BYTES];
    entry[..5].copy_from_slice(b"_SM3_");
    entry[6] = ENTRY_BYTES as u8;
    entry[7..10].copy_from_slice(&VERSION);
    entry[10] = 1; // revision of the entry point
    entry[12..16].copy_from_slice(&bytes.to_le_bytes());
    entry[16..].copy_from_slice(&STRUCTURES.to_le_bytes());
    entry[5] = checksum(&entry);
    entry
}

/// Structures, one after another.
#[derive(Default)]
struct Table {
    bytes: Vec<u8>,
    next_handle: u16,
}

impl Table {
    /// Adds a structure: what follows its header, and the strings that bytes in it count from 1. Returns its handle.
    fn add(&mut self, kind: u8, fields: &[&[u8]], strings: &[&str]) -> u16 {
        let handle = self.next_handle;
        self.next_handle += 1;
        let fields = fields.concat();
        self.bytes.extend([kind, 4 + fields.len() as u8]);
        self.bytes.extend(handle.to_le_bytes());
        self.bytes.extend(fields);
        for string in strings {
            self.bytes.extend(string.as_bytes());
            self.bytes.push(0);
        }
        // The set of strings ends with a NUL of its own; an empty one is two.
        self.bytes.extend(if strings.is_empty() { &[0, 0][..] } else { &[0] });
        handle
    }
}

/// All structures of a machine with the RAM of `layout`, made by `version` of this program.
fn structures(layout: &Layout, version: &str) -> Vec<u8> {
    let mut table = Table::default();
    // Vendor, version, segment, date, ROM of 64 KiB; no characteristics are told (7.1.1) but ACPI, and that this is a
    // virtual machine (7.1.2, bytes 1 and 2); release unknown.
    let characteristics = (1_u64 << 3).to_le_bytes();
    let firmware: &[&[u8]] = &[&[1, 2, 0, 0xf0, 3, 0], &characteristics, &[1, 1 << 4, 0xff, 0xff, 0xff, 0xff]];
    table.add(kind::FIRMWARE, firmware, &[MAKER, version, DATE]);
    // Maker, product, version, no serial number, no UUID, started by the power switch, no SKU, no family.
    let system: &[&[u8]] = &[&[1, 2, 3, 0], &[0; 16], &[6, 0, 0]];
    table.add(kind::SYSTEM, system, &[MAKER, PRODUCT, version]);
    // Maker, type "other", nothing else known; three states "safe", security "none"; no parts.
    table.add(kind::CHASSIS, &[&[1, 1, 0, 0, 0, 3, 3, 3, 3], &[0; 9]], &[MAKER]);
    table.add(kind::OEM_STRINGS, &[&[1]], &[&format!("cordial.version={version}")]);
    memory(&mut table, layout);
    table.add(kind::BOOT_STATUS, &[&[0; 6], &[0]], &[]); // no errors detected
    table.add(kind::END, &[], &[]);
    table.bytes
}

/// One array with one device, and where it answers.
fn memory(table: &mut Table, layout: &Layout) {
    let bytes: u64 = layout.ram.iter().map(|piece| piece.1).sum();
    // Place "other", system memory, no error correction. The capacity stands in the wide field alone.
    let array: &[&[u8]] = &[
        &[1, 3, 3],
        &0x8000_0000_u32.to_le_bytes(),
        &NO_HANDLE.to_le_bytes(),
        &1_u16.to_le_bytes(),
        &bytes.to_le_bytes(),
    ];
    let array = table.add(kind::MEMORY_ARRAY, array, &[]);
    let (size, extended) = device_size(bytes);
    let device: &[&[u8]] = &[
        &array.to_le_bytes(),
        &NO_HANDLE.to_le_bytes(),
        &[0xff; 4], // widths unknown
        &size.to_le_bytes(),
        &[1, 0, 1, 0, 7],     // form "other", no set, locator, no bank, type "RAM"
        &2_u16.to_le_bytes(), // detail "other"
        &[0; 7],              // speed, maker, serial number, asset tag, part number, rank unknown
        &extended.to_le_bytes(),
        &[0; 8], // speed and voltages unknown
    ];
    table.add(kind::MEMORY_DEVICE, device, &["RAM"]);
    for &(start, bytes) in &layout.ram {
        let last = (start.0 + bytes - 1) >> 10;
        let range: &[&[u8]] = &[
            &((start.0 >> 10) as u32).to_le_bytes(),
            &(last as u32).to_le_bytes(),
            &array.to_le_bytes(),
            &[1],     // one device wide
            &[0; 16], // no addresses that KiB in 32 bits cannot tell
        ];
        table.add(kind::MAPPED_ADDRESSES, range, &[]);
    }
}

/// A memory device's size and extended size (7.18.5): KiB with bit 15 set, MiB, or the extended field in MiB.
fn device_size(bytes: u64) -> (u16, u32) {
    const LIMIT: u64 = 0x7fff;
    match (bytes >> 10, bytes >> 20) {
        (kib, _) if kib < LIMIT => (kib as u16 | 0x8000, 0),
        (_, mib) if mib < LIMIT => (mib as u16, 0),
        (_, mib) => (LIMIT as u16, mib as u32),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Plan;

    fn layout(memory: u64) -> Layout {
        Layout::new(&Plan { memory, ..Plan::new("vmlinuz") })
    }

    /// Structures as type, formatted area with header, strings: read as a guest reads them.
    fn parse(mut bytes: &[u8]) -> Vec<(u8, Vec<u8>, Vec<String>)> {
        let mut found = Vec::new();
        while let [kind, length, ..] = *bytes {
            let (fields, rest) = bytes.split_at(length.into());
            let end = rest.windows(2).position(|pair| pair == [0, 0]).unwrap();
            let strings = rest[..end].split(|&byte| byte == 0).filter(|string| !string.is_empty());
            let strings = strings.map(|string| String::from_utf8(string.to_vec()).unwrap()).collect();
            found.push((kind, fields.to_vec(), strings));
            bytes = &rest[end + 2..];
        }
        found
    }

    #[test]
    fn the_entry_point_sums_to_zero_and_leads_to_the_structures() {
        let ram = GuestRam::new(&[(Gpa(0), 2 << 20)]).unwrap();
        install(&layout(2 << 20), &ram).unwrap();
        let mut entry = [0; ENTRY_BYTES];
        ram.read(Gpa(0xf_0000), &mut entry).unwrap();
        assert_eq!(&entry[..5], b"_SM3_");
        assert_eq!(entry.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        let length = u32::from_le_bytes(entry[12..16].try_into().unwrap());
        let address = u64::from_le_bytes(entry[16..24].try_into().unwrap());
        let mut bytes = vec![0; length as usize];
        ram.read(Gpa(address), &mut bytes).unwrap();
        assert_eq!(parse(&bytes).last().unwrap().0, kind::END);
        assert!(address + u64::from(length) <= layout::SMBIOS.end);
    }

    #[test]
    fn structures_have_the_lengths_and_strings_of_the_specification() {
        let found = parse(&structures(&layout(4 << 30), "1.2.3"));
        let kinds: Vec<_> = found.iter().map(|(kind, fields, _)| (*kind, fields.len())).collect();
        let wanted = [
            (0, 0x18),
            (1, 0x1b),
            (3, 0x16),
            (11, 5),
            (16, 0x17),
            (17, 0x28),
            (19, 0x1f),
            (19, 0x1f),
            (32, 11),
            (127, 4),
        ];
        assert_eq!(kinds, wanted);
        for (number, (_, fields, _)) in found.iter().enumerate() {
            assert_eq!(usize::from(fields[2]), number, "handles count up");
        }
        assert_eq!(found[0].2, ["Cordial", "1.2.3", "01/01/2026"]);
        assert_eq!(found[0].1[0x13] & 1 << 4, 1 << 4, "it is a virtual machine");
        assert_eq!(found[1].2, ["Cordial", "Virtual machine", "1.2.3"]);
        assert_eq!(found[3].2, ["cordial.version=1.2.3"]);
    }

    #[test]
    fn memory_is_told_whatever_its_size() {
        for (memory, size) in [
            (2 << 20, (0x8800, 0)),
            ((2 << 20) + 4096, (0x8804, 0)),
            (1 << 30, (1024, 0)),
            (31 << 30, (31 << 10, 0)),
            (32 << 30, (0x7fff, 32 << 10)),
            (crate::plan::MAX_MEMORY, (0x7fff, 512 << 10)),
        ] {
            assert_eq!(device_size(memory), size);
            let found = parse(&structures(&layout(memory), "1"));
            let word = |fields: &[u8], at: usize| u32::from_le_bytes(fields[at..at + 4].try_into().unwrap());
            let mapped = found.iter().filter(|found| found.0 == kind::MAPPED_ADDRESSES);
            let kib: u64 = mapped.map(|(_, f, _)| u64::from(word(f, 8)) - u64::from(word(f, 4)) + 1).sum();
            assert_eq!(kib << 10, memory);
        }
    }
}
