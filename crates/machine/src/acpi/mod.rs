//! ACPI tables (ACPI 6.5): what the machine has and where, for guests that ask firmware.
//!
//! ```text
//!   RSDP 0xe0000 ─┬─> RSDT (32-bit pointers, for old guests) ─┐
//!                 └─> XSDT ───────────────────────────────────┴─> FADT ─┬─> FACS
//!                                                                 MADT   └─> DSDT: PCI host bridge, COM1, RTC, S5
//!                                                                 MCFG
//!                                                                 HPET
//! ```
//!
//! Not the hardware-reduced profile: that would take away the PIC and the PM timer, by which unaware guests calibrate,
//! and the legacy path by which `ttyS0` gets its interrupt.

mod dsdt;

use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::mcfg::MCFG;
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, facs::FACS};
use device::emulated::acpi as power;
use device::emulated::reset::ResetControl;
use device::pci::Route;
use memory::{Gpa, GuestRam};

use crate::layout::{self, Layout};

const OEM_ID: [u8; 6] = *b"CORDIL";
const OEM_TABLE_ID: [u8; 8] = *b"CORDIAL ";
const OEM_REVISION: u32 = 1;
/// Signature, length, revision, checksum, OEM and creator fields (table 5.4).
const HEADER_BYTES: u32 = 36;
/// The FACS must lie at a multiple of this (5.2.10); the others do not mind.
const ALIGN: u64 = 64;

/// FADT.IAPC_BOOT_ARCH (table 5.10): there are devices on the legacy bus (COM1) and no VGA is to be looked for. The bit
/// for a keyboard controller (1) stays clear, and the DSDT has no PNP0303: what answers at ports 0x60 and 0x64 is there
/// for guests that reset by it or do not ask; to probe it for a keyboard costs time, and finds none.
const LEGACY_DEVICES: u16 = 1 << 0;
/// See [`LEGACY_DEVICES`].
const NO_VGA: u16 = 1 << 2;
/// A C-state latency that says "not there" (tables 5.9: more than 100 and 1000 µs).
const NO_C_STATE: u16 = 0xfff;

/// MADT flags: the dual 8259s are there and must be masked (table 5.19).
const PCAT_COMPATIBLE: u32 = 1;
/// Interrupt source override: level-triggered, active high (table 5.26).
const LEVEL_HIGH: u16 = 0b11 << 2 | 0b01;
/// Interrupt source override: as the bus does it, edge and active high for ISA.
const AS_THE_BUS: u16 = 0;

/// What the tables say beside what the layout fixes.
#[derive(Clone, Debug)]
pub struct Description {
    /// vCPUs; APIC ids count from 0.
    pub cpus: u32,
    /// Low half of the HPET's capability register: comparators, width, vendor (IA-PC HPET 1.0a, 2.3.4).
    pub hpet_id: u32,
    /// The RTC's century byte in CMOS, 0 for none.
    pub century: u8,
    /// Which interrupt each PCI slot's pins are wired to.
    pub interrupt_routes: Vec<Route>,
}

/// Writes all tables into their place.
///
/// # Errors
/// [`memory::Error`] where they do not fit, which no number of vCPUs makes happen.
pub fn install(description: &Description, layout: &Layout, ram: &GuestRam) -> Result<(), memory::Error> {
    for (address, table) in tables(description, layout) {
        ram.write(address, &table)?;
    }
    Ok(())
}

/// All tables and where they go, the RSDP first.
fn tables(description: &Description, layout: &Layout) -> Vec<(Gpa, Vec<u8>)> {
    let mut placed = Placed { next: layout::RSDP.0 + ALIGN, tables: Vec::new() };
    let dsdt = placed.add(&dsdt::table(description, layout));
    let facs = placed.add(&FACS::new());
    let fadt = placed.add(&fadt(description, dsdt, facs));
    let madt = placed.add(&madt(description.cpus));
    let mcfg = placed.add(&mcfg());
    let hpet = placed.add(&hpet(description.hpet_id));
    let listed = [fadt, madt, mcfg, hpet];
    // Every address is below 1 MiB.
    let rsdt = placed.add(&pointers(*b"RSDT", listed.iter().flat_map(|at| (*at as u32).to_le_bytes()).collect()));
    let xsdt = placed.add(&pointers(*b"XSDT", listed.iter().flat_map(|at| at.to_le_bytes()).collect()));
    placed.tables.insert(0, (layout::RSDP, rsdp(rsdt, xsdt).to_vec()));
    placed.tables
}

struct Placed {
    next: u64,
    tables: Vec<(Gpa, Vec<u8>)>,
}

