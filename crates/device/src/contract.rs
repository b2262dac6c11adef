//! The contract device: the native dialect for user space, which maps it from
//! `/sys/bus/pci/devices/*/resource0` and `resource2`. The specification is docs/contract.md.
//!
//! ```text
//!   BAR 0  registers ── a load or store is a call ──> UserCalls (machine: paravirt's VM)
//!   BAR 2  pages     ── loads see RAM that the host writes; stores come here, and are counted
//! ```
//!
//! Deliberately absent: interrupts and DMA, which need a driver; a mailbox, whose users would have to trust each other.

use contract::native::device::{CLASS, DEVICE, USER_FEATURES, VENDOR, capability, page, register};
use contract::native::{SIGNATURE, VERSION};
use memory::{Gpa, GuestRam, PAGE_SIZE};

use crate::pci::{Bar, BarKind, Capability, Description, FunctionInterrupts, Identity, PciFunction};

/// Who answers user space.
pub trait UserCalls: Send + Sync {
    /// Makes a call without arguments: what RAX would hold.
    fn call(&self, number: u64) -> u64;
    /// Accepts features.
    fn accept(&self, features: u64);
    /// Acknowledges a revocation.
    fn acknowledge(&self, epoch: u64);
}

/// What the registers say that does not change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Quantum of the time of day, nanoseconds.
    pub quantum_ns: u32,
    /// vCPUs.
    pub vcpus: u32,
    /// `time_of_day` calls a second.
    pub calls_per_s: u32,
    /// How many of them at once.
    pub burst: u32,
}

/// The device.
pub struct ContractDevice<C> {
    limits: Limits,
    calls: C,
    /// What the guest sees in BAR 2, and where: of the place that it has there and keeps.
    pages: GuestRam,
    at: Gpa,
    /// Stores that meant nothing.
    ignored: u64,
}

impl<C: UserCalls> ContractDevice<C> {
    /// A device that shows `pages`, which begin at `at`.
    pub fn new(limits: Limits, calls: C, pages: GuestRam, at: Gpa) -> Self {
        Self { limits, calls, pages, at, ignored: 0 }
    }

    /// The register of `width` bytes at `offset`; `None` where there is none.
    fn load(&self, offset: u64, width: usize) -> Option<u64> {
        if !offset.is_multiple_of(width as u64) {
            return None;
        }
        let limits = self.limits;
        let word =
            |from: usize| SIGNATURE[from..from + 4].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
        Some(match (offset, width) {
            (register::SIGNATURE | 4 | 8, 4) => word(offset as usize),
            (register::VERSION, 4) => VERSION.into(),
            (register::QUANTUM_NS, 4) => limits.quantum_ns.into(),
            (register::VCPUS, 4) => limits.vcpus.into(),
            (register::CALLS_PER_S, 4) => limits.calls_per_s.into(),
            (register::BURST, 4) => limits.burst.into(),
            (register::USER_FEATURES, 8) => USER_FEATURES,
            (register::IGNORED, 8) => self.ignored,
            (register::CALLS..register::CALLS_END, 8) => self.calls.call((offset - register::CALLS) / 8),
            _ => return None,
        })
    }
}

impl<C: UserCalls> PciFunction for ContractDevice<C> {
    fn describe(&self) -> Description {
        let mut body = vec![capability::SIZE as u8, 0];
        body.extend(SIGNATURE);
        body.extend(VERSION.to_le_bytes());
        let regions = [
            [u64::from(register::BAR), 0, register::SIZE],
            [u64::from(page::BAR), page::VM, PAGE_SIZE],
            [u64::from(page::BAR), page::LEDGER, page::LEDGER_STRIDE * u64::from(self.limits.vcpus)],
        ];
        body.extend(regions.iter().flatten().flat_map(|value| (*value as u32).to_le_bytes()));
        Description {
            identity: Identity {
                vendor: VENDOR,
                device: DEVICE,
                subsystem_vendor: VENDOR,
                subsystem: DEVICE,
                class: CLASS,
                revision: (VERSION >> 16) as u8,
            },
            bars: vec![
                Bar { index: register::BAR, kind: BarKind::Memory32, size: register::SIZE },
                Bar { index: page::BAR, kind: BarKind::Prefetchable64, size: page::SIZE },
            ],
            capabilities: vec![Capability { id: capability::ID, body, writable: Vec::new() }],
            msix: None,
            interrupt_pin: false,
        }
    }

