//! The kvm dialect: what stock Linux knows.
//!
//! Source: Linux, Documentation/virt/kvm/x86/{cpuid,msr,hypercalls}.rst and
//! arch/x86/include/{uapi/asm/kvm_para.h,asm/pvclock-abi.h}.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// CPUID leaves.
pub mod leaf {
    /// EAX: the last leaf; EBX, ECX, EDX: [`SIGNATURE`](super::SIGNATURE).
    pub const BASE: u32 = 0x4000_0000;
    /// EAX: [`feature`](super::feature) bits; EDX: hints.
    pub const FEATURES: u32 = 0x4000_0001;
    /// EAX: TSC rate in kHz; EBX: local APIC timer rate in kHz. Not KVM's own: the VMware convention that QEMU offers
    /// beside it and guests without a kvmclock driver read.
    pub const TIMING: u32 = 0x4000_0010;
}

/// What EBX, ECX and EDX of [`leaf::BASE`] spell.
pub const SIGNATURE: [u8; 12] = *b"KVMKVMKVM\0\0\0";

/// Feature bits, EAX of [`leaf::FEATURES`].
pub mod feature {
    /// The clock through [`msr::SYSTEM_TIME_OLD`](super::msr::SYSTEM_TIME_OLD) and its sibling.
    pub const CLOCKSOURCE: u32 = 1 << 0;
    /// Port accesses need no delays after them.
    pub const NOP_IO_DELAY: u32 = 1 << 1;
    /// The clock through [`msr::SYSTEM_TIME`](super::msr::SYSTEM_TIME) and its sibling.
    pub const CLOCKSOURCE2: u32 = 1 << 3;
    /// The clock may say, in each page, that it is monotonic across vCPUs.
    pub const CLOCKSOURCE_STABLE: u32 = 1 << 24;
}

/// Model-specific registers.
pub mod msr {
    /// [`WALL_CLOCK`] under its deprecated number.
    pub const WALL_CLOCK_OLD: u32 = 0x11;
    /// [`SYSTEM_TIME`] under its deprecated number.
    pub const SYSTEM_TIME_OLD: u32 = 0x12;
    /// Guest-physical address of a [`WallClock`](super::WallClock), filled once at the write.
    pub const WALL_CLOCK: u32 = 0x4b56_4d00;
    /// Guest-physical address of this vCPU's [`TimeInfo`](super::TimeInfo), with [`SYSTEM_TIME_ENABLE`].
    pub const SYSTEM_TIME: u32 = 0x4b56_4d01;
    /// Bit of [`SYSTEM_TIME`]: keep the page up to date. The address is a multiple of 4.
    pub const SYSTEM_TIME_ENABLE: u64 = 1;
}

/// Hypercalls: the number in RAX, arguments in RBX, RCX, RDX, RSI, the result in RAX.
pub mod hypercall {
    /// Look for interrupts; being in the monitor is all it takes.
    pub const VAPIC_POLL_IRQ: u64 = 1;
    /// Result: not from privilege level 0.
    pub const EPERM: i64 = -1;
    /// Result: no such call.
    pub const ENOSYS: i64 = -1000;
}

/// One vCPU's clock (`pvclock_vcpu_time_info`): nanoseconds since the VM started are
/// `system_time + (((tsc - tsc_timestamp) << tsc_shift) * tsc_to_system_mul >> 32)`, read between two equal, even
/// values of `version`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct TimeInfo {
    /// Odd while the rest is being written.
    pub version: u32,
    /// Zero.
    pub pad0: u32,
    /// The guest's TSC at the moment `system_time` speaks of.
    pub tsc_timestamp: u64,
    /// Nanoseconds.
    pub system_time: u64,
    /// Nanoseconds a tick, as a fraction of 2^32, before shifting.
    pub tsc_to_system_mul: u32,
    /// Left shift of the tick count before multiplying; a right shift where negative.
    pub tsc_shift: i8,
    /// [`TIME_INFO_STABLE`].
    pub flags: u8,
    /// Zero.
    pub pad: [u8; 2],
}

/// [`TimeInfo::flags`]: the clocks of all vCPUs are one.
pub const TIME_INFO_STABLE: u8 = 1 << 0;

/// The time of day at which the VM's clock was zero (`pvclock_wall_clock`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct WallClock {
    /// Odd while the rest is being written.
    pub version: u32,
    /// Seconds since 1970-01-01 UTC.
    pub sec: u32,
    /// Nanoseconds beyond.
    pub nsec: u32,
}

const _: () = assert!(size_of::<TimeInfo>() == 32 && size_of::<WallClock>() == 12);
