//! A coarse time policy, as a guest that measures finds it: each clock and counter is read in a loop beside the HPET, and each
//! timer set to the middle of a quantum. The quantum is what the native dialect says; one below a millisecond is not looked at.
//!
//! ```text
//!   HPET    ├─────── a ───────┼─────── b ───────┼──     steps are a quantum or more
//!   source  ├─────── x ───────┼─────── y ───────┼──     and nothing else steps while the HPET stands
//!   timer           ╷ armed for the middle      ▲ seen when the HPET says that the middle is over
//! ```

use super::kvm::{base as kvm_base, read_clock};
use crate::apic;
use crate::cpu::*;
use crate::paging::{frame, physical};
use crate::run::Code;
use crate::tap::*;
use crate::{code, tests};
use contract::native::feature;
use core::cell::Cell;
use core::ptr::addr_of_mut;
use core::sync::atomic::AtomicU32;
use kit::{Contract, Processor, Shared, VcpuPage, VmMemory, Waited};

tests![
    kernel_tsc, user_tsc, tsc_msr, written_tsc, adjusted_tsc, hpet, pm_timer, pit, speaker_port, apic_count, kvm_clock,
    kvm_wall_clock, native_clock, time_of_day, apic_timer, tsc_deadline, hpet_timer, pit_timer, native_timer, wait,
];

const VECTOR: u8 = 0x62;
const NS_PER_S: u64 = 1_000_000_000;
/// Steps of a source that are looked at.
const STEPS: u32 = 20;
/// Reads, at most.
const READS: u32 = 500_000;
/// Timers that are set, one after the other.
const TIMERS: u32 = 20;

/// The HPET's main counter (IA-PC HPET specification 1.0a, 2.3): what all others are compared with.
mod block {
    const BASE: u64 = 0xFED0_0000;
    pub const CONFIGURATION: u64 = 0x10;
    pub const COUNTER: u64 = 0xF0;
    pub const TIMER: u64 = 0x100;
    pub const COMPARATOR: u64 = 0x108;
    /// Nanoseconds a tick.
    pub const TICK_NS: u64 = 10;

    pub fn read(register: u64) -> u64 {
        // SAFETY: the block is a device's: mapped, of aligned registers, and no Rust object is in it.
        unsafe { ((BASE + register) as *const u64).read_volatile() }
    }

    pub fn write(register: u64, value: u64) {
        // SAFETY: as in `read`.
        unsafe { ((BASE + register) as *mut u64).write_volatile(value) };
    }

    /// The counter.
    pub fn now() -> u64 {
        read(COUNTER)
    }
}

static MEMORY: VmMemory = VmMemory::new();
static PAGE: Shared<VcpuPage> = Shared::new();
static mut CONTRACT: Option<Contract> = None;

/// A machine whose time is coarse.
struct Coarse {
    contract: &'static Contract,
    processor: Processor<'static>,
    quantum_ns: u64,
}

impl Coarse {
    /// What a counter of so many ticks a second counts in a quantum, rounded down.
    fn ticks(&self, hz: u64) -> u64 {
        (u128::from(self.quantum_ns) * u128::from(hz) / u128::from(NS_PER_S)) as u64
    }

    fn tsc_ticks(&self) -> u64 {
        self.ticks(u64::from(self.contract.found().tsc_khz) * 1000)
    }
}

/// The machine with its HPET running, or a skipped test where time is fine.
fn coarse(t: &mut T) -> Option<Coarse> {
    // SAFETY: the first processor alone changes it, and only here, before anyone else looks.
    let place = unsafe { &mut *addr_of_mut!(CONTRACT) };
    if place.is_none() {
        // SAFETY: memory is mapped one to one, executable, and this is level 0.
        *place = kit::find_here().map(|found| unsafe { Contract::start(found, &MEMORY, |address| address as u64) });
    }
    let Some(contract) = place.as_ref().filter(|contract| contract.found().quantum_ns >= 1_000_000) else {
        t.skip("time is not known to be coarse");
        return None;
    };
    if contract.accept(contract.found().offered).is_err() {
        t.is("accepted", false);
        return None;
    }
    block::write(block::CONFIGURATION, 1);
    let quantum_ns = contract.found().quantum_ns.into();
    Some(Coarse { contract, processor: contract.processor(&PAGE), quantum_ns })
}

