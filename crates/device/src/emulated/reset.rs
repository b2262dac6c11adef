//! The reset ports of PC chipsets: reset control (CF9h; ICH9 datasheet 13.7.5) and system control port A (92h).

use crate::bus::BytePortDevice;
use crate::power::{PowerEvent, PowerSwitch};

/// The reset control register, named as reset register in the machine's FADT. It lies between the bytes of the PCI
/// configuration address port, which answers 32-bit accesses only.
pub struct ResetControl {
    power: PowerSwitch,
    value: u8,
}

impl ResetControl {
    /// Where it is: one port.
    pub const PORT: u16 = 0xcf9;
    /// What resets the machine when written: a full reset.
    pub const RESET_VALUE: u8 = 0x06;

    const RESET_CPU: u8 = 1 << 2;
    /// System reset and full reset: kinds of reset, kept for the reader.
    const KEPT: u8 = 0b1010;

    /// A register that presses `power`.
    pub fn new(power: PowerSwitch) -> Self {
        Self { power, value: 0 }
    }
}

impl BytePortDevice for ResetControl {
    fn read(&mut self, _offset: u16) -> u8 {
        self.value
    }

    fn write(&mut self, _offset: u16, value: u8) {
        self.value = value & Self::KEPT;
        if value & Self::RESET_CPU != 0 {
            self.power.press(PowerEvent::Reset);
        }
    }
}

/// System control port A: fast reset and the A20 gate. Address line 20 always passes here, so the gate's bit is kept
/// and changes nothing.
pub struct SystemControlA {
    power: PowerSwitch,
    value: u8,
}

impl SystemControlA {
    /// Where it is: one port.
    pub const PORT: u16 = 0x92;

    const FAST_RESET: u8 = 1 << 0;
    const A20: u8 = 1 << 1;

    /// A port that presses `power`.
    pub fn new(power: PowerSwitch) -> Self {
        Self { power, value: Self::A20 }
    }
}

impl BytePortDevice for SystemControlA {
    fn read(&mut self, _offset: u16) -> u8 {
        self.value
    }

    fn write(&mut self, _offset: u16, value: u8) {
        self.value = value & !Self::FAST_RESET;
        if value & Self::FAST_RESET != 0 {
            self.power.press(PowerEvent::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_reset_bits_reset() {
        let power = PowerSwitch::default();
        let mut control = ResetControl::new(power.clone());
        control.write(0, 0x0a);
        assert_eq!((control.read(0), power.take()), (0x0a, None));
        control.write(0, ResetControl::RESET_VALUE);
        assert_eq!((control.read(0), power.take()), (0x02, Some(PowerEvent::Reset)));

        let mut port = SystemControlA::new(power.clone());
        port.write(0, 0xfe);
        assert_eq!((port.read(0), power.take()), (0xfe, None));
        port.write(0, 0x01);
        assert_eq!((port.read(0), power.take()), (0x00, Some(PowerEvent::Reset)));
    }
}
