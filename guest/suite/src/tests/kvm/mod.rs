//! The kvm dialect (Linux Documentation/virt/kvm/x86/{cpuid,msr,hypercalls}.rst), where CPUID offers it.

mod interrupts;
mod processors;
mod time;

pub use time::read_clock;

use crate::apic;
use crate::cpu::*;
use crate::paging::{NO_RAM, frame, physical};
use crate::run::Exit;
use crate::smp::{begin, finish, start};
use crate::tap::*;
use crate::{code, println, tests};
use contract::kvm::feature::NAMES;
use core::sync::atomic::{AtomicU64, Ordering::SeqCst};

tests! {
    self { signature }
    time { clock, wall_clock, bad_clocks }
    self { unknown_msrs, features_gate_msrs, hypercalls, features_gate_calls }
    time { steal_time }
    interrupts { pv_eoi, pv_eoi_of_levels }
    processors { unhalt }
    interrupts { send_ipi }
    processors { sched_yield, poll_control }
    time { clock_pairing }
    interrupts { extended_ids }
    processors { preempted_flush }
    interrupts { pv_eoi_and_others }
    processors { kick_others }
    interrupts { ipi_to_others }
}

/// Feature bits of the leaf behind the base.
mod feature {
    pub const CLOCK_OLD: u32 = 0;
    pub const CLOCK: u32 = 3;
    pub const STEAL_TIME: u32 = 5;
    pub const PV_EOI: u32 = 6;
    pub const PV_UNHALT: u32 = 7;
    pub const PV_TLB_FLUSH: u32 = 9;
    pub const PV_SEND_IPI: u32 = 11;
    pub const POLL_CONTROL: u32 = 12;
    pub const PV_SCHED_YIELD: u32 = 13;
    pub const EXT_DEST_ID: u32 = 15;
    pub const CLOCK_STABLE: u32 = 24;
}

/// MSRs that hold an address, or a switch.
mod pv {
    pub const STEAL_TIME: u32 = 0x4B56_4D03;
    pub const EOI: u32 = 0x4B56_4D04;
    pub const POLL_CONTROL: u32 = 0x4B56_4D05;
}

/// Hypercalls.
mod call {
    pub const KICK_CPU: u64 = 5;
    pub const CLOCK_PAIRING: u64 = 9;
    pub const SEND_IPI: u64 = 10;
    pub const SCHED_YIELD: u64 = 11;
}

const VECTOR: u8 = 0x61;
/// Offset of the preempted flag in the structure of stolen time.
const PREEMPTED: usize = 16;

/// Comparison of CPUID text.
trait Text {
    fn concat_eq(&self, text: &[u8; 12]) -> bool;
}

impl Text for [[u8; 4]; 3] {
    fn concat_eq(&self, text: &[u8; 12]) -> bool {
        self.iter().flatten().eq(text)
    }
}

/// What a processor has to say.
static SEEN: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];

/// Says what is shown of the feature with this bit.
fn shows(case: Case, bit: u32) {
    for (_, name) in NAMES.iter().filter(|(known, _)| *known == 1 << bit) {
        case.of("kvm", name);
    }
}

/// Base leaf of the dialect, if it is there.
pub fn base() -> Option<u32> {
    (0x4000_0000..0x4001_0000).step_by(0x100).find(|&leaf| {
        let r = core::arch::x86_64::__cpuid(leaf);
        [r.ebx, r.ecx, r.edx].map(u32::to_le_bytes).concat_eq(b"KVMKVMKVM\0\0\0")
    })
}

/// The feature bits, or a skipped test.
fn features(t: &mut T) -> Option<u32> {
    match base() {
        Some(base) => Some(core::arch::x86_64::__cpuid(base + 1).eax),
        None => {
            t.skip("no kvm dialect");
            None
        }
    }
}

/// WRMSR at level 0.
fn write_msr(index: u32, value: u64) -> Exit {
    code!("wrmsr").kernel().with(|r| (r.rcx, r.rax, r.rdx) = (index.into(), value & 0xFFFF_FFFF, value >> 32)).run()
}

/// True where a feature is offered; else the test is skipped.
fn offered(t: &mut T, bit: u32) -> bool {
    let offered = features(t).is_some_and(|features| features >> bit & 1 != 0);
    if !offered {
        t.skip("not offered");
    }
    offered
}

/// VMCALL at level 0: RAX.
fn hypercall(number: u64, args: [u64; 4]) -> i64 {
    let regs = code!("vmcall").kernel().with(|r| {
        (r.rax, r.rbx, r.rcx) = (number, args[0], args[1]);
        (r.rdx, r.rsi) = (args[2], args[3]);
    });
    regs.run().regs.rax as i64
}

fn apic_id() -> u64 {
    u64::from(cpuid(1, 0)[1] >> 24)
}

/// A byte that the host, or another processor, writes.
fn look(place: *const u8) -> u8 {
    // SAFETY: callers name memory of the suite's own.
    unsafe { place.read_volatile() }
}

