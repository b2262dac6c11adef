//! More than one processor: start-up, interrupts between them, atomicity, memory order, shootdowns, cross-modifying code.

use crate::apic::{self, reg, wait_for};
use crate::cpu::{vector as v, *};
use crate::paging::{TEST_VA, Window, frame, physical, pte};
use crate::smp::{begin, everywhere, finish, start};
use crate::tap::*;
use crate::{code, run, tests};
use core::arch::asm;
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::*, fence};

tests![
    start_up, locked_counters, locked_across_pages, cmpxchg16b_counter, message_passing, store_buffering, fixed_ipi,
    nmi_ipi, halted_wakes, shootdown, cross_modifying_code,
];

const ROUNDS: u64 = 20_000;

static COUNTERS: [AtomicU64; 4] = [const { AtomicU64::new(0) }; 4];

/// The number of processors, or a skipped test.
fn several(t: &mut T) -> Option<usize> {
    let count = start();
    if count < 2 {
        t.skip("one processor");
        return None;
    }
    for counter in &COUNTERS {
        counter.store(0, SeqCst);
    }
    Some(count)
}

/// Every processor fw_cfg counts starts, has an APIC ID of its own, and but the first is no bootstrap processor.
fn start_up(t: &mut T) {
    static IDS: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];
    static BASES: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];
    let Some(count) = several(t) else { return };
    t.is("all run", everywhere(|cpu| {
        IDS[cpu].store(u64::from(cpuid(1, 0)[1] >> 24) | 1 << 63, SeqCst);
        BASES[cpu].store(rdmsr(msr::APIC_BASE), SeqCst);
    }));
    for cpu in 0..count {
        let id = IDS[cpu].load(SeqCst);
        t.is("ran", id >> 63 != 0);
        t.is("ID is its own", (0..cpu).all(|other| IDS[other].load(SeqCst) != id));
        t.same("BSP flag", BASES[cpu].load(SeqCst) >> 8 & 1 != 0, cpu == 0);
    }
}

/// LOCK makes read-modify-write atomic.
fn locked_counters(t: &mut T) {
    let Some(count) = several(t) else { return };
    t.is("finished", everywhere(|_| {
        let [a, b, c, d] = &COUNTERS;
        for _ in 0..ROUNDS {
            // SAFETY: the counters are statics, and each access is atomic.
            unsafe {
                asm!("lock inc qword ptr [{}]", in(reg) a.as_ptr());
                asm!("lock xadd [{}], {}", in(reg) b.as_ptr(), inout(reg) 1u64 => _);
            }
            let _ = c.fetch_update(SeqCst, SeqCst, |x| Some(x + 1));
        }
        // XCHG with memory locks without the prefix: a spin lock around a plain counter.
        static SPIN: AtomicBool = AtomicBool::new(false);
        for _ in 0..ROUNDS / 10 {
            while SPIN.swap(true, SeqCst) {
                core::hint::spin_loop();
            }
            d.store(d.load(Relaxed) + 1, Relaxed);
            SPIN.store(false, Release);
        }
    }));
    for (counter, rounds) in COUNTERS.iter().zip([ROUNDS, ROUNDS, ROUNDS, ROUNDS / 10]) {
        t.eq("sum", counter.load(SeqCst), rounds * count as u64);
    }
}

/// Locked accesses are atomic even across cache lines and pages (SDM 8.1.2.2).
fn locked_across_pages(t: &mut T) {
    let Some(count) = several(t) else { return };
    let _window = Window::new();
    frame(0).fill(0);
    frame(1).fill(0);
    t.is("finished", everywhere(|_| {
        for _ in 0..ROUNDS / 4 {
            // SAFETY: both pages are mapped, and no reference to them is held.
            unsafe { asm!("lock add qword ptr [{}], 0x10001", in(reg) TEST_VA + 4096 - 3) };
        }
    }));
    let mut bytes = [0; 8];
    bytes[..3].copy_from_slice(&frame(0)[4093..]);
    bytes[3..].copy_from_slice(&frame(1)[..5]);
    t.eq("sum", u64::from_le_bytes(bytes), 0x10001 * (ROUNDS / 4) * count as u64);
}