impl Placed {
    fn add(&mut self, table: &dyn Aml) -> u64 {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        let address = self.next;
        self.next = (address + bytes.len() as u64).next_multiple_of(ALIGN);
        self.tables.push((Gpa(address), bytes));
        address
    }
}

fn sdt(signature: [u8; 4], revision: u8) -> Sdt {
    Sdt::new(signature, HEADER_BYTES, revision, OEM_ID, OEM_TABLE_ID, OEM_REVISION)
}

fn pointers(signature: [u8; 4], addresses: Vec<u8>) -> Sdt {
    let mut table = sdt(signature, 1);
    table.append_slice(&addresses);
    table
}

/// Root System Description Pointer (5.2.5.3). Both pointers are given: bare-metal guests often know the RSDT only.
fn rsdp(rsdt: u64, xsdt: u64) -> [u8; 36] {
    let mut bytes = [0; 36];
    bytes[..8].copy_from_slice(b"RSD PTR ");
    bytes[9..15].copy_from_slice(&OEM_ID);
    bytes[15] = 2; // revision
    bytes[16..20].copy_from_slice(&(rsdt as u32).to_le_bytes());
    bytes[20] = 36; // length
    bytes[24..32].copy_from_slice(&xsdt.to_le_bytes());
    bytes[8] = checksum(&bytes[..20]);
    bytes[32] = checksum(&bytes);
    bytes
}

/// What makes the sum of all bytes zero.
pub(crate) fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_sub(*byte))
}

fn port(address: u16, bits: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, bits, 0, access, address.into())
}

/// Fixed ACPI Description Table (5.2.9): ACPI mode always, so no SMI command port.
fn fadt(description: &Description, dsdt: u64, facs: u64) -> impl Aml + use<> {
    let mut table = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::TmrValExt) // the PM timer has 32 bits
        .flag(Flags::SlpButton) // no sleep button in the fixed registers
        .flag(Flags::FixRtc) // the RTC does not wake
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless);
    table.firmware_ctrl = (facs as u32).into();
    table.dsdt = (dsdt as u32).into();
    table.x_dsdt = dsdt.into();
    table.sci_int = (power::SCI_GSI as u16).into();
    let at = |offset| power::PORT + offset;
    let (event, control, timer, gpe) =
        (at(power::PM1_EVENT), at(power::PM1_CONTROL), at(power::PM_TIMER), at(power::GPE0));
    table.pm1a_evt_blk = u32::from(event).into();
    table.pm1a_cnt_blk = u32::from(control).into();
    table.pm_tmr_blk = u32::from(timer).into();
    table.gpe0_blk = u32::from(gpe).into();
    (table.pm1_evt_len, table.pm1_cnt_len, table.pm_tmr_len) = (4, 2, 4);
    table.gpe0_blk_len = power::GPE0_LENGTH;
    table.x_pm1a_evt_blk = port(event, 32, AccessSize::WordAccess);
    table.x_pm1a_cnt_blk = port(control, 16, AccessSize::WordAccess);
    table.x_pm_tmr_blk = port(timer, 32, AccessSize::DwordAccess);
    table.x_gpe0_blk = port(gpe, 8 * power::GPE0_LENGTH, AccessSize::ByteAccess);
    table.p_lvl2_lat = NO_C_STATE.into();
    table.p_lvl3_lat = NO_C_STATE.into();
    table.century = description.century;
    table.iapc_boot_arch = (LEGACY_DEVICES | NO_VGA).into();
    table.reset_reg = port(ResetControl::PORT, 8, AccessSize::ByteAccess);
    table.reset_value = ResetControl::RESET_VALUE;
    table.finalize()
}

/// Multiple APIC Description Table (5.2.12).
fn madt(cpus: u32) -> Sdt {
    let mut table = sdt(*b"APIC", 5);
    let mut entries = Vec::new();
    entries.extend((layout::LOCAL_APIC as u32).to_le_bytes());
    entries.extend(PCAT_COMPATIBLE.to_le_bytes());
    for id in 0..cpus {
        // Processor local APIC: type, length, processor uid, APIC id, flags (enabled). Ids stay below 255, so the
        // x2APIC form of the entry is not needed; the mode is the guest's choice.
        entries.extend([0, 8, id as u8, id as u8, 1, 0, 0, 0]);
    }
    // I/O APIC: type, length, id, reserved, address, first GSI.
    entries.extend([1, 12, 0, 0]);
    entries.extend((layout::IO_APIC as u32).to_le_bytes());
    entries.extend(0_u32.to_le_bytes());
    // Interrupt source overrides: type, length, bus (ISA), source, GSI, flags.
    for (source, gsi, flags) in [(0, layout::PIT_GSI, AS_THE_BUS), (power::SCI_GSI as u8, power::SCI_GSI, LEVEL_HIGH)] {
        entries.extend([2, 10, 0, source]);
        entries.extend(gsi.to_le_bytes());
        entries.extend(flags.to_le_bytes());
    }
    // Local APIC NMI: type, length, all processors, flags, LINT1.
    entries.extend([4, 6, 0xff, 0, 0, 1]);
    table.append_slice(&entries);
    table
}

