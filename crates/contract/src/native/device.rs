//! The contract device: the dialect for user space, as a PCI function.
//!
//! Each call is one access, so that nobody's call can mix with another's: a load for calls that return a value, a store for
//! those whose outcome the VM page shows.

/// PCI vendor ID: the one that virtual devices of many monitors have.
pub const VENDOR: u16 = 0x1af4;
/// PCI device ID, out of the range that is for experiments and never a virtio device's.
pub const DEVICE: u16 = 0x10fc;
/// PCI class: base system peripheral, other.
pub const CLASS: u32 = 0x08_80_00;

/// Features that user space can have: nothing of them needs privilege level 0, a physical address, or the vCPU's time.
pub const USER_FEATURES: u64 = super::feature::TIME_OF_DAY | super::feature::GENERATION | super::feature::LEDGER;

/// BAR 0: registers of 4 or 8 bytes.
pub mod register {
    /// Its index.
    pub const BAR: u8 = 0;
    /// Its bytes.
    pub const SIZE: u64 = 0x1000;
    /// 12 bytes: [`SIGNATURE`](crate::native::SIGNATURE).
    pub const SIGNATURE: u64 = 0x00;
    /// 4 bytes: [`VERSION`](crate::native::VERSION).
    pub const VERSION: u64 = 0x0c;
    /// 8 bytes: features that user space can have here.
    pub const USER_FEATURES: u64 = 0x10;
    /// 4 bytes: quantum of the time of day, nanoseconds.
    pub const QUANTUM_NS: u64 = 0x18;
    /// 4 bytes: vCPUs.
    pub const VCPUS: u64 = 0x1c;
    /// 4 bytes: `time_of_day` calls a second.
    pub const CALLS_PER_S: u64 = 0x20;
    /// 4 bytes: how many of them at once.
    pub const BURST: u64 = 0x24;
    /// 8 bytes: stores that meant nothing: to pages, to registers that are none, of another width.
    pub const IGNORED: u64 = 0x28;
    /// 8 bytes each: a load makes the call of that number, and returns what RAX would.
    pub const CALLS: u64 = 0x100;
    /// One past the last of them.
    pub const CALLS_END: u64 = 0x300;
    /// 8 bytes: a store accepts features.
    pub const ACCEPT: u64 = 0x300;
    /// 8 bytes: a store acknowledges an epoch.
    pub const REVOKE_ACK: u64 = 0x308;
}

/// BAR 2: shared pages, read-only.
pub mod page {
    /// Its index.
    pub const BAR: u8 = 2;
    /// Its bytes.
    pub const SIZE: u64 = 0x2_0000;
    /// The [`VmPage`](crate::native::VmPage).
    pub const VM: u64 = 0;
    /// Exit counters of each vCPU, [`LEDGER_STRIDE`] apart, as in [`VcpuPage::exits`](crate::native::VcpuPage::exits).
    pub const LEDGER: u64 = 0x1_0000;
    /// Bytes a vCPU.
    pub const LEDGER_STRIDE: u64 = 0x100;
}

/// The vendor-specific capability (PCI 3.0, appendix H: 09h), from its ID on.
pub mod capability {
    /// Its ID.
    pub const ID: u8 = 0x09;
    /// Its length, 1 byte.
    pub const LENGTH: u64 = 2;
    /// 12 bytes: [`SIGNATURE`](crate::native::SIGNATURE).
    pub const SIGNATURE: u64 = 4;
    /// [`VERSION`](crate::native::VERSION), 4 bytes.
    pub const VERSION: u64 = 16;
    /// Regions: registers, VM page, ledger. Each the BAR (4 bytes), offset in it (4) and length (4).
    pub const REGIONS: u64 = 20;
    /// Bytes in all.
    pub const SIZE: u64 = REGIONS + 3 * 12;
}

const _: () = {
    assert!(register::CALLS + 8 * super::call::COUNT <= register::CALLS_END);
    assert!(page::LEDGER + 256 * page::LEDGER_STRIDE == page::SIZE);
    assert!(size_of::<super::VcpuPage>() as u64 >= page::LEDGER_STRIDE);
};
