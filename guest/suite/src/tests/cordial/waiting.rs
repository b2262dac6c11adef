//! wait and wake, and the kit's locks on them.

use super::*;
use crate::tables::{KERNEL_CODE, default_gate, gate, idt};
use contract::native::{offset, run_state, waited};
use core::arch::{asm, global_asm};
use kit::Waited;
use kit::sync::{Condvar, Mutex, Semaphore, SpinLock};

/// Rounds through locks: fewer where each instruction is emulated.
const LOCKS: u64 = if cfg!(integer_only) { 200 } else { 10_000 };
const CONTENDED: u64 = if cfg!(integer_only) { 100 } else { 2_000 };
const ROUNDS: u64 = if cfg!(integer_only) { 500 } else { 20_000 };

/// Locks that nobody else wants cost no exit.
pub(super) fn free_locks(t: &mut T) {
    let Some((contract, processor)) = using(t, feature::WAIT) else { return };
    let (mutex, spin, semaphore) = (Mutex::new(0u64), SpinLock::new(0u64), Semaphore::new(1));
    let cost = exits(contract, &processor, || {
        for _ in 0..LOCKS {
            *mutex.lock(contract) += 1;
            *spin.lock(contract) += 1;
            semaphore.acquire(contract);
            semaphore.release(contract);
        }
    });
    t.eq("exits", cost, 0);
    t.eq("counted", *mutex.lock(contract) + *spin.lock(contract), 2 * LOCKS);
}

/// A wait ends at once where the word differs, and at its timeout, each with one exit.
pub(super) fn wait_ends(t: &mut T) {
    let Some((contract, processor)) = using(t, feature::WAIT | feature::CLOCK) else { return };
    let word = AtomicU32::new(7);
    let mut waited = Ok(Waited::Woken);
    t.eq("exits", exits(contract, &processor, || waited = contract.wait(&word, 8, None)), 1);
    t.same("differs", waited, Ok(Waited::Differed));
    let before = processor.now();
    let timeout = 3 * MILLISECOND;
    t.eq("exits", exits(contract, &processor, || waited = contract.wait(&word, 7, Some(timeout))), 1);
    t.same("times out", waited, Ok(Waited::TimedOut));
    t.is("not early", processor.now() - before >= timeout * 99 / 100); // two clocks of the host's
    t.same("nobody to wake", contract.wake(&word, u64::MAX), Ok(0));
    t.eq("the word", word.load(SeqCst), 7);
    shows(Case::Use, feature::WAIT);
}

/// An interrupt that can be delivered ends a wait, and is delivered behind it; one that cannot does not.
pub(super) fn wait_interrupted(t: &mut T) {
    let Some((contract, processor)) = using(t, feature::WAIT | feature::CLOCK | feature::TIMER) else { return };
    apic::enable();
    let word = AtomicU32::new(7);
    let due = |after: u64| processor.set_timer(0, processor.now() + after, 0, VECTOR);
    t.same("timer", due(MILLISECOND), Ok(false));
    t.same("with interrupts off", contract.wait(&word, 7, Some(20 * MILLISECOND)), Ok(Waited::TimedOut));
    t.is("it comes all the same", patiently(|| apic::bit(apic::reg::IRR, VECTOR.into())));
    t.same("delivered", apic::take(), Some(VECTOR.into()));
    apic::write(apic::reg::EOI, 0);
    t.same("timer", due(5 * MILLISECOND), Ok(false));
    let page_only = contract.found().page_only;
    let snippet = if page_only { code!("sti" ; "call r9" ; "cli") } else { code!("sti" ; "vmcall" ; "cli") };
    let page = contract.calling_page() as u64;
    let exit = snippet.kernel().with(|r| {
        (r.rax, r.rbx, r.rcx, r.rdx) = (call::BASE + call::WAIT, physical(&raw const word), 7, u64::MAX);
        r.r9 = page;
    });
    let exit = exit.run();
    t.event("interrupted", &exit, plain(VECTOR.into()));
    // Behind the instruction: within the page there is one of two bytes, OUT to a port.
    t.eq("RIP", exit.regs.rip, if page_only { page + 2 } else { snippet.next });
    t.eq("RAX", exit.regs.rax, waited::INTERRUPTED);
    apic::write(apic::reg::EOI, 0);
}

