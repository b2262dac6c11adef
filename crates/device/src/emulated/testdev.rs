//! What bare-metal test kernels expect of QEMU's `pc-testdev` (hw/misc/pc-testdev.c): a latch, interrupt lines at
//! their fingertips, and device memory that behaves like RAM.
//!
//! | where | what |
//! | --- | --- |
//! | ports E0h-E3h | latch: what was written is read back, at any width |
//! | ports E4h-E7h | flush a page of the monitor's page tables; nothing to flush here |
//! | ports E8h-EBh | the same latch, byte by byte |
//! | ports 2000h-2017h | interrupt lines: a byte sets the level of the GSI with the port's offset |
//! | FF000000h, 64 KiB | device memory |

use std::sync::{Arc, Mutex};

use memory::Gpa;

use crate::bus::{self, Bus, BytePortDevice, MmioDevice};
use crate::interrupt::InterruptSink;

const LATCH: u16 = 0xe0;
const LATCH_PORTS: u16 = 12;
const LINES: u16 = 0x2000;
const LINE_PORTS: u16 = 24;
const MEMORY: Gpa = Gpa(0xff00_0000);
const MEMORY_BYTES: usize = 0x1_0000;

/// Places the test device. Only machines for test kernels have it.
///
/// # Errors
/// [`bus::Error`] where something else is there.
pub fn place(bus: &Bus, sink: Arc<dyn InterruptSink>) -> Result<(), bus::Error> {
    bus.add_ports(LATCH, LATCH_PORTS, Arc::new(Mutex::new(Latch::default())))?;
    bus.add_ports(LINES, LINE_PORTS, Arc::new(Mutex::new(Lines(sink))))?;
    bus.add_mmio(MEMORY, MEMORY_BYTES as u64, Arc::new(Mutex::new(DeviceMemory(vec![0; MEMORY_BYTES]))))
}

/// Two windows of four ports on the same bytes, and the write-only flush port between them.
#[derive(Default)]
struct Latch([u8; 4]);

impl Latch {
    fn byte(&mut self, offset: u16) -> Option<&mut u8> {
        let flush = (4..8).contains(&offset);
        if flush { None } else { Some(&mut self.0[usize::from(offset & 3)]) }
    }
}

impl BytePortDevice for Latch {
    fn read(&mut self, offset: u16) -> u8 {
        self.byte(offset).map_or(0, |byte| *byte)
    }

    fn write(&mut self, offset: u16, value: u8) {
        if let Some(byte) = self.byte(offset) {
            *byte = value;
        }
    }
}

struct Lines(Arc<dyn InterruptSink>);

impl BytePortDevice for Lines {
    fn read(&mut self, _offset: u16) -> u8 {
        0
    }

    fn write(&mut self, offset: u16, value: u8) {
        self.0.set_line(offset.into(), value != 0);
    }
}

struct DeviceMemory(Vec<u8>);

impl MmioDevice for DeviceMemory {
    fn mmio_read(&mut self, offset: u64, data: &mut [u8]) {
        let there = self.0.get(offset as usize..).unwrap_or_default();
        data.fill(0xff);
        data.iter_mut().zip(there).for_each(|(to, from)| *to = *from);
    }

    fn mmio_write(&mut self, offset: u64, data: &[u8]) {
        let there = self.0.get_mut(offset as usize..).unwrap_or_default();
        there.iter_mut().zip(data).for_each(|(to, from)| *to = *from);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interrupt::fixture::Recorder;

    #[test]
    fn latch_lines_and_memory_answer_at_every_width() {
        let (bus, sink) = (Bus::default(), Arc::new(Recorder::default()));
        place(&bus, sink.sink()).unwrap();
        bus.port_write(0xe0, &0x1234_5678_u32.to_le_bytes());
        bus.port_write(0xe9, &[0xff]);
        bus.port_write(0xe4, &[0; 4]);
        let mut word = [0; 2];
        bus.port_read(0xe1, &mut word);
        assert_eq!(word, [0xff, 0x34]);
        let mut long = [0; 4];
        bus.port_read(0xe8, &mut long);
        assert_eq!(long, [0x78, 0xff, 0x34, 0x12]);

        bus.port_write(0x200e, &[1]);
        bus.port_write(0x200e, &[0]);
        assert_eq!(sink.lines(), [(14, true), (14, false)]);

        let pattern: Vec<u8> = (0..64).collect();
        let mut back = [0; 64];
        assert!(bus.mmio_write(Gpa(0xff00_ffc0), &pattern));
        assert!(bus.mmio_read(Gpa(0xff00_ffc0), &mut back));
        assert_eq!(back[..], pattern);
        assert!(!bus.mmio_write(Gpa(0xff00_ffc1), &pattern), "past the end");
        DeviceMemory(vec![0; 8]).mmio_write(7, &pattern);
        DeviceMemory(vec![0; 8]).mmio_read(u64::MAX, &mut back);
    }
}
