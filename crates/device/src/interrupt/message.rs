//! What travels between interrupt chips: one format for IPIs, I/O APIC entries and MSIs (Intel SDM vol. 3A, 11.6, 11.11).

/// How a local APIC treats a message (SDM 11.6.1, the delivery mode field).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeliveryMode {
    /// The vector, to each destination.
    Fixed,
    /// The vector, to the destination with the least urgent work.
    LowestPriority,
    /// System management interrupt.
    Smi,
    /// Encoding 011.
    Reserved,
    /// Non-maskable interrupt.
    Nmi,
    /// INIT.
    Init,
    /// Start-up IPI; the vector is a page number.
    Startup,
    /// The vector comes from the PIC.
    ExtInt,
}

impl DeliveryMode {
    /// Bits 10:8 of ICR, LVT, redirection entry and MSI data.
    pub const fn from_register(register: u32) -> Self {
        match (register >> 8) & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            2 => Self::Smi,
            3 => Self::Reserved,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::Startup,
            _ => Self::ExtInt,
        }
    }

    /// The same bits.
    pub const fn to_register(self) -> u32 {
        (self as u32) << 8 // the variants are in the order of their encodings
    }
}

/// Whom a message names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Destination {
    /// Compared with the logical destination register instead of the APIC id.
    pub logical: bool,
    /// APIC id, or logical id.
    pub id: u32,
    /// `id` has 32 bits (x2APIC ICR); else 8, or 15 in the extended format of MSIs and I/O APIC entries.
    pub wide: bool,
}

/// One interrupt message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// 0..=255.
    pub vector: u8,
    /// What to do with it.
    pub mode: DeliveryMode,
    /// Level-triggered: EOI is broadcast to the I/O APIC.
    pub level: bool,
    /// To whom.
    pub destination: Destination,
}

/// Where MSI addresses start and what selects them (SDM 11.11.1: bits 31:20 are FEEh).
const MSI_BASE: u64 = 0xfee0_0000;

impl Message {
    /// Decodes a message-signalled interrupt; `None` where the address is not one (SDM 11.11).
    ///
    /// Address bits 11:5 carry bits 14:8 of the destination id, as guests use them that find the extended
    /// destination id feature of the KVM paravirtual leaf. On real machines these bits are reserved and zero.
    pub const fn from_msi(address: u64, data: u32) -> Option<Self> {
        if address & !0xf_ffff != MSI_BASE {
            return None;
        }
        let id = ((address >> 12) & 0xff) as u32 | (((address >> 5) & 0x7f) as u32) << 8;
        let destination = Destination { logical: address & (1 << 2) != 0, id, wide: false };
        let mode = DeliveryMode::from_register(data);
        Some(Self { vector: data as u8, mode, level: data & (1 << 15) != 0, destination })
    }
}

impl Message {
    /// The same as a message-signalled interrupt; `None` where its destination does not fit into one.
    pub const fn to_msi(self) -> Option<(u64, u32)> {
        let Destination { logical, id, wide } = self.destination;
        if wide || id > 0x7fff {
            return None;
        }
        let id = ((id & 0xff) as u64) << 12 | ((id >> 8) as u64) << 5;
        let (mode, level) = (self.mode.to_register(), self.level as u32);
        // Bit 14 asserts, which levels must say and edges do.
        Some((MSI_BASE | id | (logical as u64) << 2, self.vector as u32 | mode | 1 << 14 | level << 15))
    }
}

/// The destination shorthand field of the interrupt command register (SDM 11.6.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shorthand {
    /// None: the message's destination.
    Destination,
    /// The sender.
    Itself,
    /// Everyone.
    All,
    /// Everyone but the sender.
    Others,
}

/// What an access to a local APIC sets off elsewhere. The caller carries it out with no APIC locked.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// An inter-processor interrupt.
    Send(Shorthand, Message),
    /// The end of a level-triggered interrupt, for the I/O APIC.
    EndOfInterrupt(u8),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_message_that_fits_comes_back_from_an_msi() {
        for mode in (0..8).map(|bits| DeliveryMode::from_register(bits << 8)) {
            for (id, logical, level) in [(0, false, true), (0xff, true, false), (0x7fff, false, false)] {
                let message =
                    Message { vector: 0x31, mode, level, destination: Destination { logical, id, wide: false } };
                let (address, data) = message.to_msi().unwrap();
                assert_eq!(Message::from_msi(address, data), Some(message));
            }
        }
        let destination = Destination { logical: false, id: 1, wide: true };
        assert_eq!(Message { vector: 0x31, mode: DeliveryMode::Fixed, level: false, destination }.to_msi(), None);
    }

    #[test]
    fn msi_addresses_and_data_decode_as_the_manual_lays_them_out() {
        let message = Message::from_msi(0xfee0_3004, 0xc131).unwrap();
        assert_eq!(message.vector, 0x31);
        assert_eq!(message.mode, DeliveryMode::LowestPriority);
        assert!(message.level);
        assert_eq!(message.destination, Destination { logical: true, id: 3, wide: false });
        let extended = Message::from_msi(0xfee0_2000 | (3 << 5), 0x40).unwrap();
        assert_eq!(extended.destination, Destination { logical: false, id: 0x302, wide: false });
        assert_eq!(Message::from_msi(0xfed0_0000, 0), None);
        assert_eq!(Message::from_msi(0x1_fee0_0000, 0), None);
    }
}