    fn connect(&mut self, _interrupts: FunctionInterrupts) {}

    fn bar_place(&self, bar: u8) -> Option<Gpa> {
        (bar == page::BAR).then_some(self.at)
    }

    fn bar_read(&mut self, bar: u8, offset: u64, data: &mut [u8]) {
        match bar {
            page::BAR if self.pages.read(Gpa(self.at.0.wrapping_add(offset)), data).is_ok() => {}
            register::BAR => match self.load(offset, data.len()) {
                Some(value) => data.copy_from_slice(&value.to_le_bytes()[..data.len()]),
                None => data.fill(0xff),
            },
            _ => data.fill(0xff),
        }
    }

    fn bar_write(&mut self, bar: u8, offset: u64, data: &[u8]) {
        match (bar, offset, data.try_into().map(u64::from_le_bytes)) {
            (register::BAR, register::ACCEPT, Ok(features)) => self.calls.accept(features),
            (register::BAR, register::REVOKE_ACK, Ok(epoch)) => self.calls.acknowledge(epoch),
            _ => self.ignored = self.ignored.saturating_add(1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use contract::native::call;
    use std::sync::{Arc, Mutex};

    /// Remembers what was called.
    #[derive(Clone, Default)]
    struct Record(Arc<Mutex<Vec<(&'static str, u64)>>>);

    impl UserCalls for Record {
        fn call(&self, number: u64) -> u64 {
            self.0.lock().unwrap().push(("call", number));
            0x1122_3344_5566_7788
        }
        fn accept(&self, features: u64) {
            self.0.lock().unwrap().push(("accept", features));
        }
        fn acknowledge(&self, epoch: u64) {
            self.0.lock().unwrap().push(("acknowledge", epoch));
        }
    }

    const AT: Gpa = Gpa(0xdff0_0000);

    fn device() -> (ContractDevice<Record>, Record, GuestRam) {
        let (record, pages) = (Record::default(), GuestRam::new(&[(AT, page::SIZE)]).unwrap());
        let limits = Limits { quantum_ns: 1000, vcpus: 3, calls_per_s: 70, burst: 9 };
        (ContractDevice::new(limits, record.clone(), pages.clone(), AT), record, pages)
    }

    fn read<const N: usize>(device: &mut ContractDevice<Record>, bar: u8, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        device.bar_read(bar, offset, &mut data);
        data
    }

    #[test]
    fn registers_say_who_it_is_and_what_it_allows() {
        let (mut device, _, _) = device();
        let words: Vec<u8> = [0, 4, 8].into_iter().flat_map(|at| read::<4>(&mut device, 0, at)).collect();
        assert_eq!(words, SIGNATURE);
        let word = |device: &mut _, at| u32::from_le_bytes(read(device, 0, at));
        assert_eq!([0x0c, 0x18, 0x1c, 0x20, 0x24].map(|at| word(&mut device, at)), [VERSION, 1000, 3, 70, 9]);
        assert_eq!(u64::from_le_bytes(read(&mut device, 0, register::USER_FEATURES)), 1 << 1 | 1 << 13 | 1 << 14);
    }

    #[test]
    fn each_access_is_one_call() {
        let (mut device, record, _) = device();
        let value = read::<8>(&mut device, 0, register::CALLS + 8 * call::TIME_OF_DAY);
        assert_eq!(u64::from_le_bytes(value), 0x1122_3344_5566_7788);
        device.bar_write(0, register::ACCEPT, &7_u64.to_le_bytes());
        device.bar_write(0, register::REVOKE_ACK, &5_u64.to_le_bytes());
        read::<8>(&mut device, 0, register::CALLS_END - 8);
        assert_eq!(*record.0.lock().unwrap(), [("call", 4), ("accept", 7), ("acknowledge", 5), ("call", 63)]);
        assert_eq!(device.ignored, 0);
    }

    #[test]
    fn every_other_access_is_all_ones_or_ignored_and_counted() {
        let (mut device, record, _) = device();
        let known =
            [(0, 4), (4, 4), (8, 4), (0xc, 4), (0x18, 4), (0x1c, 4), (0x20, 4), (0x24, 4), (0x10, 8), (0x28, 8)];
        let mut stores = 0;
        for offset in (0..register::SIZE).chain([register::SIZE, 1 << 40, u64::MAX - 70, u64::MAX]) {
            for width in [1, 2, 3, 4, 7, 8, 16, 64] {
                let is_call = (register::CALLS..register::CALLS_END).contains(&offset) && (offset % 8, width) == (0, 8);
                let mut data = vec![0xa5; width];
                if !is_call && !known.contains(&(offset, width)) {
                    device.bar_read(0, offset, &mut data);
                    assert!(data.iter().all(|byte| *byte == 0xff), "{offset:#x} of {width}");
                }
                if ![register::ACCEPT, register::REVOKE_ACK].contains(&offset) || width != 8 {
                    device.bar_write(0, offset, &data);
                    stores += 1;
                }
            }
        }
        assert_eq!((device.ignored, record.0.lock().unwrap().len()), (stores, 0));
        for bar in [1, 3, 6, 255] {
            assert_eq!(read::<8>(&mut device, bar, 0), [0xff; 8]);
        }
        let counted = u64::from_le_bytes(read(&mut device, 0, register::IGNORED));
        assert_eq!(counted, stores, "and the guest can see how many");
    }

    #[test]
    fn pages_are_read_at_every_place_and_written_nowhere() {
        let (mut device, record, pages) = device();
        pages.write(Gpa(AT.0 + 0x1_0100), &[1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
        assert_eq!(read::<8>(&mut device, 2, 0x1_0100), [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(read::<3>(&mut device, 2, 0x1_0105), [6, 7, 8]);
        for offset in [0, 1, 0x1_0100, page::SIZE - 8, page::SIZE - 1, page::SIZE, u64::MAX] {
            device.bar_write(2, offset, &[0xee; 8]);
        }
        assert_eq!(device.ignored, 7);
        assert_eq!(read::<8>(&mut device, 2, 0x1_0100), [1, 2, 3, 4, 5, 6, 7, 8]);
        for beyond in [page::SIZE - 4, page::SIZE, 1 << 40, u64::MAX - AT.0, u64::MAX] {
            assert_eq!(read::<8>(&mut device, 2, beyond), [0xff; 8], "{beyond:#x}");
        }
        assert!(record.0.lock().unwrap().is_empty());
    }

    #[test]
    fn the_capability_points_at_the_regions() {
        let (device, _, _) = device();
        let description = device.describe();
        let [capability] = &description.capabilities[..] else { panic!("one capability") };
        let whole = [&[capability.id, 0][..], &capability.body].concat();
        assert_eq!((whole[2] as usize, whole.len() as u64), (whole.len(), self::capability::SIZE));
        assert_eq!(&whole[self::capability::SIGNATURE as usize..][..12], SIGNATURE);
        let word = |at: usize| u32::from_le_bytes(whole[at..at + 4].try_into().unwrap());
        let regions: Vec<u32> = (0..9).map(|index| word(self::capability::REGIONS as usize + 4 * index)).collect();
        assert_eq!(regions, [0, 0, 0x1000, 2, 0, 0x1000, 2, 0x1_0000, 0x300]);
        assert!(!(0x1000..=0x107f).contains(&DEVICE), "never a virtio device's (virtio 1.2, 4.1.2)");
    }
}