/// Reads a source until it has stepped often enough: each step is `quantum` of its ticks or more, and none comes while the
/// HPET stands. `bits` is how wide the source is; a step during which it may have gone round is not measured.
fn coarsely(t: &mut T, what: &str, quantum: u64, bits: u32, read: impl Fn() -> u64) {
    let mask = u64::MAX >> (64 - bits);
    let (mut steps, mut short, mut alone) = (0, 0, 0);
    let (mut last, mut last_at) = (read() & mask, block::now());
    let mut settled = false;
    for _ in 0..READS {
        let before = block::now();
        let value = read() & mask;
        let after = block::now();
        if before != after {
            continue;
        }
        if value != last {
            let round = u128::from(after - last_at) * u128::from(quantum) / u128::from(hpet_quantum()) > u128::from(mask / 2);
            short += u32::from(settled && !round && value.wrapping_sub(last) & mask < quantum);
            alone += u32::from(settled && after == last_at);
            steps += u32::from(settled);
        }
        (last, last_at, settled) = (value, after, true);
        if steps == STEPS {
            break;
        }
    }
    t.same(format_args!("{what}: steps"), steps, STEPS);
    t.same(format_args!("{what}: steps below the quantum"), short, 0);
    t.same(format_args!("{what}: steps while the HPET stood"), alone, 0);
}

/// The HPET's ticks in a quantum.
fn hpet_quantum() -> u64 {
    u64::from(kit::find_here().map_or(1, |found| found.quantum_ns)) / block::TICK_NS
}

/// RDTSC and RDTSCP at level 0, as compiled code has them.
fn kernel_tsc(t: &mut T) {
    let Some(coarse) = coarse(t) else { return };
    coarsely(t, "RDTSC", coarse.tsc_ticks(), 64, rdtsc);
    if Feature::RDTSCP.present() {
        coarsely(t, "RDTSCP", coarse.tsc_ticks(), 64, || {
            // SAFETY: present, and it touches no memory.
            unsafe { core::arch::x86_64::__rdtscp(&mut 0) }
        });
    }
}

/// The same at level 3, and in compatibility mode.
fn user_tsc(t: &mut T) {
    let Some(coarse) = coarse(t) else { return };
    let counter = |code: Code, narrow: bool| {
        let regs = if narrow { code.user32() } else { code.user() };
        move || {
            let regs = regs.run().regs;
            regs.rdx << 32 | regs.rax
        }
    };
    coarsely(t, "RDTSC", coarse.tsc_ticks(), 64, counter(code!("rdtsc"), false));
    coarsely(t, "32-bit RDTSC", coarse.tsc_ticks(), 64, counter(code!(32: "rdtsc"), true));
    if Feature::RDTSCP.present() {
        coarsely(t, "RDTSCP", coarse.tsc_ticks(), 64, counter(code!("rdtscp"), false));
    }
}

fn tsc_msr(t: &mut T) {
    let Some(coarse) = coarse(t) else { return };
    coarsely(t, "IA32_TSC", coarse.tsc_ticks(), 64, || rdmsr(msr::TSC));
}

/// What is written to the counter moves it, and not its steps: it stands until the HPET steps.
fn written_tsc(t: &mut T) {
    moved_tsc(t, |value| {
        wrmsr(msr::TSC, value);
        value
    });
}

fn adjusted_tsc(t: &mut T) {
    if !Feature::TSC_ADJUST.present() {
        return t.skip("no IA32_TSC_ADJUST");
    }
    moved_tsc(t, |value| {
        let (stands, adjust) = (rdtsc(), rdmsr(msr::TSC_ADJUST));
        wrmsr(msr::TSC_ADJUST, adjust.wrapping_add(value.wrapping_sub(stands)));
        value
    });
}

/// Moves the counter to values of all kinds, and looks whether it stands there until the HPET steps.
fn moved_tsc(t: &mut T, write: impl Fn(u64) -> u64) {
    let Some(coarse) = coarse(t) else { return };
    let (mut stood, mut went, mut stepped) = (0, 0, 0);
    for round in 0..READS {
        let before = block::now();
        let value = write((1 << 40) + u64::from(round) * 0x1_2345_6789);
        let (first, second) = (rdtsc(), rdtsc());
        let after = block::now();
        if before == after {
            stood += u32::from((first, second) == (value, value));
            went += u32::from((first, second) != (value, value));
        } else if first > value {
            stepped += u32::from(first - value >= coarse.tsc_ticks());
            went += u32::from(first - value < coarse.tsc_ticks());
        }
        if stood >= 1000 && stepped >= 3 {
            break;
        }
    }
    t.is("stood", stood >= 1000);
    t.same("went on within a quantum", went, 0);
    coarsely(t, "RDTSC afterwards", coarse.tsc_ticks(), 64, rdtsc);
    wrmsr(msr::TSC_ADJUST, 0);
}

