//! QEMU's firmware configuration device, as far as guests read it through ports (docs/specs/fw_cfg.rst): keys with
//! bytes behind them. Deliberately absent: writing, and the DMA interface (the id says so).

use crate::bus::PortDevice;

/// First of the two ports: the 16-bit selector, and the data port at its second byte.
pub const PORT: u16 = 0x510;
/// Ports.
pub const LENGTH: u16 = 2;

mod key {
    pub(super) const SIGNATURE: u16 = 0x00;
    pub(super) const ID: u16 = 0x01;
    pub(super) const RAM_SIZE: u16 = 0x03;
    pub(super) const CPUS: u16 = 0x05;
    pub(super) const MAX_CPUS: u16 = 0x0f;
    pub(super) const DIRECTORY: u16 = 0x19;
    pub(super) const FIRST_FILE: u16 = 0x20;
}

/// The traditional interface only.
const ID_VALUE: u32 = 1;
/// The longest file name, with the zero that ends it.
const NAME_BYTES: usize = 56;

/// The device. Its content is fixed before the guest runs.
pub struct FwCfg {
    ram_bytes: u64,
    cpus: u16,
    /// Names and contents; keys count from [`key::FIRST_FILE`].
    files: Vec<(String, Vec<u8>)>,
    selected: Vec<u8>,
    position: usize,
}

impl FwCfg {
    /// A device that knows how much RAM and how many vCPUs the machine has.
    pub fn new(ram_bytes: u64, cpus: u16) -> Self {
        Self { ram_bytes, cpus, files: Vec::new(), selected: Vec::new(), position: 0 }
    }

    /// Adds a file, `opt/...` or `etc/...` by convention. The name is cut to 55 bytes.
    pub fn add_file(&mut self, name: &str, content: Vec<u8>) {
        self.files.push((name.to_owned(), content));
    }

    fn item(&self, key: u16) -> Vec<u8> {
        match key {
            key::SIGNATURE => b"QEMU".to_vec(),
            key::ID => ID_VALUE.to_le_bytes().to_vec(),
            key::RAM_SIZE => self.ram_bytes.to_le_bytes().to_vec(),
            key::CPUS | key::MAX_CPUS => self.cpus.to_le_bytes().to_vec(),
            key::DIRECTORY => self.directory(),
            _ => {
                let file = key.checked_sub(key::FIRST_FILE).and_then(|index| self.files.get(usize::from(index)));
                file.map(|(_, content)| content.clone()).unwrap_or_default()
            }
        }
    }

    /// A big-endian count, then for each file size, key, reserved word and name.
    fn directory(&self) -> Vec<u8> {
        let mut directory = (self.files.len() as u32).to_be_bytes().to_vec();
        for ((name, content), key) in self.files.iter().zip(key::FIRST_FILE..) {
            directory.extend((content.len() as u32).to_be_bytes());
            directory.extend(key.to_be_bytes());
            directory.extend([0; 2]);
            let bytes = name.bytes().take(NAME_BYTES - 1).chain(std::iter::repeat(0));
            directory.extend(bytes.take(NAME_BYTES));
        }
        directory
    }
}

impl PortDevice for FwCfg {
    fn port_read(&mut self, _offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let [byte] = data {
            // Past the end of an item there are zeros.
            *byte = self.selected.get(self.position).copied().unwrap_or(0);
            self.position = self.position.saturating_add(1);
        }
    }

    fn port_write(&mut self, offset: u16, data: &[u8]) {
        if let (0, &[low, high]) = (offset, data) {
            self.selected = self.item(u16::from_le_bytes([low, high]));
            self.position = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(device: &mut FwCfg, key: u16, count: usize) -> Vec<u8> {
        device.port_write(0, &key.to_le_bytes());
        let mut byte = [0];
        (0..count)
            .map(|_| {
                device.port_read(1, &mut byte);
                byte[0]
            })
            .collect()
    }

    #[test]
    fn items_read_byte_by_byte_and_end_in_zeros() {
        let mut device = FwCfg::new(0x1_2345_0000, 4);
        assert_eq!(read(&mut device, 0, 6), b"QEMU\0\0");
        assert_eq!(read(&mut device, 1, 4), [1, 0, 0, 0]);
        assert_eq!(read(&mut device, 3, 8), 0x1_2345_0000_u64.to_le_bytes());
        assert_eq!(read(&mut device, 5, 2), [4, 0]);
        assert_eq!(read(&mut device, 0xf, 2), [4, 0]);
        assert_eq!(read(&mut device, 0xffff, 2), [0, 0]);
    }

    #[test]
    fn files_are_found_through_the_directory() {
        let mut device = FwCfg::new(0, 1);
        device.add_file("opt/a", vec![1, 2, 3]);
        device.add_file(&"x".repeat(80), vec![9]);
        let directory = read(&mut device, 0x19, 4 + 2 * 64);
        assert_eq!(directory[..12], [0, 0, 0, 2, 0, 0, 0, 3, 0, 0x20, 0, 0]);
        assert_eq!(&directory[12..18], b"opt/a\0");
        assert_eq!(directory[4 + 64 + 8 + 54..][..2], [b'x', 0]);
        assert_eq!(read(&mut device, 0x20, 4), [1, 2, 3, 0]);
        assert_eq!(read(&mut device, 0x21, 1), [9]);
        device.port_write(0, &[0]);
        device.port_write(1, &[0, 0]);
        assert_eq!(read(&mut device, 0x22, 1), [0]);
        let mut word = [0; 2];
        device.port_read(0, &mut word);
        assert_eq!(word, [0xff, 0xff]);
    }
}