/// CMPXCHG16B: both halves move together.
fn cmpxchg16b_counter(t: &mut T) {
    let Some(count) = several(t) else { return };
    if !Feature::CX16.present() {
        return t.skip("no CMPXCHG16B");
    }
    frame(0).fill(0);
    t.is("finished", everywhere(|_| {
        for _ in 0..ROUNDS / 4 {
            // SAFETY: `frame(0)` is mapped and aligned, no reference to it is held, and RBX is restored.
            unsafe {
                asm!(
                    "push rbx", "mov rax, [rdi]", "mov rdx, [rdi + 8]",
                    "2: mov rbx, rax", "mov rcx, rdx", "inc rbx", "dec rcx",
                    "lock cmpxchg16b [rdi]", "jnz 2b", "pop rbx",
                    in("rdi") frame(0).as_mut_ptr(), out("rax") _, out("rcx") _, out("rdx") _,
                );
            }
        }
    }));
    let word = |o: usize| u64::from_le_bytes(frame(0)[o..o + 8].try_into().unwrap());
    t.eq("low", word(0), ROUNDS / 4 * count as u64);
    t.eq("high", word(8), word(0).wrapping_neg());
}

/// Stores are seen in order, loads happen in order (SDM 8.2.3.2).
fn message_passing(t: &mut T) {
    let Some(_) = several(t) else { return };
    static BAD: AtomicU64 = AtomicU64::new(0);
    BAD.store(0, SeqCst);
    begin(1, |_| {
        let [data, flag, ..] = &COUNTERS;
        let mut last = 0;
        while last < ROUNDS {
            last = flag.load(Relaxed);
            fence_compiler();
            if data.load(Relaxed) < last {
                BAD.fetch_add(1, SeqCst);
            }
        }
    });
    for i in 1..=ROUNDS {
        COUNTERS[0].store(i, Relaxed);
        fence_compiler();
        COUNTERS[1].store(i, Relaxed);
    }
    t.is("finished", finish(1));
    t.eq("flag seen before data", BAD.load(SeqCst), 0);
}

fn fence_compiler() {
    core::sync::atomic::compiler_fence(SeqCst);
}

/// With MFENCE between a store and a load, two processors cannot both miss the other's store (SDM 8.2.3.4).
fn store_buffering(t: &mut T) {
    let Some(_) = several(t) else { return };
    static GO: AtomicU64 = AtomicU64::new(0);
    static SEEN: AtomicU64 = AtomicU64::new(0);
    const TRIES: u64 = 2000;
    GO.store(0, SeqCst);
    begin(1, |_| {
        for i in 1..=TRIES {
            while GO.load(SeqCst) != i {
                core::hint::spin_loop();
            }
            COUNTERS[1].store(i, Relaxed);
            fence(SeqCst);
            SEEN.store(COUNTERS[0].load(Relaxed), Relaxed);
            COUNTERS[2].store(i, SeqCst);
        }
    });
    let mut bad = 0u64;
    for i in 1..=TRIES {
        GO.store(i, SeqCst);
        COUNTERS[0].store(i, Relaxed);
        fence(SeqCst);
        let seen = COUNTERS[1].load(Relaxed);
        if !wait_for(|| COUNTERS[2].load(SeqCst) == i) {
            break;
        }
        bad += u64::from(seen != i && SEEN.load(Relaxed) != i);
    }
    t.is("finished", finish(1));
    t.eq("both missed the other's store", bad, 0);
}

/// What processor 1's snippet ended with.
static EXIT_VECTOR: AtomicU64 = AtomicU64::new(0);

/// Sends an IPI to the processor whose APIC ID is `COUNTERS[3]`.
fn send(low: u32) {
    apic::enable();
    apic::write(reg::ICR_HIGH, (COUNTERS[3].load(SeqCst) as u32) << 24);
    apic::write(reg::ICR_LOW, low);
}

/// Notes this processor's ID, runs until an interrupt ends it, and notes which.
fn wait_for_interrupt(cpu: usize, code: run::Code, flags: u64) {
    EXIT_VECTOR.store(0, SeqCst);
    COUNTERS[3].store((apic::read(reg::ID) >> 24).into(), SeqCst);
    COUNTERS[2].store(1, SeqCst);
    let exit = run::run_on(cpu, &code.kernel_on(cpu).with(|r| r.rflags |= flags));
    EXIT_VECTOR.store(exit.vector, SeqCst);
    apic::write(reg::EOI, 0);
}

/// Starts processor 1 on `work` and waits until it is ready for an interrupt.
fn ready(t: &mut T, work: fn(usize)) -> bool {
    COUNTERS[2].store(0, SeqCst);
    begin(1, work);
    let ready = wait_for(|| COUNTERS[2].load(SeqCst) == 1);
    t.is("ready", ready);
    ready
}

/// Fixed interrupts reach the other processor while it runs.
fn fixed_ipi(t: &mut T) {
    let Some(_) = several(t) else { return };
    for (what, low) in [("physical", 0x4061u32), ("all but self", 0xC_4061)] {
        if ready(t, |cpu| wait_for_interrupt(cpu, code!("2: pause", "jmp 2b"), flag::IF)) {
            send(low);
            t.is("finished", finish(1));
            t.eq(what, EXIT_VECTOR.load(SeqCst), 0x61);
        }
    }
}