fn hpet(t: &mut T) {
    let Some(coarse) = coarse(t) else { return };
    coarsely(t, "HPET", coarse.quantum_ns / block::TICK_NS, 64, block::now);
    // Written, it stands where it was put, and its steps are where they were.
    let stands = Cell::new(0_u32);
    for value in 0..1000 {
        let before = rdtsc();
        block::write(block::CONFIGURATION, 0);
        block::write(block::COUNTER, value * 7);
        block::write(block::CONFIGURATION, 1);
        let now = block::now();
        if before == rdtsc() {
            t.check(now == value * 7, || {});
            stands.set(stands.get() + 1);
        }
    }
    t.is("stood", stands.get() > 100);
}

/// The ACPI PM timer, 32 bits wide here.
fn pm_timer(t: &mut T) {
    let Some(coarse) = coarse(t) else { return };
    coarsely(t, "PM timer", coarse.ticks(3_579_545), 32, || inl(0x608).into());
}

const PIT_HZ: u64 = 1_193_182;

/// The PIT's channel 2, latched: it counts down from 65536, round and round.
fn pit(t: &mut T) {
    let Some(coarse) = coarse(t) else { return };
    outb(0x61, 1);
    outb(0x43, 0xB4); // channel 2, both bytes, rate generator
    outb(0x42, 0);
    outb(0x42, 0);
    coarsely(t, "PIT", coarse.ticks(PIT_HZ), 16, || {
        outb(0x43, 0x80);
        let low = inb(0x42);
        u64::from(u16::from_le_bytes([low, inb(0x42)]).wrapping_neg())
    });
    outb(0x61, 0);
}

/// The bits of port 0x61 that toggle by themselves do not while the HPET stands.
fn speaker_port(t: &mut T) {
    let Some(_) = coarse(t) else { return };
    let (mut alone, mut seen, mut last) = (0, 0, (0, inb(0x61)));
    for _ in 0..20_000 {
        let (before, value, after) = (block::now(), inb(0x61), block::now());
        if before == after {
            seen += 1;
            alone += u32::from(last.0 == after && last.1 != value);
            last = (after, value);
        }
    }
    t.is("seen", seen > 1000);
    t.same("toggled while the HPET stood", alone, 0);
}

/// The APIC timer's current count, a nanosecond each.
fn apic_count(t: &mut T) {
    let Some(coarse) = coarse(t) else { return };
    apic::enable();
    apic::write(apic::reg::TIMER_DIVIDE, 0b1011);
    apic::write(apic::reg::TIMER_INITIAL, u32::MAX);
    coarsely(t, "current count", coarse.quantum_ns, 32, || apic::read(apic::reg::TIMER_CURRENT).wrapping_neg().into());
    apic::enable();
}

/// The kvm dialect's page, computed as pvclock does.
fn kvm_clock(t: &mut T) {
    let Some(coarse) = coarse(t) else { return };
    if kvm_base().is_none() {
        return t.skip("no kvm dialect");
    }
    frame(0).fill(0);
    wrmsr(0x4B56_4D01, physical(frame(0)) | 1);
    coarsely(t, "kvmclock", coarse.quantum_ns, 64, || {
        loop {
            if let Some(now) = read_clock(frame(0).as_ptr()) {
                return now;
            }
        }
    });
    wrmsr(0x4B56_4D01, 0);
}

/// Asking for the wall clock again and again tells one thing while the HPET stands.
fn kvm_wall_clock(t: &mut T) {
    let Some(_) = coarse(t) else { return };
    if kvm_base().is_none() {
        return t.skip("no kvm dialect");
    }
    let (mut alone, mut seen, mut last) = (0, 0, (0, [0; 8]));
    for _ in 0..5_000 {
        let before = block::now();
        wrmsr(0x4B56_4D00, physical(frame(0)));
        let value: [u8; 8] = frame(0)[4..12].try_into().unwrap();
        if before == block::now() {
            seen += 1;
            alone += u32::from(last.0 == before && last.1 != value);
            last = (before, value);
        }
    }
    t.is("seen", seen > 500);
    t.same("changed while the HPET stood", alone, 0);
}

/// The native dialect's page, by the kit.
fn native_clock(t: &mut T) {
    let Some(coarse) = coarse(t) else { return };
    let processor = coarse.processor;
    coarsely(t, "clock", coarse.quantum_ns, 64, || processor.now());
    t.eq("wall clock", coarse.contract.terms().wall_ns % coarse.quantum_ns, 0);
}

fn time_of_day(t: &mut T) {
    let Some(coarse) = coarse(t) else { return };
    let last = Cell::new(0);
    let (contract, quantum_ns) = (coarse.contract, coarse.quantum_ns);
    coarsely(t, "time of day", quantum_ns, 64, || {
        last.set(contract.time_of_day().unwrap_or(last.get())); // too often: as it was
        last.get()
    });
    t.eq("a multiple of the quantum", last.get() % quantum_ns, 0);
}