/// Words that are not aligned, wrap, are not mapped, or belong to devices: refused, nothing changes.
pub(super) fn bad_words(t: &mut T) {
    let Some((_, processor)) = using(t, feature::WAIT) else { return };
    let words = [0x1234_5678u32; 4];
    let at = physical(&raw const words);
    let id = apic::read(apic::reg::ID);
    for number in [call::WAIT, call::WAKE] {
        for offset in 1..4 {
            t.same("unaligned", raw(number, [at + offset, 0, 0, 0]), status::BAD_ARGUMENT);
        }
        for bad in NO_RAM.into_iter().chain([u64::MAX - 3]) {
            t.same(format_args!("{bad:#x}"), raw(number, [bad, 0, 0, 0]), status::BAD_ADDRESS);
        }
    }
    t.same("expected is 32 bits", raw(call::WAIT, [at, 1 << 32, 0, 0]), status::BAD_ARGUMENT);
    t.same("the words", words, [0x1234_5678; 4]);
    t.eq("the device", apic::read(apic::reg::ID), id);
    t.eq("run state", processor.run_state(), run_state::RUNNING);
    shows(Case::BadArgument, feature::WAIT);
}

/// Those who wait sleep, are woken in the order they came, and each wait is one exit.
pub(super) fn wake(t: &mut T) {
    let Some((contract, processor, count)) = several(t, feature::WAIT | feature::CLOCK) else { return };
    let told = contract.accept(feature::RUN_STATE).is_ok();
    static ORDER: AtomicU64 = AtomicU64::new(0);
    ORDER.store(0, SeqCst);
    WORD.store(1, SeqCst);
    for cpu in 1..count {
        seen(cpu).store(0, SeqCst);
        begin(cpu, |cpu| {
            let contract = shared();
            let processor = contract.processor(&PAGES[cpu]);
            let mut waited = Ok(Waited::TimedOut);
            let cost = exits(contract, &processor, || waited = contract.wait(&WORD, 1, None));
            let place = ORDER.fetch_add(1, SeqCst);
            seen(cpu).store(u64::from(waited == Ok(Waited::Woken)) | cost << 8 | place << 16, SeqCst);
        });
        // It sleeps before the next one comes.
        if told {
            t.is("sleeps", patiently(|| page::<u32>(cpu, offset::RUN_STATE) == run_state::WAITING));
        } else {
            until(&processor, processor.now() + 50 * MILLISECOND);
        }
    }
    for cpu in 1..count {
        t.same("one is woken", contract.wake(&WORD, 1), Ok(1));
        t.is("finished", finished(cpu));
        let place = cpu as u64 - 1;
        t.eq("woken, with one exit, in turn", seen(cpu).load(SeqCst), 1 | 1 << 8 | place << 16);
    }
    t.same("nobody is left", contract.wake(&WORD, 9), Ok(0));
}

/// Locks, conditions and semaphores of all processors at once: exclusion, and everyone gets through.
pub(super) fn contended_locks(t: &mut T) {
    let Some((contract, _, count)) = several(t, feature::WAIT) else { return };
    static MUTEX: Mutex<u64> = Mutex::new(0);
    static SPIN: SpinLock<u64> = SpinLock::new(0);
    static PERMITS: Semaphore = Semaphore::new(1);
    static GUARDED: AtomicU64 = AtomicU64::new(0);
    static TURN: Mutex<u64> = Mutex::new(0);
    static MOVED: Condvar = Condvar::new();
    fn work(cpu: usize) {
        let contract = shared();
        for _ in 0..CONTENDED {
            *MUTEX.lock(contract) += 1;
            *SPIN.lock(contract) += 1;
            PERMITS.acquire(contract);
            GUARDED.store(GUARDED.load(SeqCst) + 1, SeqCst);
            PERMITS.release(contract);
        }
        // Processors take turns, by a condition.
        for _ in 0..50 {
            let mut turn = TURN.lock(contract);
            while *turn % u64::from(seen(0).load(SeqCst) as u32) != cpu as u64 {
                turn = MOVED.wait(turn);
            }
            *turn += 1;
            drop(turn);
            MOVED.notify_all(contract);
        }
    }
    (*MUTEX.lock(contract), *SPIN.lock(contract), *TURN.lock(contract)) = (0, 0, 0);
    GUARDED.store(0, SeqCst);
    seen(0).store(count as u64, SeqCst);
    for cpu in 1..count {
        begin(cpu, work);
    }
    work(0);
    for cpu in 1..count {
        t.is("finished", finished(cpu));
    }
    let all = CONTENDED * count as u64;
    let sums = [*MUTEX.lock(contract), *SPIN.lock(contract), GUARDED.load(SeqCst), *TURN.lock(contract)];
    t.same("sums", sums, [all, all, all, 50 * count as u64]);
}

