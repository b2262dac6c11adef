//! The shared pages: who writes what, and where it lies. All numbers are little-endian.

use core::mem::offset_of;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::kvm::TimeInfo;

/// Bytes of each shared page.
const PAGE: usize = 4096;

/// One a VM, written by the host only.
///
/// Everything up to `wall_ns` belongs together and is read between two equal, even values of `version`. The words behind it
/// stand alone.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(4096))]
pub struct VmPage {
    /// Odd while what belongs together is being written.
    pub version: u32,
    /// [`vm_state`] bits.
    pub state: u32,
    /// Moves with each revocation.
    pub epoch: u64,
    /// Features that can be accepted.
    pub offered: u64,
    /// Features that the guest has accepted and the host honours.
    pub accepted: u64,
    /// Accepted features that the host wants back: honoured until the guest acknowledges the epoch.
    pub revoking: u64,
    /// Changes when the VM's state is used a second time: a clone, or a restored snapshot. Zero where not accepted.
    pub generation: [u8; 16],
    /// Nanoseconds since 1970-01-01 UTC when the VM's clock was zero, a multiple of the time quantum.
    pub wall_ns: u64,
    /// Zero.
    pub reserved0: [u8; 64],
    /// Later: scarcity of the host's memory, 0 (none) to 65535.
    pub pressure: u32,
    /// Zero.
    pub reserved1: [u8; 60],
    /// How often the host woke up to raise timers of this VM.
    pub timer_wakeups: u64,
    /// How many timers it raised.
    pub timers_raised: u64,
    /// Zero. Later: virtual NUMA tables.
    pub reserved2: [u8; PAGE - 208],
}

/// Bits of [`VmPage::state`].
pub mod vm_state {
    /// A revocation waits to be acknowledged.
    pub const REVOKING: u32 = 1 << 0;
    /// The guest has not acknowledged it in time. It still can.
    pub const REVOKE_OVERDUE: u32 = 1 << 1;
}

/// One a vCPU.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(4096))]
pub struct VcpuPage {
    /// The VM's clock in the layout of `pvclock_vcpu_time_info`. Written by the host.
    pub time: TimeInfo,
    /// Zero.
    pub reserved0: [u8; 32],
    /// One of [`run_state`]. Written by the host.
    pub run_state: u32,
    /// Not zero while the vCPU executes no guest code: it sleeps, or has given its processor up. Written by the host.
    pub preempted: u32,
    /// Nanoseconds in which the vCPU could have run and had no processor. Written by the host.
    pub stolen_ns: u64,
    /// Zero.
    pub reserved1: [u8; 48],
    /// Not zero: maskable interrupts wait. Written by the guest.
    pub irq_mask: u8,
    /// Not zero: one waits. Set by the host, cleared by the guest before [`IRQ_WINDOW`](super::call::IRQ_WINDOW).
    pub irq_pending: u8,
    /// Set by the host where the interrupt in service needs no acknowledgement; cleared by the guest in its place, by one
    /// instruction.
    pub eoi: u8,
    /// Zero.
    pub reserved2: [u8; 61],
    /// Not zero: the vCPU holds something others wait for. Written by the guest.
    pub critical: u8,
    /// Zero. Later: placement.
    pub reserved3: [u8; 0x800 - 0xc1],
    /// Exits of this vCPU since it was made, by [`EXIT_CAUSES`](super::EXIT_CAUSES): as of its last hypercall, device access
    /// or sleep. Written by the host.
    pub exits: [u64; 32],
    /// Zero.
    pub reserved4: [u8; PAGE - 0x900],
}

/// Values of [`VcpuPage::run_state`].
pub mod run_state {
    /// Running or runnable.
    pub const RUNNING: u32 = 0;
    /// Asleep in HLT.
    pub const HALTED: u32 = 1;
    /// Asleep in `wait`.
    pub const WAITING: u32 = 2;
}

