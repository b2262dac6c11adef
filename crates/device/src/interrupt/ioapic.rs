//! The I/O APIC: 24 pins, each with a redirection entry (Intel 82093AA datasheet; version 20h with the EOI register
//! of the ICH family's).
//!
//! ```text
//!   pin n ──> redirection entry n ──> Message ──> local APICs
//!                 ^  remote IRR: set when a level interrupt is accepted,
//!                 └── cleared by the EOI broadcast of its vector; a line still asserted interrupts again
//! ```
//!
//! Lines are logical here: true is asserted, whatever polarity the guest's tables promised, so the polarity bit is
//! kept and not acted on. Delivery is at once, so delivery status reads 0. ExtINT entries are not wired to the PIC,
//! whose output goes to LINT0 only.

use super::message::{DeliveryMode, Destination, Message};

/// Where the window is, in all machines.
pub const BASE: u64 = 0xfec0_0000;
/// How much the window covers.
pub const LENGTH: u64 = 0x1000;
/// Pins.
pub const PINS: usize = 24;

/// Offsets in the window (82093AA 3.1; ICH9 13.5.1 for EOI).
const IOREGSEL: u64 = 0x00;
const IOWIN: u64 = 0x10;
const EOI: u64 = 0x40;

/// What IOREGSEL selects (82093AA 3.2).
const ID: u8 = 0x00;
const VERSION: u8 = 0x01;
const ARBITRATION: u8 = 0x02;
const REDIRECTION: u8 = 0x10;
const REDIRECTION_END: u8 = REDIRECTION + 2 * PINS as u8 - 1;

const VERSION_VALUE: u32 = 0x20 | (PINS as u32 - 1) << 16;
const ID_MASK: u32 = 0x0f00_0000;

/// Redirection entry bits (82093AA 3.2.4). The high half holds the destination in 63:56, and bits 14:8 of an extended
/// destination id in 55:49.
mod entry {
    pub(super) const LOGICAL: u32 = 1 << 11;
    pub(super) const REMOTE_IRR: u32 = 1 << 14;
    pub(super) const LEVEL: u32 = 1 << 15;
    pub(super) const MASKED: u32 = 1 << 16;
    /// Vector, mode, destination mode, polarity, trigger, mask.
    pub(super) const LOW_WRITABLE: u32 = 0x0001_afff;
    pub(super) const HIGH_WRITABLE: u32 = 0xfffe_0000;
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    low: u32,
    high: u32,
}

impl Entry {
    fn has(self, bits: u32) -> bool {
        self.low & bits != 0
    }

    fn message(self) -> Message {
        let id = self.high >> 24 | (self.high >> 17 & 0x7f) << 8;
        Message {
            vector: self.low as u8,
            mode: DeliveryMode::from_register(self.low),
            level: self.has(entry::LEVEL),
            destination: Destination { logical: self.has(entry::LOGICAL), id, wide: false },
        }
    }
}

/// The I/O APIC's state. Whoever holds it passes `deliver`, which hands a message to the local APICs and says whether
/// any accepted it.
#[derive(Clone, Debug)]
pub struct IoApic {
    select: u8,
    id: u32,
    arbitration: u32,
    entries: [Entry; PINS],
    /// Levels of the pins; they belong to the devices and survive reset.
    lines: u32,
}

impl Default for IoApic {
    fn default() -> Self {
        Self { select: 0, id: 0, arbitration: 0, entries: [Entry { low: entry::MASKED, high: 0 }; PINS], lines: 0 }
    }
}

impl IoApic {
    /// RESET: every entry masked.
    pub fn reset(&mut self) {
        *self = Self { lines: self.lines, ..Self::default() };
    }

    /// A pin changes its level. Pins past the last do not exist.
    pub fn set_line(&mut self, pin: usize, level: bool, deliver: &mut dyn FnMut(&Message) -> bool) {
        let Some(entry) = self.entries.get(pin) else { return };
        let was = self.lines & (1 << pin) != 0;
        self.lines = self.lines & !(1 << pin) | u32::from(level) << pin;
        if entry.has(entry::LEVEL) {
            self.service_level(pin, deliver);
        } else if level && !was && !entry.has(entry::MASKED) {
            // An edge on a masked pin is lost (82093AA 3.2.4, interrupt mask).
            deliver(&entry.message());
        }
    }

    /// The EOI of `vector`, broadcast by a local APIC or written to the EOI register.
    pub fn end_of_interrupt(&mut self, vector: u8, deliver: &mut dyn FnMut(&Message) -> bool) {
        for pin in 0..PINS {
            let entry = &mut self.entries[pin];
            if entry.low as u8 == vector && entry.has(entry::LEVEL) && entry.has(entry::REMOTE_IRR) {
                entry.low &= !entry::REMOTE_IRR;
                self.service_level(pin, deliver);
            }
        }
    }

    /// Sends every level interrupt that is asserted and waits for nothing: one that nobody accepted.
    pub fn send_waiting(&mut self, deliver: &mut dyn FnMut(&Message) -> bool) {
        (0..PINS).for_each(|pin| self.service_level(pin, deliver));
    }

