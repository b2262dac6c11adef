//! The kvm dialect (Linux Documentation/virt/kvm/x86/{cpuid,msr,hypercalls}.rst), where CPUID offers it.

use crate::apic::{self, io, reg};
use crate::cpu::*;
use crate::paging::{TEST_VA, Window, frame, physical, pte};
use crate::run::Exit;
use crate::smp::{begin, finish, start};
use crate::tap::*;
use crate::{code, tests};
use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering::SeqCst};

tests![
    signature, clock, wall_clock, unknown_msrs, features_gate_msrs, hypercalls, features_gate_calls, steal_time,
    pv_eoi, pv_eoi_of_levels, unhalt, send_ipi, sched_yield, poll_control, clock_pairing, extended_ids,
    preempted_flush, pv_eoi_and_others, kick_others, ipi_to_others,
];

/// Feature bits of the leaf behind the base.
mod feature {
    pub const CLOCK: u32 = 3;
    pub const STEAL_TIME: u32 = 5;
    pub const PV_EOI: u32 = 6;
    pub const PV_UNHALT: u32 = 7;
    pub const PV_TLB_FLUSH: u32 = 9;
    pub const PV_SEND_IPI: u32 = 11;
    pub const POLL_CONTROL: u32 = 12;
    pub const PV_SCHED_YIELD: u32 = 13;
    pub const EXT_DEST_ID: u32 = 15;
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
/// A less urgent one.
const LOWER: u8 = 0x41;
/// Addresses that are no RAM: between RAM and devices, local APIC, I/O APIC, beyond all.
const NO_RAM: [u64; 4] = [0xB000_0000, apic::BASE, 0xFEC0_0000, 1 << 45];
/// Offset of the preempted flag in the structure of stolen time; its bits.
const PREEMPTED: usize = 16;
const IS_PREEMPTED: u8 = 1;
const FLUSH: u8 = 2;

/// Base leaf of the dialect, if it is there.
pub fn base() -> Option<u32> {
    (0x4000_0000..0x4001_0000).step_by(0x100).find(|&leaf| {
        let r = core::arch::x86_64::__cpuid(leaf);
        [r.ebx, r.ecx, r.edx].map(u32::to_le_bytes).concat_eq(b"KVMKVMKVM\0\0\0")
    })
}

/// Comparison of CPUID text.
trait Text {
    fn concat_eq(&self, text: &[u8; 12]) -> bool;
}

impl Text for [[u8; 4]; 3] {
    fn concat_eq(&self, text: &[u8; 12]) -> bool {
        self.iter().flatten().eq(text)
    }
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

/// Ends an interrupt as a guest does that has PV EOI: true where that took no write to the APIC.
fn end_in_memory(place: *mut u8) -> bool {
    let ended: u8;
    // SAFETY: as above; one instruction, as the host demands.
    unsafe { asm!("btr dword ptr [{}], 0", "setc {}", in(reg) place, out(reg_byte) ended) };
    ended != 0
}

/// The hypervisor bit, and a maximum leaf that covers the features.
fn signature(t: &mut T) {
    let Some(_) = features(t) else { return };
    let base = base().unwrap_or_default();
    t.is("hypervisor bit", cpuid(1, 0)[2] >> 31 == 1);
    t.is("maximum leaf", core::arch::x86_64::__cpuid(base).eax > base);
}

/// The pvclock page, read as msr.rst says: nanoseconds, or `None` while the version is odd.
pub fn read_clock(page: *const u8) -> Option<u64> {
    // SAFETY: the page is the suite's own, and the offsets are inside of it.
    let word = |offset: usize| unsafe { page.add(offset).cast::<u32>().read_volatile() };
    let version = word(0);
    let wide = |offset| u64::from(word(offset)) | u64::from(word(offset + 4)) << 32;
    let (stamp, system_time, multiplier) = (wide(8), wide(16), word(24));
    let shift = word(28) as u8 as i8;
    let delta = rdtsc().wrapping_sub(stamp);
    let delta = if shift >= 0 { delta << shift } else { delta >> -shift };
    let time = system_time + ((u128::from(delta) * u128::from(multiplier)) >> 32) as u64;
    (version & 1 == 0 && word(0) == version).then_some(time)
}

/// kvmclock never goes back, through both MSRs, and the page stops changing once it is off.
fn clock(t: &mut T) {
    let Some(features) = features(t) else { return };
    for (bit, index) in [(3u32, 0x4B56_4D01u32), (0, 0x12)] {
        if features >> bit & 1 == 0 {
            continue;
        }
        frame(0).fill(0);
        let page = physical(frame(0));
        t.event("enable", &write_msr(index, page | 1), DONE);
        t.eq("read back", rdmsr(index), page | 1);
        t.is("multiplier", frame(0)[24..28] != [0; 4]);
        if features >> 24 & 1 != 0 {
            t.is("stable bit", frame(0)[29] & 1 != 0);
        }
        let (mut last, mut backwards) = (0, 0u64);
        for _ in 0..10_000 {
            if let Some(now) = read_clock(frame(0).as_ptr()) {
                backwards += u64::from(now < last);
                last = now;
            }
        }
        t.is("time passes", last > 0);
        t.eq("backwards", backwards, 0);
        t.event("disable", &write_msr(index, 0), DONE);
    }
}

/// The wall clock is written once, with an even version and a plausible year.
fn wall_clock(t: &mut T) {
    let Some(features) = features(t) else { return };
    for (bit, index) in [(3u32, 0x4B56_4D00u32), (0, 0x11)] {
        if features >> bit & 1 == 0 {
            continue;
        }
        frame(0).fill(0);
        t.event("write", &write_msr(index, physical(frame(0))), DONE);
        let word = |o: usize| u32::from_le_bytes(frame(0)[o..o + 4].try_into().unwrap());
        t.is("version", word(0) & 1 == 0);
        t.is("nanoseconds", word(8) < 1_000_000_000);
        t.is("after 2020", word(4) > 1_577_836_800);
    }
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
        ("async page fault", 4u32, 0x4B56_4D02u32),
        ("steal time", 5, 0x4B56_4D03),
        ("PV EOI", 6, 0x4B56_4D04),
        ("poll control", 12, 0x4B56_4D05),
        ("migration control", 17, 0x4B56_4D08),
    ] {
        if features >> bit & 1 == 0 {
            t.event(what, &write_msr(index, 0), gp(0));
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

/// Stolen time never goes back, and its version is even.
fn steal_time(t: &mut T) {
    if !offered(t, feature::STEAL_TIME) {
        return;
    }
    frame(0).fill(0);
    let page = physical(frame(0));
    t.event("enable", &write_msr(pv::STEAL_TIME, page | 1), DONE);
    t.eq("read back", rdmsr(pv::STEAL_TIME), page | 1);
    let steal = || u64::from_le_bytes(frame(0)[..8].try_into().unwrap());
    let mut last = steal();
    for _ in 0..100 {
        hypercall(call::SCHED_YIELD, [apic_id(), 0, 0, 0]);
        t.is("never back", steal() >= last);
        last = steal();
        t.eq("version", frame(0)[8] & 1, 0);
    }
    t.eq("preempted", frame(0)[PREEMPTED], 0);
    t.is("the rest is zero", frame(0)[12..].iter().all(|byte| *byte == 0));
    refuses(t, pv::STEAL_TIME, &[page | 3, page | 0x21, page | 2]);
    t.event("disable", &write_msr(pv::STEAL_TIME, 0), DONE);
}

/// The byte of PV EOI: where it is, what it holds with an interrupt in service, and what becomes of it.
fn pv_eoi(t: &mut T) {
    if !offered(t, feature::PV_EOI) {
        return;
    }
    apic::enable();
    frame(0).fill(0);
    let (byte, page) = (&raw mut frame(0)[0], physical(frame(0)));
    t.event("enable", &write_msr(pv::EOI, page | 1), DONE);
    refuses(t, pv::EOI, &[page | 2, page | 3]);
    for round in 0..10 {
        apic::send_self(VECTOR.into());
        t.same(round, apic::take(), Some(VECTOR.into()));
        t.is("ends in memory", end_in_memory(byte));
    }
    t.is("not in service", !apic::bit(reg::ISR, VECTOR.into()));

    // A look at the APIC before the end takes the offer back.
    apic::send_self(VECTOR.into());
    t.same("taken", apic::take(), Some(VECTOR.into()));
    t.is("in service", apic::bit(reg::ISR, VECTOR.into()));
    t.is("taken back", !end_in_memory(byte));
    apic::write(reg::EOI, 0);
    t.is("ended by the write", !apic::bit(reg::ISR, VECTOR.into()));

    // With another one requested the end is to be written.
    apic::send_self(LOWER.into());
    apic::send_self(VECTOR.into());
    t.same("the more urgent one", apic::take(), Some(VECTOR.into()));
    t.is("to be written", !end_in_memory(byte));
    t.same("not yet", apic::take(), None);
    apic::write(reg::EOI, 0);
    t.same("the other one", apic::take(), Some(LOWER.into()));
    t.is("ends in memory", end_in_memory(byte));
    t.same("no more", apic::take(), None);

    // Nested: each end is of the most urgent one in service.
    apic::send_self(LOWER.into());
    t.same("outer", apic::take(), Some(LOWER.into()));
    apic::send_self(VECTOR.into());
    t.is("taken back by the access", look(byte) == 0);
    t.same("inner", apic::take(), Some(VECTOR.into()));
    t.is("ends in memory", end_in_memory(byte));
    t.is("outer in service", apic::bit(reg::ISR, LOWER.into()) && !apic::bit(reg::ISR, VECTOR.into()));
    apic::write(reg::EOI, 0);
    t.is("outer ended", !apic::bit(reg::ISR, LOWER.into()));

    t.event("disable", &write_msr(pv::EOI, 0), DONE);
    frame(0).fill(0);
    apic::send_self(VECTOR.into());
    t.same("without", apic::take(), Some(VECTOR.into()));
    t.eq("not written", look(byte), 0);
    apic::drain();
}

/// The end of a level-triggered interrupt has to reach the I/O APIC.
fn pv_eoi_of_levels(t: &mut T) {
    const INPUT: u32 = 14;
    if !offered(t, feature::PV_EOI) {
        return;
    }
    apic::enable();
    io::mask_all();
    frame(0).fill(0);
    let byte = &raw mut frame(0)[0];
    t.event("enable", &write_msr(pv::EOI, physical(frame(0)) | 1), DONE);
    io::set_entry(INPUT, apic_id() << 56 | io::LEVEL | u64::from(VECTOR));
    io::line(INPUT, true);
    t.same("taken", apic::take(), Some(VECTOR.into()));
    t.is("to be written", !end_in_memory(byte));
    io::line(INPUT, false);
    t.is("remote IRR", io::entry(INPUT) & io::REMOTE_IRR != 0);
    apic::write(reg::EOI, 0);
    t.is("ended", io::entry(INPUT) & io::REMOTE_IRR == 0);
    t.event("disable", &write_msr(pv::EOI, 0), DONE);
    io::mask_all();
}

/// A kick ends HLT, interrupts off or not; one that comes first ends the next one.
fn unhalt(t: &mut T) {
    if !offered(t, feature::PV_UNHALT) {
        return;
    }
    let kicked = code!("vmcall", "cli", "hlt").kernel().with(|r| (r.rax, r.rcx) = (call::KICK_CPU, apic_id()));
    let exit = t.runs("kicked before", &kicked);
    t.eq("RAX", exit.regs.rax, 0);
    for nobody in [0xFE, 0x1_0000, u64::MAX] {
        t.same("nobody", hypercall(call::KICK_CPU, [0, nobody, 0, 0]), 0);
    }
}

/// An interrupt and an NMI to this processor; commands that name destinations themselves are refused.
fn send_ipi(t: &mut T) {
    if !offered(t, feature::PV_SEND_IPI) {
        return;
    }
    apic::enable();
    let id = apic_id();
    t.same("sent", hypercall(call::SEND_IPI, [1, 0, id, VECTOR.into()]), 1);
    t.same("taken", apic::take(), Some(VECTOR.into()));
    apic::write(reg::EOI, 0);
    let nmi = code!("vmcall").kernel().with(|r| (r.rax, r.rbx, r.rdx, r.rsi) = (call::SEND_IPI, 1, id, 0x400));
    t.event("NMI", &nmi.run(), plain(vector::NMI));
    for bad in [1 << 11, 1 << 18, 2 << 18, 3 << 18] {
        t.same("refused", hypercall(call::SEND_IPI, [1, 0, id, u64::from(VECTOR) | bad]), -22);
    }
    for nobody in [0xFE, 0xFFFF_FFFF] {
        t.same("nobody", hypercall(call::SEND_IPI, [u64::MAX, u64::MAX, nobody, VECTOR.into()]), 0);
    }
    t.same("nothing is sent", hypercall(call::SEND_IPI, [0, 0, id, VECTOR.into()]), 0);
    t.same("nothing came", apic::take(), None);
}

/// A hint: whoever it names.
fn sched_yield(t: &mut T) {
    if !offered(t, feature::PV_SCHED_YIELD) {
        return;
    }
    for target in [apic_id(), 0xFE, u64::MAX] {
        t.same(target, hypercall(call::SCHED_YIELD, [target, 0, 0, 0]), 0);
    }
}

/// A switch, on after reset.
fn poll_control(t: &mut T) {
    if !offered(t, feature::POLL_CONTROL) {
        return;
    }
    t.eq("after reset", rdmsr(pv::POLL_CONTROL), 1);
    t.event("off", &write_msr(pv::POLL_CONTROL, 0), DONE);
    t.eq("off", rdmsr(pv::POLL_CONTROL), 0);
    for bad in [2, 3, 1 << 63] {
        t.event("reserved bits", &write_msr(pv::POLL_CONTROL, bad), gp(0));
    }
    t.event("on", &write_msr(pv::POLL_CONTROL, 1), DONE);
    t.eq("on", rdmsr(pv::POLL_CONTROL), 1);
}

/// The time of day and the counter, of one moment.
fn clock_pairing(t: &mut T) {
    if !offered(t, feature::CLOCK) {
        return;
    }
    frame(0).fill(0xFF);
    let before = rdtsc();
    t.same("paired", hypercall(call::CLOCK_PAIRING, [physical(frame(0)), 0, 0, 0]), 0);
    let after = rdtsc();
    let wide = |at: usize| u64::from_le_bytes(frame(0)[at..at + 8].try_into().unwrap());
    t.is("after 2020", wide(0) > 1_577_836_800);
    t.is("nanoseconds", wide(8) < 1_000_000_000);
    t.is("of this moment", (before..=after).contains(&wide(16)));
    t.is("zero", frame(0)[24..64].iter().all(|byte| *byte == 0));
    t.eq("the end", frame(0)[64], 0xFF);
    t.same("another kind", hypercall(call::CLOCK_PAIRING, [physical(frame(0)), 1, 0, 0]), -95);
    for bad in NO_RAM.into_iter().chain([u64::MAX]) {
        t.same("no RAM", hypercall(call::CLOCK_PAIRING, [bad, 0, 0, 0]), -14);
    }
}

/// Bits 55:49 of an I/O APIC entry are part of the destination where that is offered, and nothing else.
fn extended_ids(t: &mut T) {
    const INPUT: u32 = 14;
    let Some(features) = features(t) else { return };
    apic::enable();
    io::mask_all();
    io::line(INPUT, false);
    io::set_entry(INPUT, apic_id() << 56 | 1 << 49 | u64::from(VECTOR));
    io::line(INPUT, true);
    let nobody = features >> feature::EXT_DEST_ID & 1 != 0;
    t.same("taken", apic::take(), if nobody { None } else { Some(VECTOR.into()) });
    io::line(INPUT, false);
    io::mask_all();
    apic::drain();
}

/// What a processor has to say.
static SEEN: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];

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

/// A processor in HLT is preempted, and does the flush that was left to it before it runs again.
fn preempted_flush(t: &mut T) {
    if several(t, feature::PV_TLB_FLUSH).is_none() {
        return;
    }
    let (window, id) = (Window::new(), id_of(1) as u32);
    frame(0).fill(1);
    frame(1).fill(2);
    frame(2).fill(0);
    let flag = &raw mut frame(2)[PREEMPTED];
    for round in 0..10 {
        let (old, new) = if round % 2 == 0 { (0, 1) } else { (1, 0) };
        *window.entry(3, 0) = physical(frame(old)) | pte::ALL;
        begin(1, |cpu| {
            // SAFETY: this processor's translation of the window is of the round before.
            unsafe { asm!("invlpg [{}]", in(reg) TEST_VA) };
            let value = || u64::from(look(TEST_VA as *const u8));
            wrmsr(pv::STEAL_TIME, physical(frame(2)) | 1);
            let before = value();
            crate::run::run_on(cpu, &code!("sti", "hlt", "cli").kernel_on(cpu));
            let after = value();
            apic::write(reg::EOI, 0);
            wrmsr(pv::STEAL_TIME, 0);
            seen(cpu).store(before << 8 | after, SeqCst);
        });
        t.is("preempted", patiently(|| look(flag) == IS_PREEMPTED));
        *window.entry(3, 0) = physical(frame(new)) | pte::ALL;
        // SAFETY: a byte of the suite's own, which the host changes as well.
        let left = unsafe { core::sync::atomic::AtomicU8::from_ptr(flag) };
        let asked = left.compare_exchange(IS_PREEMPTED, IS_PREEMPTED | FLUSH, SeqCst, SeqCst);
        t.same("asked", asked, Ok(IS_PREEMPTED));
        apic::write(reg::ICR_HIGH, id << 24);
        apic::write(reg::ICR_LOW, VECTOR.into());
        t.is("finished", patiently(|| finish(1)));
        let [before, after] = [frame(old)[0], frame(new)[0]].map(u64::from);
        t.eq("before and after", seen(1).load(SeqCst), before << 8 | after);
        t.eq("runs", look(flag), 0);
    }
}

/// An interrupt that comes while one is in service, and is less urgent, is not forgotten when that one ends in memory.
fn pv_eoi_and_others(t: &mut T) {
    if several(t, feature::PV_EOI).is_none() {
        return;
    }
    frame(0).fill(0);
    let byte = &raw mut frame(0)[0];
    let mut in_memory = 0;
    t.event("enable", &write_msr(pv::EOI, physical(frame(0)) | 1), DONE);
    seen(0).store(apic_id(), SeqCst);
    for _ in 0..20 {
        apic::send_self(VECTOR.into());
        t.same("taken", apic::take(), Some(VECTOR.into()));
        begin(1, |_| {
            apic::write(reg::ICR_HIGH, (seen(0).load(SeqCst) as u32) << 24);
            apic::write(reg::ICR_LOW, LOWER.into());
        });
        t.is("sent", finish(1));
        let ended = end_in_memory(byte);
        in_memory += u32::from(ended);
        if !ended {
            apic::write(reg::EOI, 0);
        }
        t.same("the other one", apic::take(), Some(LOWER.into()));
        if !end_in_memory(byte) {
            apic::write(reg::EOI, 0);
        }
    }
    t.eq("ended in memory", in_memory, 20);
    t.event("disable", &write_msr(pv::EOI, 0), DONE);
    apic::drain();
}

/// A kick wakes a processor that sleeps with interrupts off.
fn kick_others(t: &mut T) {
    let Some(count) = several(t, feature::PV_UNHALT) else { return };
    for cpu in 1..count {
        let id = id_of(cpu);
        begin(cpu, |cpu| {
            seen(cpu).store(1, SeqCst);
            crate::run::run_on(cpu, &code!("cli", "hlt").kernel_on(cpu));
            seen(cpu).store(2, SeqCst);
        });
        t.is("begins", patiently(|| seen(cpu).load(SeqCst) == 1));
        t.same("kicked", hypercall(call::KICK_CPU, [0, id, 0, 0]), 0);
        t.is("finished", patiently(|| finish(cpu)));
        t.eq("woken", seen(cpu).load(SeqCst), 2);
    }
}

/// One call interrupts all others.
fn ipi_to_others(t: &mut T) {
    let Some(count) = several(t, feature::PV_SEND_IPI) else { return };
    let mut others = 0;
    for cpu in 1..count {
        others |= 1 << id_of(cpu);
        begin(cpu, |cpu| {
            while seen(cpu).load(SeqCst) == 0 {
                if let Some(vector) = apic::take_on(cpu) {
                    apic::write(reg::EOI, 0);
                    seen(cpu).store(vector, SeqCst);
                }
            }
        });
    }
    t.same("sent", hypercall(call::SEND_IPI, [others, 0, 0, VECTOR.into()]), count as i64 - 1);
    for cpu in 1..count {
        t.is("finished", patiently(|| finish(cpu)));
        t.eq("vector", seen(cpu).load(SeqCst), VECTOR.into());
    }
}