/// Offsets in [`VcpuPage`] and [`VmPage`] of what is written by itself.
pub mod offset {
    use super::{VcpuPage, VmPage, offset_of};

    /// [`VmPage::timer_wakeups`], and [`VmPage::timers_raised`] behind it.
    pub const TIMER_WAKEUPS: u64 = offset_of!(VmPage, timer_wakeups) as u64;
    /// [`VcpuPage::time`].
    pub const TIME: u64 = offset_of!(VcpuPage, time) as u64;
    /// [`VcpuPage::run_state`].
    pub const RUN_STATE: u64 = offset_of!(VcpuPage, run_state) as u64;
    /// [`VcpuPage::preempted`].
    pub const PREEMPTED: u64 = offset_of!(VcpuPage, preempted) as u64;
    /// [`VcpuPage::stolen_ns`].
    pub const STOLEN_NS: u64 = offset_of!(VcpuPage, stolen_ns) as u64;
    /// [`VcpuPage::irq_mask`].
    pub const IRQ_MASK: u64 = offset_of!(VcpuPage, irq_mask) as u64;
    /// [`VcpuPage::irq_pending`].
    pub const IRQ_PENDING: u64 = offset_of!(VcpuPage, irq_pending) as u64;
    /// [`VcpuPage::eoi`].
    pub const EOI: u64 = offset_of!(VcpuPage, eoi) as u64;
    /// [`VcpuPage::critical`].
    pub const CRITICAL: u64 = offset_of!(VcpuPage, critical) as u64;
    /// [`VcpuPage::exits`].
    pub const EXITS: u64 = offset_of!(VcpuPage, exits) as u64;
}

/// One call of a `multicall`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CallEntry {
    /// As RAX.
    pub number: u64,
    /// As RBX, RCX, RDX, RSI.
    pub args: [u64; 4],
    /// What RAX would hold afterwards. Written by the host.
    pub result: i64,
}

/// Guest-virtual addresses whose translations are to be forgotten.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FlushRange {
    /// The first one, a multiple of 4096.
    pub start: u64,
    /// How many pages of 4096 bytes, at least 1.
    pub pages: u64,
}

const _: () = {
    assert!(size_of::<VmPage>() == PAGE && align_of::<VmPage>() == PAGE);
    assert!(offset_of!(VmPage, state) == 0x04);
    assert!(offset_of!(VmPage, epoch) == 0x08);
    assert!(offset_of!(VmPage, offered) == 0x10);
    assert!(offset_of!(VmPage, accepted) == 0x18);
    assert!(offset_of!(VmPage, revoking) == 0x20);
    assert!(offset_of!(VmPage, generation) == 0x28);
    assert!(offset_of!(VmPage, wall_ns) == 0x38);
    assert!(offset_of!(VmPage, pressure) == 0x80);
    assert!(offset_of!(VmPage, timer_wakeups) == 0xc0);
    assert!(offset_of!(VmPage, timers_raised) == 0xc8);

    assert!(size_of::<VcpuPage>() == PAGE && align_of::<VcpuPage>() == PAGE);
    assert!(offset_of!(VcpuPage, time) == 0x00);
    assert!(offset_of!(VcpuPage, run_state) == 0x40);
    assert!(offset_of!(VcpuPage, preempted) == 0x44);
    assert!(offset_of!(VcpuPage, stolen_ns) == 0x48);
    assert!(offset_of!(VcpuPage, irq_mask) == 0x80);
    assert!(offset_of!(VcpuPage, irq_pending) == 0x81);
    assert!(offset_of!(VcpuPage, eoi) == 0x82);
    assert!(offset_of!(VcpuPage, critical) == 0xc0);
    assert!(offset_of!(VcpuPage, exits) == 0x800);

    assert!(size_of::<CallEntry>() == 48 && offset_of!(CallEntry, result) == 40);
    assert!(size_of::<FlushRange>() == 16 && offset_of!(FlushRange, pages) == 8);
};
