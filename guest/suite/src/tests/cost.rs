//! What it costs to reach the host, by each way there is: nanoseconds and exits, for `cargo xtask bench contract`.
//!
//! A line `# cost OPERATION WAY TIMES NANOSECONDS EXITS` a round, numbers in hexadecimal: those need no vector instructions. Where the machine makes each sensitive instruction an exit
//! (`--virt classic`), `instruction` is a trap.

use crate::apic::{self, reg};
use crate::tap::*;
use crate::tests::cordial::{contract, using};
use crate::{println, tests};
use contract::native::feature;
use core::arch::asm;
use kit::{Batch, Contract, Processor};

tests![
    mask_by_instruction, mask_by_call, mask_by_memory, clock_by_instruction, clock_by_device, clock_by_call,
    clock_by_memory, end_by_register, end_by_call, timer_by_register, timer_by_call, timers_by_one_call,
    interrupt_by_register, interrupt_by_call, interrupt_by_memory,
];

const ROUNDS: usize = 5;
/// Operations in a round: fewer where each instruction is emulated. All rounds of time of day stay within the policy's burst.
const TIMES: u64 = if cfg!(integer_only) { 160 } else { 1_600 };
const TIMES_OF_DAY: u64 = 160;
/// The HPET's main counter (IA-PC HPET Specification, 2.3.7).
const HPET_COUNTER: *const u64 = 0xFED0_00F0 as *const u64;
const VECTOR: u8 = 0x61;
/// Timers in a batch: as many as a vCPU has.
const TIMERS: u32 = 8;
/// A deadline that does not come.
const FAR: u64 = u64::MAX / 2;

/// Has `work` done several times, each `operations` of them, and tells what a round cost. Each round has as many exits.
fn measure(t: &mut T, (operation, way): (&str, &str), features: u64, operations: u64, mut work: impl FnMut(&Contract, &Processor)) {
    let Some((contract, processor)) = using(t, features) else { return };
    let sum = || {
        contract.sync();
        processor.exits().iter().sum::<u64>()
    };
    let khz = u64::from(contract.found().tsc_khz).max(1);
    let mut first = None;
    for _ in 0..ROUNDS {
        let (before, start) = (sum(), crate::cpu::rdtsc());
        work(contract, &processor);
        let ticks = crate::cpu::rdtsc() - start;
        let exits = sum() - before - 1;
        // The two readings of the counter are exits themselves where all are.
        let exits = exits.saturating_sub(if traps(contract, &processor) { 2 } else { 0 });
        t.eq("exits of each round", exits, *first.get_or_insert(exits));
        println!("# cost {operation} {way} {operations:#x} {:#x} {exits:#x}", ticks * 1_000_000 / khz);
    }
}

/// Whether reading the counter is an exit.
fn traps(contract: &Contract, processor: &Processor) -> bool {
    let sum = || {
        contract.sync();
        processor.exits().iter().sum::<u64>()
    };
    let before = sum();
    crate::cpu::rdtsc();
    sum() - before > 1
}

/// CLI and STI, with nothing that could interrupt.
fn mask_by_instruction(t: &mut T) {
    apic::enable();
    measure(t, ("mask", "instruction"), 0, TIMES, |_, _| {
        for _ in 0..TIMES {
            // SAFETY: all sources of interrupts are masked.
            unsafe { asm!("cli", "sti") };
        }
    });
    // SAFETY: as the suite had it.
    unsafe { asm!("cli") };
}

/// The call at the end of a masked section in which an interrupt came.
fn mask_by_call(t: &mut T) {
    apic::enable();
    measure(t, ("mask", "call"), feature::INTERRUPTS, TIMES, |contract, _| {
        for _ in 0..TIMES {
            let _ = contract.open_window();
        }
    });
}

fn mask_by_memory(t: &mut T) {
    apic::enable();
    measure(t, ("mask", "memory"), feature::INTERRUPTS, TIMES, |_, processor| {
        for _ in 0..TIMES {
            drop(processor.mask());
        }
    });
}

