//! What guests expect a PC's firmware to have left in low memory (the BIOS data area, as IBM's PC AT laid it out).

use memory::{Gpa, GuestRam};

use crate::layout;

/// Words of the BIOS data area: I/O port of the first serial port.
const SERIAL_PORT: Gpa = Gpa(0x400);
/// Segment of the extended BIOS data area: where guests look for an RSDP, and what ends conventional memory.
const EBDA_SEGMENT: Gpa = Gpa(0x40e);
/// Conventional memory, KiB.
const MEMORY_KIB: Gpa = Gpa(0x413);

/// Writes it.
///
/// # Errors
/// [`memory::Error`] where there is no memory below 1 MiB, which every machine has.
pub(crate) fn leave_behind(ram: &GuestRam) -> Result<(), memory::Error> {
    ram.write_value(SERIAL_PORT, &device::emulated::serial::COM1)?;
    ram.write_value(EBDA_SEGMENT, &((layout::EBDA >> 4) as u16))?;
    ram.write_value(MEMORY_KIB, &((layout::LOW_MEMORY_END >> 10) as u16))?;
    // The first byte of the extended area is its own size in KiB.
    ram.write_value(Gpa(layout::EBDA), &1_u8)
}
