//! The buses: which device answers at which port or guest-physical address.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use memory::Gpa;

/// A device that answers on I/O ports. Offsets are from the start of the range it was placed at.
pub trait PortDevice: Send {
    /// IN of 1, 2 or 4 bytes.
    fn port_read(&mut self, offset: u16, data: &mut [u8]);
    /// OUT of 1, 2 or 4 bytes.
    fn port_write(&mut self, offset: u16, data: &[u8]);
}

/// A device of byte-wide ports. Wider accesses are split into bytes at successive ports, as bus bridges do for 8-bit
/// devices.
pub trait BytePortDevice: Send {
    /// Reads the port at `offset`.
    fn read(&mut self, offset: u16) -> u8;
    /// Writes the port at `offset`.
    fn write(&mut self, offset: u16, value: u8);
}

impl<T: BytePortDevice> PortDevice for T {
    fn port_read(&mut self, offset: u16, data: &mut [u8]) {
        (offset..).zip(data).for_each(|(offset, byte)| *byte = self.read(offset));
    }

    fn port_write(&mut self, offset: u16, data: &[u8]) {
        (offset..).zip(data).for_each(|(offset, byte)| self.write(offset, *byte));
    }
}

/// A device that answers in guest-physical memory. Offsets are from the start of the range it was placed at.
pub trait MmioDevice: Send {
    /// A load of 1..=64 bytes.
    fn mmio_read(&mut self, offset: u64, data: &mut [u8]);
    /// A store of 1..=64 bytes.
    fn mmio_write(&mut self, offset: u64, data: &[u8]);
}

/// Why a device could not be placed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// Another device is there already.
    #[error("range {start:#x}..{end:#x} overlaps a device at {other:#x}")]
    Overlap {
        /// First address asked for.
        start: u64,
        /// One past the last.
        end: u64,
        /// Where the other device starts.
        other: u64,
    },
    /// Empty, or past the end of the address space.
    #[error("range at {start:#x} of {length:#x} is empty or wraps")]
    Range {
        /// First address asked for.
        start: u64,
        /// Length asked for.
        length: u64,
    },
}

struct Ranges<T: ?Sized> {
    by_start: BTreeMap<u64, (u64, Arc<Mutex<T>>)>,
}

impl<T: ?Sized> Ranges<T> {
    const fn new() -> Self {
        Self { by_start: BTreeMap::new() }
    }

    fn insert(&mut self, start: u64, length: u64, device: Arc<Mutex<T>>) -> Result<(), Error> {
        let end = match start.checked_add(length) {
            Some(end) if length > 0 => end,
            _ => return Err(Error::Range { start, length }),
        };
        let below = self.by_start.range(..end).next_back();
        if let Some((&other, &(other_length, _))) = below
            && other + other_length > start
        {
            return Err(Error::Overlap { start, end, other });
        }
        self.by_start.insert(start, (length, device));
        Ok(())
    }

    /// The device that holds all of `size` bytes at `address`, and the offset in it.
    fn find(&self, address: u64, size: u64) -> Option<(u64, Arc<Mutex<T>>)> {
        let (&start, (length, device)) = self.by_start.range(..=address).next_back()?;
        let offset = address - start;
        (offset < *length && size <= *length - offset).then(|| (offset, Arc::clone(device)))
    }
}

/// All ports and device memory of a VM. Ranges come and go while it runs (PCI BARs).
pub struct Bus {
    ports: RwLock<Ranges<dyn PortDevice>>,
    mmio: RwLock<Ranges<dyn MmioDevice>>,
}

impl Default for Bus {
    fn default() -> Self {
        Self { ports: RwLock::new(Ranges::new()), mmio: RwLock::new(Ranges::new()) }
    }
}

impl Bus {
    /// Places a device at `length` ports from `start`.
    ///
    /// # Errors
    /// [`Error`] where the range is taken or impossible.
    pub fn add_ports(&self, start: u16, length: u16, device: Arc<Mutex<dyn PortDevice>>) -> Result<(), Error> {
        let mut ports = self.ports.write().unwrap_or_else(PoisonError::into_inner);
        ports.insert(start.into(), length.into(), device)
    }

