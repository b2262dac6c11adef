//! The Differentiated System Description Table: devices that cannot be enumerated otherwise, in AML.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, PackageBuilder,
    Path, ResourceTemplate, Scope,
};
use acpi_tables::sdt::Sdt;
use device::emulated::{acpi as power, hpet, rtc, serial};
use device::pci::Route;

use super::{Description, sdt};
use crate::layout::{self, Layout};

/// The whole table.
pub(super) fn table(description: &Description, layout: &Layout) -> Sdt {
    let mut aml = Vec::new();
    let off = power::S5_SLEEP_TYPE;
    Name::new("_S5_".into(), &Package::new(vec![&off, &off, &0_u8, &0_u8])).to_aml_bytes(&mut aml);
    let (devices, processors) = (devices(description, layout), processors(description.cpus));
    let children: Vec<&dyn Aml> = devices.iter().chain(&processors).map(|raw| raw as &dyn Aml).collect();
    Scope::new("_SB_".into(), children).to_aml_bytes(&mut aml);
    let mut table = sdt(*b"DSDT", 2);
    table.append_slice(&aml);
    table
}

/// AML that has been built already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

fn raw(object: &dyn Aml) -> Raw {
    let mut bytes = Vec::new();
    object.to_aml_bytes(&mut bytes);
    Raw(bytes)
}

/// A device with a hardware id, an instance number and what it occupies.
fn device(name: &str, id: &str, instance: u8, resources: Vec<&dyn Aml>, more: Vec<&dyn Aml>) -> Raw {
    let id = Name::new("_HID".into(), &EISAName::new(id));
    let instance = Name::new("_UID".into(), &instance);
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(resources));
    let mut children: Vec<&dyn Aml> = vec![&id, &instance, &resources];
    children.extend(more);
    raw(&Device::new(Path::new(name), children))
}

fn devices(description: &Description, layout: &Layout) -> [Raw; 7] {
    let ports = |start: u16, length: u8| IO::new(start, start, 0, length);
    // Consumer, edge, active high, exclusive: ISA.
    let isa = |gsi| Interrupt::new(true, true, false, false, gsi);
    [
        host_bridge(&description.interrupt_routes, layout),
        // Tells the guest that nobody else may have the configuration space (PCI Firmware 3.3, 4.1.2) or the PM ports.
        device(
            "MBRD",
            "PNP0C02",
            0,
            vec![
                &Memory32Fixed::new(true, layout::ECAM as u32, layout::ECAM_BYTES as u32),
                &ports(power::PORT, power::LENGTH as u8),
            ],
            vec![],
        ),
        device("PIC_", "PNP0000", 0, vec![&ports(0x20, 2), &ports(0xa0, 2), &isa(2)], vec![]),
        device("PIT_", "PNP0100", 0, vec![&ports(0x40, 4), &isa(0)], vec![]),
        device("RTC_", "PNP0B00", 0, vec![&ports(rtc::PORT, 2), &isa(rtc::IRQ)], vec![]),
        device("COM1", "PNP0501", 1, vec![&ports(serial::COM1, 8), &isa(serial::COM1_IRQ)], vec![]),
        device(
            "HPET",
            "PNP0103",
            0,
            vec![&Memory32Fixed::new(false, layout::HPET as u32, hpet::LENGTH as u32)],
            vec![],
        ),
    ]
}

/// A conventional host bridge (PNP0A03): with PNP0A08 a guest would negotiate hot-plug and power management by `_OSC`,
/// of which there is none.
fn host_bridge(routes: &[Route], layout: &Layout) -> Raw {
    use AddressSpaceCacheable::NotCacheable;
    let window = &layout.pci_window_64;
    let io = &layout::PCI_PORTS;
    let memory = &layout::PCI_WINDOW_32;
    device(
        "PCI0",
        "PNP0A03",
        0,
        vec![
            &AddressSpace::<u16>::new_bus_number(0, 0),
            &IO::new(0xcf8, 0xcf8, 1, 8),
            &AddressSpace::new_io(io.start, io.end - 1, None),
            &AddressSpace::new_memory(NotCacheable, true, memory.start as u32, (memory.end - 1) as u32, None),
            &AddressSpace::new_memory(NotCacheable, true, window.start, window.end - 1, None),
        ],
        vec![
            &Name::new("_SEG".into(), &0_u8),
            &Name::new("_BBN".into(), &0_u8),
            &Name::new("_PRT".into(), &routing(routes)),
        ],
    )
}

/// Which interrupt each pin of each slot on bus 0 raises (6.2.13): wired, so without link devices.
fn routing(routes: &[Route]) -> PackageBuilder {
    let mut table = PackageBuilder::new();
    for route in routes {
        let address = u32::from(route.slot.0) << 16 | 0xffff;
        table.add_element(&Package::new(vec![&address, &route.pin, &0_u8, &route.gsi]));
    }
    table
}

/// Processor devices, whose `_UID` ties them to the MADT.
fn processors(cpus: u32) -> Vec<Raw> {
    (0..cpus as u8)
        .map(|index| {
            let id = Name::new("_HID".into(), &"ACPI0007");
            let instance = Name::new("_UID".into(), &index);
            raw(&Device::new(Path::new(&format!("CP{index:02X}")), vec![&id, &instance]))
        })
        .collect()
}