/// Ticks of processors 0 and 1, each by a vector of its own.
static TICKS: [AtomicU64; 2] = [const { AtomicU64::new(0) }; 2];
/// The first of the two.
const TICK: u8 = 0x71;
/// Of the local APIC's timer, in its ticks.
const PERIOD: u32 = if cfg!(integer_only) { 5_000_000 } else { 500_000 };

unsafe extern "C" {
    static ticks_here: u8;
    static ticks_there: u8;
}

global_asm!(
    r#"
    .macro tick name, number
\name:
    lock inc qword ptr [rip + {ticks} + 8 * \number]
    push rax
    mov eax, {eoi}
    mov dword ptr [rax], 0
    pop rax
    iretq
    .endm

    .text
    .global ticks_here, ticks_there
    tick ticks_here, 0
    tick ticks_there, 1
"#,
    ticks = sym TICKS,
    eoi = const apic::BASE + apic::reg::EOI as u64,
);

/// Runs `work` on processor `cpu`, 0 or 1, the executing one, interrupted by its timer all the while.
fn interrupted<R>(cpu: usize, work: impl FnOnce() -> R) -> R {
    let handler = if cpu == 0 { &raw const ticks_here } else { &raw const ticks_there };
    let vector = usize::from(TICK) + cpu;
    // On a stack of its own: Rust code may have what it needs below the stack pointer.
    idt(cpu)[vector] = gate(handler as u64, KERNEL_CODE, 0x8E, 2);
    apic::write(apic::reg::TIMER_DIVIDE, 0xB); // by 1
    apic::write(apic::reg::LVT_TIMER, 1 << 17 | vector as u32); // periodic
    apic::write(apic::reg::TIMER_INITIAL, PERIOD);
    // SAFETY: the one source of interrupts that is on has its handler.
    unsafe { asm!("sti") };
    let result = work();
    // SAFETY: as Rust code had it.
    unsafe { asm!("cli") };
    apic::enable_on(cpu); // which masks the timer, and takes what is left of it by the gate, or drops it
    idt(cpu)[vector] = default_gate(cpu, vector);
    result
}

/// Two processors hand a turn to and fro, asleep while it is not theirs, and both are interrupted by timers meanwhile: no wake
/// is lost, or it would not end.
pub(super) fn ping_pong(t: &mut T) {
    let Some((contract, _, _)) = several(t, feature::WAIT) else { return };
    static TURN: Mutex<u64> = Mutex::new(0);
    static MOVED: Condvar = Condvar::new();
    static SUMS: [Mutex<u64>; 2] = [const { Mutex::new(0) }; 2];
    fn play(cpu: usize) {
        let contract = shared();
        interrupted(cpu, || {
            for round in 0..ROUNDS {
                let mut turn = TURN.lock(contract);
                while *turn % 2 != cpu as u64 {
                    turn = MOVED.wait(turn);
                }
                *turn += 1;
                drop(turn);
                MOVED.notify_one(contract);
                *SUMS[cpu].lock(contract) += round;
            }
        });
    }
    *TURN.lock(contract) = 0;
    for number in 0..2 {
        *SUMS[number].lock(contract) = 0;
        TICKS[number].store(0, SeqCst);
    }
    begin(1, play);
    play(0);
    t.is("finished", finished(1));
    t.eq("turns", *TURN.lock(contract), 2 * ROUNDS);
    for number in 0..2 {
        t.eq("sum", *SUMS[number].lock(contract), ROUNDS * (ROUNDS - 1) / 2);
        t.is("ticks", TICKS[number].load(SeqCst) > 0);
    }
}