/// Sets a timer to the middle of a quantum, again and again. `arm` takes the nanoseconds it is to ring after; it is early
/// where it has rung and the HPET does not say that they are over.
fn never_inside(t: &mut T, what: &str, quantum_ns: u64, arm: impl Fn(u64), rung: impl Fn() -> bool) {
    let (mut came, mut early) = (0, 0);
    for round in 0..u64::from(TIMERS) {
        let after_ns = quantum_ns * (round % 3) + quantum_ns / 2;
        let start = block::now();
        arm(after_ns);
        came += u32::from((0..100).any(|_| apic::wait_for(&rung)));
        early += u32::from((block::now() - start) * block::TICK_NS < after_ns);
        apic::drain();
    }
    t.same(format_args!("{what}: came"), came, TIMERS);
    t.same(format_args!("{what}: early"), early, 0);
}

fn requested() -> bool {
    apic::bit(apic::reg::IRR, VECTOR.into())
}

fn apic_timer(t: &mut T) {
    let Some(coarse) = coarse(t) else { return };
    apic::enable();
    apic::write(apic::reg::TIMER_DIVIDE, 0b1011);
    apic::write(apic::reg::LVT_TIMER, VECTOR.into());
    never_inside(t, "one-shot", coarse.quantum_ns, |ns| apic::write(apic::reg::TIMER_INITIAL, ns as u32), requested);
    apic::enable();
}

fn tsc_deadline(t: &mut T) {
    let Some(coarse) = coarse(t) else { return };
    if !Feature::TSC_DEADLINE.present() {
        return t.skip("no TSC deadline");
    }
    apic::enable();
    apic::write(apic::reg::LVT_TIMER, 0x4_0000 | u32::from(VECTOR));
    let khz = u64::from(coarse.contract.found().tsc_khz);
    never_inside(t, "deadline", coarse.quantum_ns, |ns| wrmsr(msr::TSC_DEADLINE, rdtsc() + ns * khz / 1_000_000), requested);
    apic::enable();
}

/// The HPET's timer 0, on input 20 of the I/O APIC.
fn hpet_timer(t: &mut T) {
    let Some(coarse) = coarse(t) else { return };
    apic::enable();
    apic::io::set_entry(20, VECTOR.into());
    block::write(block::TIMER, 20 << 9 | 1 << 2); // route, interrupt enabled
    // It rings where the counter comes to the comparator: what the counter has gone past meanwhile is set again.
    let arm = |ns: u64| {
        loop {
            let at = block::now() + ns / block::TICK_NS;
            block::write(block::COMPARATOR, at);
            if block::now() < at || requested() {
                return;
            }
        }
    };
    never_inside(t, "HPET", coarse.quantum_ns, arm, requested);
    block::write(block::TIMER, 0);
    apic::io::mask_all();
}

/// The PIT's channel 0 in mode 0, on input 2 of the I/O APIC.
fn pit_timer(t: &mut T) {
    let Some(coarse) = coarse(t) else { return };
    apic::enable();
    apic::io::set_entry(2, VECTOR.into());
    let arm = |ns: u64| {
        let [low, high, ..] = (ns * PIT_HZ / NS_PER_S + 1).to_le_bytes();
        outb(0x43, 0x30);
        outb(0x40, low);
        outb(0x40, high);
    };
    never_inside(t, "PIT", coarse.quantum_ns, arm, requested);
    apic::io::mask_all();
}

fn native_timer(t: &mut T) {
    let Some(coarse) = coarse(t) else { return };
    if !coarse.contract.uses(feature::TIMER | feature::CLOCK) {
        return t.skip("not offered");
    }
    apic::enable();
    let processor = coarse.processor;
    let arm = |ns: u64| _ = processor.set_timer(0, processor.now() + ns, 0, VECTOR);
    never_inside(t, "set_timer", coarse.quantum_ns, arm, requested);
}

/// A wait's timeout is a timer, too.
fn wait(t: &mut T) {
    let Some(coarse) = coarse(t) else { return };
    if !coarse.contract.uses(feature::WAIT) {
        return t.skip("not offered");
    }
    let word = AtomicU32::new(7);
    let ended = Cell::new(false);
    let arm = |ns: u64| ended.set(coarse.contract.wait(&word, 7, Some(ns)) == Ok(Waited::TimedOut));
    never_inside(t, "wait", coarse.quantum_ns, arm, || ended.replace(false));
}