    /// What each pin sends, where it is level-triggered: masked or not, since the end of one that is in service comes all
    /// the same.
    pub fn level_messages(&self) -> [Option<Message>; PINS] {
        self.entries.map(|entry| entry.has(entry::LEVEL).then(|| entry.message()))
    }

    /// A load from the window. IOWIN answers 32-bit loads only; elsewhere zero.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let value = match offset {
            IOREGSEL => u32::from(self.select),
            IOWIN if data.len() == 4 => self.read_selected(),
            _ => 0,
        };
        data.fill(0);
        data.iter_mut().zip(value.to_le_bytes()).for_each(|(to, from)| *to = from);
    }

    /// A store to the window. IOREGSEL takes its low byte at any width, IOWIN and EOI 32 bits only.
    pub fn write(&mut self, offset: u64, data: &[u8], deliver: &mut dyn FnMut(&Message) -> bool) {
        match (offset, data, <[u8; 4]>::try_from(data)) {
            (IOREGSEL, [select, ..], _) => self.select = *select,
            (IOWIN, _, Ok(bytes)) => self.write_selected(u32::from_le_bytes(bytes), deliver),
            (EOI, _, Ok(bytes)) => self.end_of_interrupt(bytes[0], deliver),
            _ => {}
        }
    }

    fn read_selected(&self) -> u32 {
        match self.select {
            ID => self.id,
            VERSION => VERSION_VALUE,
            ARBITRATION => self.arbitration,
            REDIRECTION..=REDIRECTION_END => {
                let entry = self.entries[usize::from(self.select - REDIRECTION) / 2];
                if self.select & 1 == 0 { entry.low } else { entry.high }
            }
            _ => 0,
        }
    }

    fn write_selected(&mut self, value: u32, deliver: &mut dyn FnMut(&Message) -> bool) {
        match self.select {
            // The arbitration id is loaded with the APIC id (82093AA 3.2.3).
            ID => {
                self.id = value & ID_MASK;
                self.arbitration = self.id;
            }
            REDIRECTION..=REDIRECTION_END => {
                let pin = usize::from(self.select - REDIRECTION) / 2;
                let entry = &mut self.entries[pin];
                if self.select & 1 == 0 {
                    let kept = entry.low & entry::REMOTE_IRR;
                    entry.low = value & entry::LOW_WRITABLE;
                    // Remote IRR has no meaning for edges; switching to edge and back is how guests clear a stuck one.
                    if entry.has(entry::LEVEL) {
                        entry.low |= kept;
                    }
                } else {
                    entry.high = value & entry::HIGH_WRITABLE;
                }
                self.service_level(pin, deliver);
            }
            _ => {}
        }
    }

    /// Sends a level interrupt that is asserted, not masked, and not being serviced already.
    fn service_level(&mut self, pin: usize, deliver: &mut dyn FnMut(&Message) -> bool) {
        let entry = &mut self.entries[pin];
        let asserted = self.lines & (1 << pin) != 0;
        let quiet = entry.has(entry::MASKED) || entry.has(entry::REMOTE_IRR) || !entry.has(entry::LEVEL);
        // Where nobody accepted it, the next write or EOI tries again.
        if asserted && !quiet && deliver(&entry.message()) {
            entry.low |= entry::REMOTE_IRR;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Selects and writes one register; returns what was delivered.
    fn set(ioapic: &mut IoApic, register: u8, value: u32) -> Vec<Message> {
        let mut delivered = Vec::new();
        ioapic.write(IOREGSEL, &[register], &mut |_| true);
        ioapic.write(IOWIN, &value.to_le_bytes(), &mut |message| {
            delivered.push(*message);
            true
        });
        delivered
    }

    fn get(ioapic: &mut IoApic, register: u8) -> u32 {
        ioapic.write(IOREGSEL, &u32::from(register).to_le_bytes(), &mut |_| true);
        let mut data = [0; 4];
        ioapic.read(IOWIN, &mut data);
        u32::from_le_bytes(data)
    }

    fn line(ioapic: &mut IoApic, pin: usize, level: bool) -> usize {
        let mut count = 0;
        ioapic.set_line(pin, level, &mut |_| {
            count += 1;
            true
        });
        count
    }

    fn eoi(ioapic: &mut IoApic, vector: u8) -> usize {
        let mut count = 0;
        ioapic.end_of_interrupt(vector, &mut |_| {
            count += 1;
            true
        });
        count
    }

    #[test]
    fn identification_registers_hold_what_the_datasheet_lets_them() {
        let mut ioapic = IoApic::default();
        assert_eq!(get(&mut ioapic, VERSION), 0x0017_0020);
        set(&mut ioapic, VERSION, 0xffff_ffff);
        assert_eq!(get(&mut ioapic, VERSION), 0x0017_0020);
        set(&mut ioapic, ID, 0xffff_ffff);
        assert_eq!(get(&mut ioapic, ID), ID_MASK);
        assert_eq!(get(&mut ioapic, ARBITRATION), ID_MASK);
        set(&mut ioapic, ARBITRATION, 0);
        assert_eq!(get(&mut ioapic, ARBITRATION), ID_MASK);
        assert_eq!(get(&mut ioapic, REDIRECTION), entry::MASKED);
        assert_eq!(get(&mut ioapic, 0xff), 0);
    }

    #[test]
    fn the_window_takes_only_aligned_words() {
        let mut ioapic = IoApic::default();
        ioapic.write(IOREGSEL, &[VERSION], &mut |_| true);
        let mut byte = [0xaa];
        ioapic.read(IOWIN, &mut byte);
        assert_eq!(byte, [0]);
        let mut wide = [0xaa; 64];
        ioapic.read(IOREGSEL, &mut wide);
        assert_eq!(wide[..2], [VERSION, 0]);
        ioapic.write(0x12, &[0; 64], &mut |_| true);
        ioapic.write(IOREGSEL, &[], &mut |_| true);
        assert_eq!(get(&mut ioapic, VERSION), 0x0017_0020);
    }

    #[test]
    fn an_edge_interrupts_once_and_is_lost_while_masked() {
        let mut ioapic = IoApic::default();
        assert_eq!(line(&mut ioapic, 14, true), 0);
        assert_eq!(set(&mut ioapic, REDIRECTION + 28, 0x31), [], "unmasking an edge pin that is high is not an edge");
        assert_eq!(line(&mut ioapic, 14, true), 0);
        assert_eq!(line(&mut ioapic, 14, false), 0);
        assert_eq!(line(&mut ioapic, 14, true), 1);
        assert_eq!(get(&mut ioapic, REDIRECTION + 28), 0x31, "no remote IRR for an edge");
        assert_eq!(line(&mut ioapic, 24, true), 0, "no such pin");
    }

    #[test]
    fn a_level_interrupts_until_it_falls() {
        let mut ioapic = IoApic::default();
        assert_eq!(line(&mut ioapic, 9, true), 0);
        let delivered = set(&mut ioapic, REDIRECTION + 18, entry::LEVEL | 0x41);
        assert_eq!(delivered.len(), 1, "unmasking an asserted level interrupts");
        assert!(delivered[0].level);
        assert_eq!(get(&mut ioapic, REDIRECTION + 18), entry::LEVEL | entry::REMOTE_IRR | 0x41);
        assert_eq!(line(&mut ioapic, 9, false), 0);
        assert_eq!(line(&mut ioapic, 9, true), 0, "coalesced while it is serviced");
        assert_eq!(eoi(&mut ioapic, 0x40), 0);
        assert_eq!(eoi(&mut ioapic, 0x41), 1, "still asserted");
        line(&mut ioapic, 9, false);
        assert_eq!(eoi(&mut ioapic, 0x41), 0);
        assert_eq!(get(&mut ioapic, REDIRECTION + 18), entry::LEVEL | 0x41);
    }

    #[test]
    fn a_level_nobody_accepts_stays_pending() {
        let mut ioapic = IoApic::default();
        set(&mut ioapic, REDIRECTION, entry::LEVEL | 0x41);
        ioapic.set_line(0, true, &mut |_| false);
        assert_eq!(get(&mut ioapic, REDIRECTION), entry::LEVEL | 0x41);
        assert_eq!(set(&mut ioapic, REDIRECTION + 1, 0).len(), 1);
    }

    #[test]
    fn switching_to_edge_clears_remote_irr_and_the_eoi_register_works() {
        let mut ioapic = IoApic::default();
        set(&mut ioapic, REDIRECTION, entry::LEVEL | 0x41);
        line(&mut ioapic, 0, true);
        set(&mut ioapic, REDIRECTION, entry::MASKED | 0x41);
        set(&mut ioapic, REDIRECTION, entry::MASKED | entry::LEVEL | 0x41);
        assert_eq!(get(&mut ioapic, REDIRECTION), entry::MASKED | entry::LEVEL | 0x41);
        set(&mut ioapic, REDIRECTION, entry::LEVEL | 0x41);
        line(&mut ioapic, 0, false);
        ioapic.write(EOI, &0x41_u32.to_le_bytes(), &mut |_| true);
        assert_eq!(get(&mut ioapic, REDIRECTION), entry::LEVEL | 0x41);
    }

    #[test]
    fn entries_decode_to_messages() {
        let mut ioapic = IoApic::default();
        assert_eq!(set(&mut ioapic, REDIRECTION + 3, 0xffff_ffff), []);
        assert_eq!(get(&mut ioapic, REDIRECTION + 3), entry::HIGH_WRITABLE);
        set(&mut ioapic, REDIRECTION + 3, 0x0502_0000);
        line(&mut ioapic, 1, true);
        let delivered = set(&mut ioapic, REDIRECTION + 2, 0xfffe_0000 | entry::LEVEL | entry::LOGICAL | 0x199);
        let destination = Destination { logical: true, id: 0x105, wide: false };
        assert_eq!(
            delivered[..],
            [Message { vector: 0x99, mode: DeliveryMode::LowestPriority, level: true, destination }]
        );
    }
}
