//! The kvm dialect: what stock Linux knows.
//!
//! Source: Linux, Documentation/virt/kvm/x86/{cpuid,msr,hypercalls}.rst and
//! arch/x86/include/{uapi/asm/kvm_para.h,asm/pvclock-abi.h}.

use core::mem::offset_of;

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
    /// Stolen time and the preempted flag through [`msr::STEAL_TIME`](super::msr::STEAL_TIME).
    pub const STEAL_TIME: u32 = 1 << 5;
    /// The end of an interrupt in memory, through [`msr::PV_EOI`](super::msr::PV_EOI).
    pub const PV_EOI: u32 = 1 << 6;
    /// [`hypercall::KICK_CPU`](super::hypercall::KICK_CPU) ends HLT.
    pub const PV_UNHALT: u32 = 1 << 7;
    /// A vCPU whose [`StealTime::preempted`](super::StealTime::preempted) is set flushes its TLB where it is asked to there.
    pub const PV_TLB_FLUSH: u32 = 1 << 9;
    /// [`hypercall::SEND_IPI`](super::hypercall::SEND_IPI).
    pub const PV_SEND_IPI: u32 = 1 << 11;
    /// [`msr::POLL_CONTROL`](super::msr::POLL_CONTROL).
    pub const POLL_CONTROL: u32 = 1 << 12;
    /// [`hypercall::SCHED_YIELD`](super::hypercall::SCHED_YIELD).
    pub const PV_SCHED_YIELD: u32 = 1 << 13;
    /// Bits 14:8 of a destination id stand in bits 11:5 of a message's address, and in bits 55:49 of an I/O APIC entry.
    pub const MSI_EXT_DEST_ID: u32 = 1 << 15;
    /// The clock may say, in each page, that it is monotonic across vCPUs.
    pub const CLOCKSOURCE_STABLE: u32 = 1 << 24;

    /// Every feature, and its name.
    pub const NAMES: [(u32, &str); 12] = [
        (CLOCKSOURCE, "kvm-clocksource"),
        (NOP_IO_DELAY, "kvm-nop-io-delay"),
        (CLOCKSOURCE2, "kvm-clocksource2"),
        (STEAL_TIME, "kvm-steal-time"),
        (PV_EOI, "kvm-pv-eoi"),
        (PV_UNHALT, "kvm-pv-unhalt"),
        (PV_TLB_FLUSH, "kvm-pv-tlb-flush"),
        (PV_SEND_IPI, "kvm-pv-send-ipi"),
        (POLL_CONTROL, "kvm-poll-control"),
        (PV_SCHED_YIELD, "kvm-pv-sched-yield"),
        (MSI_EXT_DEST_ID, "kvm-msi-ext-dest-id"),
        (CLOCKSOURCE_STABLE, "kvm-clocksource-stable"),
    ];
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
    /// Guest-physical address of this vCPU's [`StealTime`](super::StealTime), a multiple of 64, with [`ENABLE`].
    pub const STEAL_TIME: u32 = 0x4b56_4d03;
    /// Guest-physical address of this vCPU's [`EOI_PENDING`](super::EOI_PENDING) byte, a multiple of 4, with [`ENABLE`].
    pub const PV_EOI: u32 = 0x4b56_4d04;
    /// [`POLL_CONTROL_POLL`]: the host may poll before a vCPU sleeps in HLT. 1 after reset.
    pub const POLL_CONTROL: u32 = 0x4b56_4d05;
    /// Bit of the registers that hold an address: the host uses it.
    pub const ENABLE: u64 = 1;
    /// Bits of [`STEAL_TIME`] that are zero.
    pub const STEAL_TIME_RESERVED: u64 = 0x3e;
    /// The one bit of [`POLL_CONTROL`].
    pub const POLL_CONTROL_POLL: u64 = 1;
}