/// The hypervisor bit, and a maximum leaf that covers the features.
fn signature(t: &mut T) {
    let Some(_) = features(t) else { return };
    let base = base().unwrap_or_default();
    t.is("hypervisor bit", cpuid(1, 0)[2] >> 31 == 1);
    t.is("maximum leaf", core::arch::x86_64::__cpuid(base).eax > base);
    let offered = core::arch::x86_64::__cpuid(base + 1).eax;
    NAMES.iter().filter(|(bit, _)| offered & bit != 0).for_each(|(_, name)| println!("# offered kvm {name}"));
}

/// MSRs of the range that mean nothing are #GP(0).
fn unknown_msrs(t: &mut T) {
    let Some(_) = features(t) else { return };
    for index in [0x4B56_4D0Fu32, 0x4B56_4DFF] {
        t.event("wrmsr", &write_msr(index, 0), gp(0));
        t.event("rdmsr", &code!("rdmsr").kernel().with(|r| r.rcx = index.into()).run(), gp(0));
    }
}

/// A feature that is not offered cannot be used.
fn features_gate_msrs(t: &mut T) {
    let Some(features) = features(t) else { return };
    for (what, bit, index) in [
        ("wall clock, old", feature::CLOCK_OLD, 0x11u32),
        ("clock, old", feature::CLOCK_OLD, 0x12),
        ("wall clock", feature::CLOCK, 0x4B56_4D00),
        ("clock", feature::CLOCK, 0x4B56_4D01),
        ("async page fault", 4, 0x4B56_4D02),
        ("steal time", feature::STEAL_TIME, pv::STEAL_TIME),
        ("PV EOI", feature::PV_EOI, pv::EOI),
        ("poll control", feature::POLL_CONTROL, pv::POLL_CONTROL),
        ("migration control", 17, 0x4B56_4D08),
    ] {
        if features >> bit & 1 == 0 {
            t.event(what, &write_msr(index, 0), gp(0));
            shows(Case::Refusal, bit);
        }
    }
    t.is("feature leaf", true);
}

/// An unknown hypercall is -KVM_ENOSYS; from level 3 it is -KVM_EPERM.
fn hypercalls(t: &mut T) {
    let Some(_) = features(t) else { return };
    for (what, code) in [("vmcall", code!(".byte 0x0F, 0x01, 0xC1")), ("vmmcall", code!(".byte 0x0F, 0x01, 0xD9"))] {
        let exit = t.runs(what, &code.kernel().with(|r| r.rax = 0x7777));
        t.eq("unknown", exit.regs.rax, (-1000i64) as u64);
        let exit = t.runs(what, &code.user().with(|r| r.rax = 5));
        t.eq("user", exit.regs.rax, (-1i64) as u64);
    }
}

/// A feature that is not offered makes no call: -KVM_ENOSYS.
fn features_gate_calls(t: &mut T) {
    let Some(features) = features(t) else { return };
    for (bit, number) in [
        (feature::PV_UNHALT, call::KICK_CPU),
        (feature::CLOCK, call::CLOCK_PAIRING),
        (feature::PV_SEND_IPI, call::SEND_IPI),
        (feature::PV_SCHED_YIELD, call::SCHED_YIELD),
    ] {
        if features >> bit & 1 == 0 {
            t.same(number, hypercall(number, [physical(frame(0)), 0, 0, 0x40]), -1000);
            shows(Case::Refusal, bit);
        }
    }
    t.is("feature leaf", true);
}

/// A page register takes what is aligned and RAM, and nothing else.
fn refuses(t: &mut T, index: u32, unaligned: &[u64]) {
    let good = rdmsr(index);
    for bad in unaligned.iter().copied().chain(NO_RAM.map(|address| address | 1)) {
        t.event(format_args!("{bad:#x}"), &write_msr(index, bad), gp(0));
    }
    t.eq("unchanged", rdmsr(index), good);
}

fn seen(cpu: usize) -> &'static AtomicU64 {
    &SEEN[cpu]
}

/// Processors, where there are several and a feature is offered; else the test is skipped.
fn several(t: &mut T, bit: u32) -> Option<usize> {
    if !offered(t, bit) {
        return None;
    }
    let count = start();
    if count < 2 {
        t.skip("one processor");
        return None;
    }
    apic::enable();
    SEEN.iter().for_each(|seen| seen.store(0, SeqCst));
    Some(count)
}

/// The APIC id of a processor.
fn id_of(cpu: usize) -> u64 {
    begin(cpu, |cpu| seen(cpu).store(apic_id(), SeqCst));
    finish(cpu);
    seen(cpu).swap(0, SeqCst)
}

/// Waits for what takes long where the host is busy with others. Says whether it came true.
fn patiently(done: impl Fn() -> bool) -> bool {
    (0..100).any(|_| apic::wait_for(&done))
}
