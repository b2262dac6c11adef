//! Ports that help debugging: POST codes, a byte console, and the exit of test kernels.

use std::io::Write;

use crate::bus::{BytePortDevice, PortDevice};
use crate::power::{PowerEvent, PowerSwitch};

/// Port 80h: power-on self-test codes. Nobody looks; guests write it to wait a microsecond.
#[derive(Debug, Default)]
pub struct PostCode(u8);

impl PostCode {
    /// Where it is: one port.
    pub const PORT: u16 = 0x80;
}

impl BytePortDevice for PostCode {
    fn read(&mut self, _offset: u16) -> u8 {
        self.0
    }

    fn write(&mut self, _offset: u16, value: u8) {
        self.0 = value;
    }
}

/// A port whose bytes go to a writer as they come: E9h of Bochs, 402h of SeaBIOS and OVMF. It reads as the low byte of
/// its number E9h, by which guests find it.
pub struct DebugConsole(Box<dyn Write + Send>);

impl DebugConsole {
    /// Bochs' and QEMU's port.
    pub const PORT: u16 = 0xe9;
    /// Where QEMU's firmware expects it.
    pub const FIRMWARE_PORT: u16 = 0x402;

    /// A console that writes to `output`. What cannot be written is lost.
    pub fn new(output: Box<dyn Write + Send>) -> Self {
        Self(output)
    }
}

impl BytePortDevice for DebugConsole {
    fn read(&mut self, _offset: u16) -> u8 {
        0xe9
    }

    fn write(&mut self, _offset: u16, value: u8) {
        if let Err(error) = self.0.write_all(&[value]).and_then(|()| self.0.flush()) {
            tracing::debug!(%error, "debug console byte lost");
        }
    }
}

/// QEMU's isa-debug-exit: writing `v` ends the run with the process status `(v << 1) | 1`, so never with success.
pub struct DebugExit(PowerSwitch);

impl DebugExit {
    /// First port, as test kernels have it.
    pub const PORT: u16 = 0xf4;
    /// Ports.
    pub const LENGTH: u16 = 4;

    /// A port that presses `power`.
    pub fn new(power: PowerSwitch) -> Self {
        Self(power)
    }
}

impl PortDevice for DebugExit {
    fn port_read(&mut self, _offset: u16, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn port_write(&mut self, _offset: u16, data: &[u8]) {
        // A process status has eight bits, whatever the width of the write.
        let value = data.first().copied().unwrap_or(0);
        self.0.press(PowerEvent::TestExit(value << 1 | 1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn exit_statuses_are_odd_and_eight_bits_wide() {
        let power = PowerSwitch::default();
        let mut exit = DebugExit::new(power.clone());
        for (data, status) in [(&[0_u8][..], 1), (&[1], 3), (&[0x10, 0, 0, 0], 0x21), (&[0xff, 0xff], 0xff)] {
            exit.port_write(0, data);
            assert_eq!(power.take(), Some(PowerEvent::TestExit(status)));
        }
    }

    #[test]
    fn the_console_passes_bytes_on() {
        let sink = Sink::default();
        let mut console = DebugConsole::new(Box::new(sink.clone()));
        console.port_write(0, b"ok");
        assert_eq!(*sink.0.lock().unwrap(), b"ok");
        assert_eq!(console.read(0), 0xe9);
    }
}