/// An NMI gets through with interrupts off.
fn nmi_ipi(t: &mut T) {
    let Some(_) = several(t) else { return };
    // Nothing holds an NMI back, so it must not come before the code that it is to end: that code says itself that it runs.
    let work = |cpu| {
        COUNTERS[3].store((apic::read(reg::ID) >> 24).into(), SeqCst);
        let code = code!("mov qword ptr [rbx], 1", "2: pause", "jmp 2b");
        let exit = run::run_on(cpu, &code.kernel_on(cpu).with(|r| r.rbx = COUNTERS[2].as_ptr() as u64));
        EXIT_VECTOR.store(exit.vector, SeqCst);
    };
    if ready(t, work) {
        send(0x4400);
        t.is("finished", finish(1));
        t.eq("vector", EXIT_VECTOR.load(SeqCst), v::NMI);
    }
}

/// A halted processor wakes.
fn halted_wakes(t: &mut T) {
    let Some(_) = several(t) else { return };
    for _ in 0..20 {
        if ready(t, |cpu| wait_for_interrupt(cpu, code!("sti", "2: hlt", "jmp 2b"), 0)) {
            send(0x4062);
            t.is("finished", finish(1));
            t.eq("vector", EXIT_VECTOR.load(SeqCst), 0x62);
        }
    }
}

/// After the other processor has run INVLPG it does not use the old translation.
fn shootdown(t: &mut T) {
    let Some(_) = several(t) else { return };
    static ROUND: AtomicUsize = AtomicUsize::new(0);
    static SEEN: AtomicU64 = AtomicU64::new(0);
    let window = Window::new();
    frame(0).fill(0);
    frame(2).fill(1);
    ROUND.store(0, SeqCst);
    const COUNT: usize = 100;
    if !ready(t, |cpu| {
        for round in 1..=COUNT {
            // Reads the page for ever, with the translation cached, until the IPI.
            wait_for_interrupt(cpu, code!("mov rbx, 0x8040201000", "2: mov al, [rbx]", "jmp 2b"), flag::IF);
            invlpg(TEST_VA);
            // SAFETY: the page is mapped when this runs.
            SEEN.store(unsafe { (TEST_VA as *const u8).read_volatile() }.into(), SeqCst);
            ROUND.store(round, SeqCst);
        }
    }) {
        return;
    }
    let mut wrong = 0u64;
    for round in 1..=COUNT {
        wait_for(|| COUNTERS[2].load(SeqCst) == 1);
        COUNTERS[2].store(0, SeqCst);
        *window.entry(3, 0) = physical(frame(if round % 2 == 1 { 2 } else { 0 })) | pte::ALL;
        invlpg(TEST_VA);
        send(0x4063);
        if !wait_for(|| ROUND.load(SeqCst) == round) {
            break;
        }
        wrong += u64::from(SEEN.load(SeqCst) != round as u64 % 2);
    }
    t.is("finished", finish(1));
    t.eq("stale reads", wrong, 0);
    t.eq("rounds", ROUND.load(SeqCst), COUNT);
}

/// Code written by one processor runs on another that serialises first (SDM 8.1.3).
fn cross_modifying_code(t: &mut T) {
    let Some(_) = several(t) else { return };
    const COUNT: u64 = 500;
    // mov eax, imm32; ret
    frame(0)[..6].copy_from_slice(&[0xB8, 0, 0, 0, 0, 0xC3]);
    static WRONG: AtomicU64 = AtomicU64::new(0);
    WRONG.store(0, SeqCst);
    begin(1, |_| {
        // SAFETY: the page holds code that returns its constant.
        let function: extern "C" fn() -> u32 = unsafe { core::mem::transmute(frame(0).as_ptr()) };
        for i in 1..=COUNT {
            while COUNTERS[0].load(SeqCst) != i {
                core::hint::spin_loop();
            }
            cpuid(0, 0);
            WRONG.fetch_add(u64::from(u64::from(function()) != i), SeqCst);
            COUNTERS[1].store(i, SeqCst);
        }
    });
    for i in 1..=COUNT {
        // SAFETY: within the page; the code there is read by the processor only.
        unsafe { frame(0).as_mut_ptr().add(1).cast::<u32>().write_unaligned(i as u32) };
        COUNTERS[0].store(i, SeqCst);
        if !wait_for(|| COUNTERS[1].load(SeqCst) == i) {
            break;
        }
    }
    t.is("finished", finish(1));
    t.eq("old code run", WRONG.load(SeqCst), 0);
}