fn clock_by_instruction(t: &mut T) {
    measure(t, ("clock", "instruction"), 0, TIMES, |_, _| {
        for _ in 0..TIMES {
            crate::cpu::rdtsc();
        }
    });
}

fn clock_by_device(t: &mut T) {
    measure(t, ("clock", "device"), 0, TIMES, |_, _| {
        for _ in 0..TIMES {
            // SAFETY: the page is the HPET's: mapped, of aligned registers, and no Rust object is in it.
            unsafe { HPET_COUNTER.read_volatile() };
        }
    });
}

fn clock_by_call(t: &mut T) {
    measure(t, ("clock", "call"), feature::TIME_OF_DAY, TIMES_OF_DAY, |contract, _| {
        for _ in 0..TIMES_OF_DAY {
            let _ = contract.time_of_day();
        }
    });
}

fn clock_by_memory(t: &mut T) {
    measure(t, ("clock", "memory"), feature::CLOCK, TIMES, |_, processor| {
        for _ in 0..TIMES {
            core::hint::black_box(processor.now());
        }
    });
}

/// The end of an interrupt by the local APIC's register; none is in service.
fn end_by_register(t: &mut T) {
    apic::enable();
    measure(t, ("end", "instruction"), 0, TIMES, |_, _| {
        for _ in 0..TIMES {
            apic::write(reg::EOI, 0);
        }
    });
}

fn end_by_call(t: &mut T) {
    apic::enable();
    measure(t, ("end", "call"), feature::INTERRUPTS, TIMES, |_, processor| {
        for _ in 0..TIMES {
            let _ = processor.ack();
        }
    });
}

/// The local APIC's timer, masked, far from its end.
fn timer_by_register(t: &mut T) {
    apic::enable();
    measure(t, ("timer", "instruction"), 0, TIMES, |_, _| {
        for _ in 0..TIMES {
            apic::write(reg::TIMER_INITIAL, u32::MAX);
        }
    });
    apic::write(reg::TIMER_INITIAL, 0);
}

fn timer_by_call(t: &mut T) {
    measure(t, ("timer", "call"), feature::TIMER, TIMES, |_, processor| {
        for _ in 0..TIMES {
            let _ = processor.set_timer(0, FAR, 0, VECTOR);
        }
    });
    disarm(t);
}

/// All timers of a processor in one call.
fn timers_by_one_call(t: &mut T) {
    measure(t, ("timer", "memory"), feature::TIMER | feature::MULTICALL, TIMES, |contract, _| {
        for _ in 0..TIMES / u64::from(TIMERS) {
            let mut batch = Batch::<{ TIMERS as usize }>::new();
            for number in 0..TIMERS {
                batch.set_timer(contract, number, FAR, 0, VECTOR);
            }
            let _ = batch.run(contract);
        }
    });
    disarm(t);
}

/// An interrupt to oneself, taken, and ended by the local APIC's register.
fn interrupt_by_register(t: &mut T) {
    interrupts(t, "instruction", 0, |_| apic::write(reg::EOI, 0));
}

fn interrupt_by_call(t: &mut T) {
    interrupts(t, "call", feature::INTERRUPTS, |processor| {
        let _ = processor.ack();
    });
}

fn interrupt_by_memory(t: &mut T) {
    interrupts(t, "memory", feature::INTERRUPTS | feature::EOI, |processor| {
        let _ = processor.ack();
    });
}

fn interrupts(t: &mut T, way: &str, features: u64, end: impl Fn(&Processor)) {
    apic::enable();
    measure(t, ("interrupt", way), features, TIMES, |_, processor| {
        for _ in 0..TIMES {
            apic::write(reg::ICR_LOW, 0x4_0000 | u32::from(VECTOR)); // to itself
            apic::take();
            end(processor);
        }
    });
}

fn disarm(t: &mut T) {
    if let Some(contract) = contract(t)
        && contract.uses(feature::TIMER)
    {
        let processor = contract.processor(&crate::tests::cordial::PAGES[0]);
        for number in 0..TIMERS {
            let _ = processor.cancel_timer(number);
        }
    }
}