/// Hypercalls: the number in RAX, arguments in RBX, RCX, RDX, RSI, the result in RAX.
pub mod hypercall {
    /// Look for interrupts; being in the monitor is all it takes.
    pub const VAPIC_POLL_IRQ: u64 = 1;
    /// RCX: the APIC id of a vCPU whose HLT ends; where it is not in HLT, its next one does at once. (RBX: flags, ignored.)
    pub const KICK_CPU: u64 = 5;
    /// RBX: guest-physical address of a [`ClockPairing`](super::ClockPairing); RCX: [`PAIR_WALL_CLOCK`].
    pub const CLOCK_PAIRING: u64 = 9;
    /// RBX, RCX: which vCPUs, 64 each (32 outside 64-bit mode); RDX: the APIC id of the first one; RSI: the low half of an
    /// interrupt command. Result: how many have accepted it.
    pub const SEND_IPI: u64 = 10;
    /// RBX: the APIC id of a vCPU that could use the processor.
    pub const SCHED_YIELD: u64 = 11;
    /// The one kind of [`CLOCK_PAIRING`]: the time of day.
    pub const PAIR_WALL_CLOCK: u64 = 0;
    /// Result: not from privilege level 0.
    pub const EPERM: i64 = -1;
    /// Result: an address that is not RAM.
    pub const EFAULT: i64 = -14;
    /// Result: a value that the call does not take.
    pub const EINVAL: i64 = -22;
    /// Result: a kind that is not to be had.
    pub const EOPNOTSUPP: i64 = -95;
    /// Result: no such call, or it is not offered.
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
    /// [`TIME_INFO_STABLE`] and [`TIME_INFO_STOPPED`].
    pub flags: u8,
    /// Zero.
    pub pad: [u8; 2],
}

/// [`TimeInfo::flags`]: the clocks of all vCPUs are one.
pub const TIME_INFO_STABLE: u8 = 1 << 0;
/// [`TimeInfo::flags`]: the host had the vCPU stand still, since the guest last cleared this bit. Linux forgives its watchdogs.
pub const TIME_INFO_STOPPED: u8 = 1 << 1;

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

/// What the host's scheduler did to one vCPU (`kvm_steal_time`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct StealTime {
    /// Nanoseconds in which the vCPU could have run and had no processor.
    pub steal: u64,
    /// Odd while `steal` is being written.
    pub version: u32,
    /// Zero.
    pub flags: u32,
    /// [`VCPU_PREEMPTED`], and what others ask of the vCPU meanwhile: [`VCPU_FLUSH_TLB`].
    pub preempted: u8,
    /// Zero.
    pub pad0: [u8; 3],
    /// Zero.
    pub pad1: [u32; 11],
}

/// [`StealTime::preempted`]: the vCPU does not execute guest code at present.
pub const VCPU_PREEMPTED: u8 = 1 << 0;
/// [`StealTime::preempted`], set by the guest beside [`VCPU_PREEMPTED`]: the vCPU is to flush its TLB before it does.
pub const VCPU_FLUSH_TLB: u8 = 1 << 1;

/// The byte of [`msr::PV_EOI`]: set by the host where the interrupt in service needs no write to the EOI register; cleared by
/// the guest instead of that write.
pub const EOI_PENDING: u8 = 1 << 0;

/// The time of day and the time-stamp counter at one moment (`kvm_clock_pairing`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ClockPairing {
    /// Seconds since 1970-01-01 UTC.
    pub sec: i64,
    /// Nanoseconds beyond.
    pub nsec: i64,
    /// What RDTSC read then.
    pub tsc: u64,
    /// Zero.
    pub flags: u32,
    /// Zero.
    pub pad: [u32; 9],
}

const _: () = {
    assert!(size_of::<TimeInfo>() == 32 && size_of::<WallClock>() == 12);
    assert!(size_of::<StealTime>() == 64 && size_of::<ClockPairing>() == 64);
    assert!(offset_of!(StealTime, version) == 8 && offset_of!(StealTime, preempted) == 16);
};