    /// Places a device at `length` bytes from `start`.
    ///
    /// # Errors
    /// [`Error`] where the range is taken or impossible.
    pub fn add_mmio(&self, start: Gpa, length: u64, device: Arc<Mutex<dyn MmioDevice>>) -> Result<(), Error> {
        self.mmio.write().unwrap_or_else(PoisonError::into_inner).insert(start.0, length, device)
    }

    /// Takes away what starts at port `start`.
    pub fn remove_ports(&self, start: u16) {
        self.ports.write().unwrap_or_else(PoisonError::into_inner).by_start.remove(&start.into());
    }

    /// Takes away what starts at `start`.
    pub fn remove_mmio(&self, start: Gpa) {
        self.mmio.write().unwrap_or_else(PoisonError::into_inner).by_start.remove(&start.0);
    }

    /// IN. Where nobody answers, `data` is all ones and the result is false.
    pub fn port_read(&self, port: u16, data: &mut [u8]) -> bool {
        let found = self.ports.read().unwrap_or_else(PoisonError::into_inner).find(port.into(), data.len() as u64);
        match found {
            Some((offset, device)) => {
                device.lock().unwrap_or_else(PoisonError::into_inner).port_read(offset as u16, data);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// OUT. False where nobody answers.
    pub fn port_write(&self, port: u16, data: &[u8]) -> bool {
        let found = self.ports.read().unwrap_or_else(PoisonError::into_inner).find(port.into(), data.len() as u64);
        let Some((offset, device)) = found else { return false };
        device.lock().unwrap_or_else(PoisonError::into_inner).port_write(offset as u16, data);
        true
    }

    /// A load. Where nobody answers, `data` is all ones and the result is false.
    pub fn mmio_read(&self, gpa: Gpa, data: &mut [u8]) -> bool {
        let found = self.mmio.read().unwrap_or_else(PoisonError::into_inner).find(gpa.0, data.len() as u64);
        match found {
            Some((offset, device)) => {
                device.lock().unwrap_or_else(PoisonError::into_inner).mmio_read(offset, data);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// A store. False where nobody answers.
    pub fn mmio_write(&self, gpa: Gpa, data: &[u8]) -> bool {
        let found = self.mmio.read().unwrap_or_else(PoisonError::into_inner).find(gpa.0, data.len() as u64);
        let Some((offset, device)) = found else { return false };
        device.lock().unwrap_or_else(PoisonError::into_inner).mmio_write(offset, data);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Register(u8);

    impl PortDevice for Register {
        fn port_read(&mut self, _offset: u16, data: &mut [u8]) {
            data.fill(self.0);
        }
        fn port_write(&mut self, offset: u16, data: &[u8]) {
            self.0 = data[0] + offset as u8;
        }
    }

    #[test]
    fn accesses_find_their_device_and_only_theirs() {
        let bus = Bus::default();
        bus.add_ports(0x60, 4, Arc::new(Mutex::new(Register(1)))).unwrap();
        assert_eq!(
            bus.add_ports(0x5e, 3, Arc::new(Mutex::new(Register(2)))),
            Err(Error::Overlap { start: 0x5e, end: 0x61, other: 0x60 })
        );
        assert!(bus.add_ports(0xffff, 2, Arc::new(Mutex::new(Register(2)))).is_ok());
        assert_eq!(
            bus.add_ports(0x70, 0, Arc::new(Mutex::new(Register(2)))),
            Err(Error::Range { start: 0x70, length: 0 })
        );

        let mut byte = [0];
        assert!(bus.port_write(0x62, &[5]));
        assert!(bus.port_read(0x60, &mut byte));
        assert_eq!(byte, [7]);
        assert!(!bus.port_read(0x64, &mut byte));
        assert_eq!(byte, [0xff]);
        let mut wide = [0; 4];
        assert!(!bus.port_read(0x62, &mut wide), "an access across the end of a range is nobody's");
        bus.remove_ports(0x60);
        assert!(!bus.port_write(0x60, &[0]));
    }
}