/// PCI Express memory-mapped configuration space (PCI Firmware 3.3, 4.1.2).
fn mcfg() -> impl Aml {
    let mut table = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.add_ecam(layout::ECAM, 0, 0, 0);
    table
}

/// HPET description table (IA-PC HPET 1.0a, 3.2.4).
fn hpet(id: u32) -> Sdt {
    let mut table = sdt(*b"HPET", 1);
    table.append_slice(&id.to_le_bytes());
    table.append_slice(&[0, 64, 0, 0]); // memory space, 64 bits wide
    table.append_slice(&layout::HPET.to_le_bytes());
    table.append_slice(&[0]); // the first HPET
    table.append_slice(&MINIMUM_TICK.to_le_bytes());
    table.append_slice(&[0]); // no page protection
    table
}

/// The shortest period in ticks that loses no interrupt in periodic mode.
const MINIMUM_TICK: u16 = 0x80;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Plan;
    use device::pci::Slot;

    fn description(cpus: u32) -> Description {
        let pins = (0..32).flat_map(|slot| (0..4).map(move |pin| (slot, pin)));
        let interrupt_routes = pins.map(|(slot, pin)| Route { slot: Slot(slot), pin, gsi: 16 }).collect();
        Description { cpus, hpet_id: 0x8086_a201, century: 0x32, interrupt_routes }
    }

    fn made(cpus: u32) -> Vec<(Gpa, Vec<u8>)> {
        tables(&description(cpus), &Layout::new(&Plan::new("vmlinuz")))
    }

    fn word(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    #[test]
    fn every_table_sums_to_zero_and_every_pointer_points_at_one() {
        let tables = made(3);
        let find = |address: u32| &tables.iter().find(|(at, _)| at.0 == u64::from(address)).unwrap().1;
        for (_, table) in &tables {
            if !table.starts_with(b"FACS") {
                assert_eq!(table.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)), 0);
            }
            if !table.starts_with(b"RSD PTR ") {
                assert_eq!(word(table, 4) as usize, table.len());
            }
        }
        let rsdp = find(0xe_0000);
        assert_eq!(rsdp[..20].iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        let (rsdt, xsdt) = (find(word(rsdp, 16)), find(word(rsdp, 24)));
        assert_eq!((&rsdt[..4], &xsdt[..4]), (&b"RSDT"[..], &b"XSDT"[..]));
        for (index, name) in [b"FACP", b"APIC", b"MCFG", b"HPET"].into_iter().enumerate() {
            assert_eq!(&find(word(rsdt, 36 + 4 * index))[..4], name);
            assert_eq!(&find(word(xsdt, 36 + 8 * index))[..4], name);
        }
        let fadt = find(word(rsdt, 36));
        assert_eq!((&find(word(fadt, 36))[..4], &find(word(fadt, 40))[..4]), (&b"FACS"[..], &b"DSDT"[..]));
        assert_eq!(word(fadt, 36) % 64, 0);
    }

    #[test]
    fn the_most_vcpus_fit() {
        let tables = made(crate::plan::MAX_CPUS);
        let end = tables.iter().map(|(at, table)| at.0 + table.len() as u64).max().unwrap();
        assert!(end <= layout::ACPI_TABLES.end, "{end:#x}");
        let mut sorted: Vec<_> = tables.iter().map(|(at, table)| at.0..at.0 + table.len() as u64).collect();
        sorted.sort_by_key(|range| range.start);
        assert!(sorted.windows(2).all(|pair| pair[0].end <= pair[1].start));
    }

    #[test]
    fn the_madt_names_every_vcpu_and_the_interrupt_overrides() {
        let tables = made(2);
        let madt = &tables.iter().find(|(_, table)| table.starts_with(b"APIC")).unwrap().1;
        assert_eq!((word(madt, 36), word(madt, 40)), (0xfee0_0000, 1));
        assert_eq!(madt[44..60], [0, 8, 0, 0, 1, 0, 0, 0, 0, 8, 1, 1, 1, 0, 0, 0]);
        assert_eq!(madt[60..72], [1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
        assert_eq!(madt[72..92], [2, 10, 0, 0, 2, 0, 0, 0, 0, 0, 2, 10, 0, 9, 9, 0, 0, 0, 0xd, 0]);
        assert_eq!(madt[92..], [4, 6, 0xff, 0, 0, 1]);
    }
}
