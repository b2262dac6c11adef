//! The native dialect (docs/contract.md), where CPUID offers it, through the guest kit: each feature's use, its exits, its
//! refusal, bad arguments, and what becomes of it when the host takes it back.

use crate::apic;
use crate::cpu::*;
use crate::paging::physical;
use crate::run::{Exit, USER_ALIAS};
use crate::smp::{begin, finish, start};
use crate::tap::*;
use crate::{code, println, tests};
use contract::native::{call, feature, msr, run_state, status, waited};
use core::ptr::{addr_of, addr_of_mut};
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};
use kit::sync::{Condvar, Mutex, Semaphore, SpinLock};
use kit::{Batch, Contract, Processor, Shared, Status, VcpuPage, VmMemory, Waited};

tests![
    found, refused_before_accepted, accepted, unknown_calls, bad_pages, clock, clock_goes_on, clock_keeps, time_of_day,
    timer, merged_timers, masked_interrupts, ends_in_memory, stolen, yields, critical_sections, free_locks, batch,
    wait_ends, wait_interrupted, bad_words, bad_lists, bad_ranges, ipi, wake, contended_locks, flush, timers_of_all,
    halted, generation, overdue, revoked,
];

static MEMORY: VmMemory = VmMemory::new();
pub(super) static PAGES: [Shared<VcpuPage>; MAX_CPUS] = [const { Shared::new() }; MAX_CPUS];
static mut CONTRACT: Option<Contract> = None;

/// What the host offers a test guest to have it do: see docs/contract.md.
mod port {
    pub const REVOKE: u16 = 0x2100;
    pub const RATE: u16 = 0x2104;
    pub const GENERATION: u16 = 0x2108;
    pub const PAUSE: u16 = 0x210C;
}

const VECTOR: u8 = 0x61;
const MILLISECOND: u64 = 1_000_000;
/// Reads of the clock, and rounds through locks: fewer where each instruction is emulated.
const READS: u64 = if cfg!(integer_only) { 2_000 } else { 1_000_000 };
const LOCKS: u64 = if cfg!(integer_only) { 200 } else { 10_000 };
const CONTENDED: u64 = if cfg!(integer_only) { 100 } else { 2_000 };
/// Addresses that are no RAM: between RAM and devices, local APIC, I/O APIC, beyond all.
const NO_RAM: [u64; 4] = [0xB000_0000, apic::BASE, 0xFEC0_0000, 1 << 45];

/// The VM's contract, or a skipped test.
pub(super) fn contract(t: &mut T) -> Option<&'static Contract> {
    // SAFETY: the first processor alone changes it, and only here, before anyone else looks.
    let place = unsafe { &mut *addr_of_mut!(CONTRACT) };
    if place.is_none() {
        // SAFETY: memory is mapped one to one, executable, and this is level 0.
        *place = kit::find_here().map(|found| unsafe { Contract::start(found, &MEMORY, |address| address as u64) });
    }
    if place.is_none() {
        t.skip("no native dialect");
    }
    place.as_ref()
}

/// The contract with `features` in use, or a skipped test where they are not offered.
pub(super) fn using(t: &mut T, features: u64) -> Option<(&'static Contract, Processor<'static>)> {
    let contract = contract(t)?;
    let features = features | feature::LEDGER;
    if contract.found().offered & features != features {
        t.skip("not offered");
        return None;
    }
    if contract.accept(features).is_err() {
        t.is("accepted", false);
        return None;
    }
    Some((contract, contract.processor(&PAGES[0])))
}

/// A call as the instruction makes it, or the page where there is none: RAX.
fn raw(number: u64, args: [u64; 4]) -> i64 {
    let contract = shared();
    let snippet = if contract.found().page_only { code!("call r9") } else { code!("vmcall") };
    let regs = snippet.kernel().with(|r| {
        (r.rax, r.rbx, r.rcx) = (call::BASE + number, args[0], args[1]);
        (r.rdx, r.rsi, r.r9) = (args[2], args[3], contract.calling_page() as u64);
    });
    regs.run().regs.rax as i64
}

/// Exits that `work` costs.
fn exits(contract: &Contract, processor: &Processor, work: impl FnOnce()) -> u64 {
    let sum = || {
        contract.sync();
        processor.exits().iter().sum::<u64>()
    };
    let before = sum();
    work();
    sum() - before - 1
}

fn write_msr(register: u32, value: u64) -> Exit {
    let index = u64::from(msr::BASE + register);
    code!("wrmsr").kernel().with(|r| (r.rcx, r.rax, r.rdx) = (index, value & 0xFFFF_FFFF, value >> 32)).run()
}

fn outl(port: u16, value: u32) {
    // SAFETY: a port of a device, which answers with nothing but what the contract allows.
    unsafe { core::arch::asm!("out dx, eax", in("dx") port, in("eax") value) };
}

/// Waits for what takes long where the host is busy with others. Says whether it came true.
fn patiently(done: impl Fn() -> bool) -> bool {
    (0..100).any(|_| apic::wait_for(&done))
}

/// The same for a processor's work.
fn finished(cpu: usize) -> bool {
    (0..100).any(|_| finish(cpu))
}

/// Waits until `processor`'s clock says `end`.
fn until(processor: &Processor, end: u64) {
    while processor.now() < end {
        core::hint::spin_loop();
    }
}

/// The signature is found, whatever the hypervisor bit says, and the leaves are plausible.
fn found(t: &mut T) {
    let Some(contract) = contract(t) else { return };
    let found = contract.found();
    t.eq("major version", found.version >> 16, 1);
    t.eq("features nobody knows", found.offered & !feature::NAMES.iter().fold(0, |all, (bit, _)| all | bit), 0);
    t.is("limits", found.timers >= 1 && found.batch >= 1 && found.ranges >= 1 && found.vcpus >= 1);
    t.is("time", found.quantum_ns >= 1 && found.calls_per_s >= 1 && found.burst >= 1);
    let terms = contract.terms();
    t.eq("offered in the VM page", terms.offered, found.offered);
    t.eq("epoch", terms.epoch, 1);
}

/// Nothing works before it is accepted.
fn refused_before_accepted(t: &mut T) {
    let Some(contract) = contract(t) else { return };
    if contract.terms().accepted != 0 {
        t.skip("accepted by an earlier test");
        return;
    }
    let word = AtomicU32::new(0);
    let word = physical(&raw const word);
    for (number, args) in [
        (call::TIME_OF_DAY, [0; 4]),
        (call::SET_TIMER, [0, 1, 0, VECTOR.into()]),
        (call::ACK, [0; 4]),
        (call::IRQ_WINDOW, [0; 4]),
        (call::YIELD_TO, [u64::MAX, 0, 0, 0]),
        (call::BOOST, [0; 4]),
        (call::SEND_IPI, [VECTOR.into(), 0, 1, 0]),
        (call::FLUSH_TLB, [1, 0, 0, 0]),
        (call::MULTICALL, [word, 0, 0, 0]),
        (call::WAIT, [word, 1, 0, 0]),
        (call::WAKE, [word, 1, 0, 0]),
        (call::ENTROPY, [word, 4, 0, 0]),
    ] {
        t.same(number, raw(number, args), status::NOT_ACCEPTED);
    }
    t.same("not offered", contract.accept(1 << 63 | feature::LEDGER), Err(Status::NotOffered));
    t.eq("nothing is accepted", contract.terms().accepted, 0);
}

/// All that is offered is accepted, and the page says so.
fn accepted(t: &mut T) {
    let Some(contract) = contract(t) else { return };
    let offered = contract.found().offered;
    t.same("accept", contract.accept(offered), Ok(1));
    t.eq("in the VM page", contract.terms().accepted, offered);
    for (bit, name) in feature::NAMES {
        if offered & bit == 0 {
            t.same(name, contract.accept(bit), Err(Status::NotOffered));
        }
    }
}

/// Numbers without a meaning, and calls from level 3.
fn unknown_calls(t: &mut T) {
    let Some(contract) = contract(t) else { return };
    for number in [call::COUNT, 0x100, 0xFFFF] {
        t.same("unknown", raw(number, [0; 4]), status::UNKNOWN_CALL);
    }
    // By the page with the right to use ports, which is no right to call.
    let page = contract.calling_page() as u64 + USER_ALIAS;
    let exit = code!("call r9").user().with(|r| (r.rax, r.r9, r.rflags) = (call::BASE, page, r.rflags | flag::IOPL3)).run();
    t.eq("from level 3", exit.regs.rax, status::PERMISSION as u64);
    if !contract.found().page_only {
        let exit = code!("vmcall").user().with(|r| r.rax = call::BASE).run();
        t.eq("from level 3, by the instruction", exit.regs.rax, status::PERMISSION as u64);
    }
}

/// Page registers take a page of RAM and nothing else.
fn bad_pages(t: &mut T) {
    let Some(contract) = contract(t) else { return };
    let processor = contract.processor(&PAGES[0]);
    for register in [msr::HYPERCALL_PAGE, msr::VM_PAGE, msr::VCPU_PAGE] {
        let before = rdmsr(msr::BASE + register);
        let unaligned = [before + 8, before | 2, before & !1];
        for bad in unaligned.into_iter().chain(NO_RAM.map(|address| address | 1)).chain([!0xFFF | 1]) {
            t.event(format_args!("{register} {bad:#x}"), &write_msr(register, bad), gp(0));
        }
        t.eq("unchanged", rdmsr(msr::BASE + register), before);
    }
    for vector in [1, 15, 256, u64::MAX] {
        t.event("vector", &write_msr(msr::EVENT, vector), gp(0));
    }
    t.event("beyond", &write_msr(msr::COUNT, 0), gp(0));
    t.event("page taken back", &write_msr(msr::VCPU_PAGE, 0), DONE);
    t.eq("reads", rdmsr(msr::BASE + msr::VCPU_PAGE), 0);
    let _ = processor;
    contract.processor(&PAGES[0]);
}

/// Many reads of the clock: no exit, and never backwards.
fn clock(t: &mut T) {
    let Some((contract, processor)) = using(t, feature::CLOCK) else { return };
    let (mut last, mut backwards) = (processor.now(), 0u64);
    let first = last;
    let cost = exits(contract, &processor, || {
        for _ in 0..READS {
            let now = processor.now();
            backwards += u64::from(now < last);
            last = now;
        }
    });
    t.eq("exits", cost, 0);
    t.eq("backwards", backwards, 0);
    t.is("time passes", last > first);
}

/// The host changes the rate while we read: time goes on.
fn clock_goes_on(t: &mut T) {
    let Some((contract, processor)) = using(t, feature::CLOCK) else { return };
    let khz = contract.found().tsc_khz;
    let mut last = processor.now();
    let mut backwards = 0u64;
    for round in 0..50 {
        outl(port::RATE, if round % 2 == 0 { khz / 3 * 4 } else { khz });
        for _ in 0..100 {
            let now = processor.now();
            backwards += u64::from(now < last);
            last = now;
        }
    }
    t.eq("backwards", backwards, 0);
}

/// The clock is where the TSC says that it should be, within a microsecond: the host writes its scale anew 100 times, and pauses
/// us. A read of the clock lies between two reads of the TSC, so what is beyond both is the clock's.
fn clock_keeps(t: &mut T) {
    let Some((contract, processor)) = using(t, feature::CLOCK) else { return };
    let khz = u64::from(contract.found().tsc_khz);
    let read = || (rdtsc(), processor.now(), rdtsc());
    outl(port::RATE, khz as u32);
    let (mut start, mut last, mut backwards, mut beyond) = (read(), 0, 0, 0);
    for _ in 0..32 {
        let again = read();
        if again.2 - again.0 < start.2 - start.0 {
            start = again;
        }
    }
    let mut look = || {
        let now = read();
        let ns = |ticks: u64| (u128::from(ticks) * 1_000_000 / u128::from(khz)) as u64;
        let (least, most, passed) = (ns(now.0 - start.2), ns(now.2 - start.0) + 1, now.1 - start.1);
        beyond = least.saturating_sub(passed).max(passed.saturating_sub(most)).max(beyond);
        backwards += u64::from(now.1 < last);
        last = now.1;
    };
    for _ in 0..100 {
        outl(port::RATE, khz as u32);
        (0..20).for_each(|_| look());
    }
    processor.stood_still();
    let before = processor.now();
    outl(port::PAUSE, 50);
    t.is("time goes on in a pause", processor.now() - before >= 49 * MILLISECOND); // two clocks of the host's
    t.is("told", processor.stood_still());
    t.is("told once", !processor.stood_still());
    look();
    t.eq("backwards", backwards, 0);
    t.is(format_args!("within a microsecond: {beyond} ns beyond"), beyond <= 1000);
}

/// One exit; coarse; refused beyond the rate.
fn time_of_day(t: &mut T) {
    let Some((contract, processor)) = using(t, feature::TIME_OF_DAY) else { return };
    let mut time = Ok(0);
    t.eq("exits", exits(contract, &processor, || time = contract.time_of_day()), 1);
    t.is("after 2020", time.is_ok_and(|ns| ns > 1_577_836_800_000_000_000));
    t.eq("quantum", time.unwrap_or(1) % u64::from(contract.found().quantum_ns), 0);
    let (burst, mut refused) = (contract.found().burst, 0);
    for _ in 0..burst * 4 {
        refused += u32::from(contract.time_of_day() == Err(Status::TooOften));
    }
    t.is("refused beyond the rate", refused > 0);
    t.is("but not all", refused < burst * 4);
}

/// A timer interrupts, not before its deadline; setting it is one exit.
fn timer(t: &mut T) {
    let Some((contract, processor)) = using(t, feature::CLOCK | feature::TIMER) else { return };
    apic::enable();
    let deadline = processor.now() + 5 * MILLISECOND;
    let mut armed = Ok(true);
    let cost = exits(contract, &processor, || armed = processor.set_timer(0, deadline, 0, VECTOR));
    t.eq("exits", cost, 1);
    t.same("armed before", armed, Ok(false));
    t.is("comes", patiently(|| apic::bit(apic::reg::IRR, VECTOR.into())));
    t.is("not early", processor.now() >= deadline);
    t.same("delivered", apic::take(), Some(VECTOR.into()));
    apic::write(apic::reg::EOI, 0);
    t.same("replaced", processor.set_timer(1, processor.now() + 1_000_000 * MILLISECOND, 0, VECTOR), Ok(false));
    t.same("cancelled", processor.cancel_timer(1), Ok(true));
    t.same("cancelled again", processor.cancel_timer(1), Ok(false));
    t.same("no such timer", processor.set_timer(contract.found().timers, 1, 0, VECTOR), Err(Status::BadArgument));
    t.same("no such vector", processor.set_timer(0, 1, 0, 15), Err(Status::BadArgument));
}

/// All timers of a processor within their slack: one wake-up of the host.
fn merged_timers(t: &mut T) {
    let Some((contract, processor)) = using(t, feature::CLOCK | feature::TIMER) else { return };
    apic::enable();
    let (wakeups, raised) = contract.timer_counts();
    let (count, now) = (contract.found().timers, processor.now());
    for number in 0..count {
        let deadline = now + 200 * MILLISECOND + u64::from(number) * 100_000;
        t.same("set", processor.set_timer(number, deadline, 300 * MILLISECOND, VECTOR + number as u8), Ok(false));
    }
    t.is("all come", patiently(|| contract.timer_counts().1 == raised + u64::from(count)));
    t.eq("wake-ups of the host", contract.timer_counts().0, wakeups + 1);
    let vectors = VECTOR..VECTOR + count as u8;
    let here = |vector: u8| apic::bit(apic::reg::IRR, vector.into());
    t.is("interrupts", patiently(|| vectors.clone().all(here)));
    apic::drain();
}

/// A masked section costs no exit, an interrupt waits for its end, and acknowledging it is one.
fn masked_interrupts(t: &mut T) {
    let Some((contract, processor)) = using(t, feature::INTERRUPTS) else { return };
    apic::enable();
    let cost = exits(contract, &processor, || {
        for _ in 0..1000 {
            drop(processor.mask());
        }
    });
    t.eq("exits of masked sections", cost, 0);
    let guard = processor.mask();
    let inner = processor.mask();
    apic::send_self(VECTOR.into());
    t.same("held back", apic::take(), None);
    t.is("told", processor.interrupt_waits());
    drop(inner);
    t.same("held back by the outer mask", apic::take(), None);
    t.eq("exits of the end", exits(contract, &processor, || drop(guard)), 1);
    t.is("told no more", !processor.interrupt_waits());
    t.same("delivered", apic::take(), Some(VECTOR.into()));
    t.is("in service", apic::bit(apic::reg::ISR, VECTOR.into()));
    t.eq("exits of ack", exits(contract, &processor, || t_ok(processor.ack())), 1);
    t.is("ended", !apic::bit(apic::reg::ISR, VECTOR.into()));
}

/// An interrupt that is alone ends without an exit; one whose end the host has to see, with one.
fn ends_in_memory(t: &mut T) {
    let Some((contract, processor)) = using(t, feature::EOI | feature::INTERRUPTS) else { return };
    apic::enable();
    for _ in 0..10 {
        apic::send_self(VECTOR.into());
        let mut taken = None;
        let cost = exits(contract, &processor, || {
            taken = apic::take();
            t_ok(processor.ack());
        });
        t.same("taken", taken, Some(VECTOR.into()));
        t.eq("exits: the interrupt itself", cost, 1);
    }
    t.is("ended", !apic::bit(apic::reg::ISR, VECTOR.into()));
    apic::send_self(VECTOR.into());
    t.same("taken", apic::take(), Some(VECTOR.into()));
    contract.sync(); // each call takes the offer back
    t.eq("exits of ack", exits(contract, &processor, || t_ok(processor.ack())), 1);
    t.is("ended", !apic::bit(apic::reg::ISR, VECTOR.into()));
    apic::send_self((VECTOR - 16).into());
    apic::send_self(VECTOR.into());
    for vector in [VECTOR, VECTOR - 16] {
        t.same("taken", apic::take(), Some(vector.into()));
        t.same("in turn", apic::take(), None);
        t.same("ended", processor.ack(), Ok(()));
    }
    t.same("no more", apic::take(), None);
}

/// Stolen time is told without an exit, and does not go back.
fn stolen(t: &mut T) {
    let Some((contract, processor)) = using(t, feature::STEAL | feature::YIELD) else { return };
    let mut last = processor.stolen_ns();
    for _ in 0..100 {
        t.same("yield", contract.yield_to(None), Ok(true));
        t.is("never back", processor.stolen_ns() >= last);
        last = processor.stolen_ns();
    }
    t.eq("exits", exits(contract, &processor, || _ = processor.stolen_ns()), 0);
    t.eq("preempted", page_preempted(0), 0);
}

fn page_preempted(cpu: usize) -> u32 {
    let offset = core::mem::offset_of!(VcpuPage, preempted);
    // SAFETY: a word of a page that the host writes.
    unsafe { ((PAGES[cpu].address() + offset) as *const u32).read_volatile() }
}

/// For closures whose result is looked at by its effect.
fn t_ok(result: Result<(), Status>) {
    let _ = result;
}

/// Yielding and boosting are one exit each.
fn yields(t: &mut T) {
    let Some((contract, processor)) = using(t, feature::YIELD) else { return };
    let mut given = Ok(false);
    t.eq("exits of yield", exits(contract, &processor, || given = contract.yield_to(None)), 1);
    t.same("given", given, Ok(true));
    t.eq("exits of boost", exits(contract, &processor, || t_ok(contract.boost(0))), 1);
    t.same("to nobody", contract.yield_to(Some(contract.found().vcpus)), Err(Status::NoVcpu));
    t.same("boost nobody", contract.boost(u32::MAX), Err(Status::NoVcpu));
}

/// A critical section costs no exit.
fn critical_sections(t: &mut T) {
    let Some((contract, processor)) = using(t, feature::CRITICAL | feature::RUN_STATE) else { return };
    t.eq("exits of a critical section", exits(contract, &processor, || processor.critical(|| ())), 0);
    t.eq("run state", processor.run_state(), run_state::RUNNING);
}

/// Locks that nobody else wants cost no exit.
fn free_locks(t: &mut T) {
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

/// Several calls are one exit; a bad one among them fails alone.
fn batch(t: &mut T) {
    let Some((contract, processor)) = using(t, feature::MULTICALL | feature::TIMER | feature::IPI) else { return };
    apic::enable();
    let mut batch = Batch::<16>::new();
    let far = u64::MAX / 2;
    for number in 0..8 {
        t.is("room", batch.set_timer(contract, number, far, 0, VECTOR));
    }
    t.is("room", batch.set_timer(contract, 99, far, 0, VECTOR) && batch.send_ipi(contract, VECTOR, 0, 1));
    let mut done = Ok(0);
    t.eq("exits", exits(contract, &processor, || done = batch.run(contract)), 1);
    t.same("succeeded", done, Ok(9));
    t.same("the bad one", batch.result(8), Some(Err(Status::BadArgument)));
    t.same("the interrupt", batch.result(9), Some(Ok(1)));
    t.is("came", patiently(|| apic::bit(apic::reg::IRR, VECTOR.into())));
    apic::drain();
    for number in 0..8 {
        t.same("was armed", processor.cancel_timer(number), Ok(true));
    }
}

/// A wait ends at once where the word differs, and at its timeout, each with one exit.
fn wait_ends(t: &mut T) {
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
}

/// An interrupt that can be delivered ends a wait, and is delivered behind it; one that cannot does not.
fn wait_interrupted(t: &mut T) {
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
fn bad_words(t: &mut T) {
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
}

/// Lists and masks that are not right: refused, nothing changes.
fn bad_lists(t: &mut T) {
    let Some((contract, _)) = using(t, feature::MULTICALL | feature::IPI) else { return };
    let list = [0u64; 12];
    let at = physical(&raw const list);
    for count in [u64::from(contract.found().batch) + 1, u64::MAX, 1 << 60] {
        t.same("too many calls", raw(call::MULTICALL, [at, count, 0, 0]), status::TOO_LONG);
    }
    t.same("unaligned", raw(call::MULTICALL, [at + 4, 1, 0, 0]), status::BAD_ARGUMENT);
    for bad in NO_RAM.into_iter().chain([u64::MAX - 7]) {
        t.same("no RAM", raw(call::MULTICALL, [bad, 1, 0, 0]), status::BAD_ADDRESS);
    }
    for (first, mask) in no_vcpus(contract) {
        t.same("no vCPU", raw(call::SEND_IPI, [VECTOR.into(), first, mask, 0]), status::NO_VCPU);
    }
    for vector in [0, 15, 256] {
        t.same("vector", raw(call::SEND_IPI, [vector, 0, 1, 0]), status::BAD_ARGUMENT);
    }
    t.same("the list", list, [0; 12]);
}

/// The same of flushes.
fn bad_ranges(t: &mut T) {
    let Some((contract, _)) = using(t, feature::FLUSH_TLB) else { return };
    let list = [0u64; 2];
    let at = physical(&raw const list);
    let too_many = u64::from(contract.found().ranges) + 1;
    t.same("too many ranges", raw(call::FLUSH_TLB, [1, 0, at, too_many]), status::TOO_LONG);
    t.same("unaligned", raw(call::FLUSH_TLB, [1, 0, at + 1, 1]), status::BAD_ARGUMENT);
    for bad in NO_RAM.into_iter().chain([u64::MAX - 7]) {
        t.same("no RAM", raw(call::FLUSH_TLB, [1, 0, bad, 1]), status::BAD_ADDRESS);
    }
    t.same("an empty range", raw(call::FLUSH_TLB, [1, 0, at, 1]), status::BAD_ARGUMENT);
    for (first, mask) in no_vcpus(contract) {
        t.same("no vCPU", raw(call::FLUSH_TLB, [mask, first, 0, 0]), status::NO_VCPU);
    }
}

/// First vCPUs and masks that name one that does not exist.
fn no_vcpus(contract: &Contract) -> [(u64, u64); 3] {
    [(u64::from(contract.found().vcpus), 1), (0, 1 << 63), (u64::MAX, 2)]
}

/// The contract on several processors, or a skipped test.
fn several(t: &mut T, features: u64) -> Option<(&'static Contract, Processor<'static>, usize)> {
    let (contract, processor) = using(t, features)?;
    let count = start();
    if count < 2 {
        t.skip("one processor");
        return None;
    }
    for (cpu, vcpu) in VCPUS.iter().enumerate().take(count).skip(1) {
        begin(cpu, |cpu| seen(cpu).store(u64::from(cpuid(1, 0)[1] >> 24), SeqCst));
        t.check(finished(cpu), || println!("#   processor {cpu} does not answer"));
        vcpu.store(seen(cpu).load(SeqCst), SeqCst);
    }
    apic::enable();
    Some((contract, processor, count))
}

/// Which vCPU a processor is: they are numbered by their APIC ids, processors in the order they came.
static VCPUS: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];

fn vcpu(cpu: usize) -> u32 {
    VCPUS[cpu].load(SeqCst) as u32
}

/// The contract, on a processor that the first one has begun something on.
fn shared() -> &'static Contract {
    // SAFETY: it was made before others run what uses it, and stays.
    unsafe { (*addr_of!(CONTRACT)).as_ref() }.unwrap_or_else(|| halt_forever())
}

static WORD: AtomicU32 = AtomicU32::new(0);
static SEEN: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];

/// What a processor has to say.
fn seen(cpu: usize) -> &'static AtomicU64 {
    &SEEN[cpu]
}

/// One exit interrupts all others.
fn ipi(t: &mut T) {
    let Some((contract, processor, count)) = several(t, feature::IPI) else { return };
    for cpu in 1..count {
        seen(cpu).store(0, SeqCst);
        begin(cpu, |cpu| {
            while seen(cpu).load(SeqCst) == 0 {
                if let Some(vector) = apic::take_on(cpu) {
                    apic::write(apic::reg::EOI, 0);
                    seen(cpu).store(vector, SeqCst);
                }
            }
        });
    }
    let mask = (1 << (count - 1)) - 1;
    let mut sent = Ok(0);
    t.eq("exits", exits(contract, &processor, || sent = contract.send_ipi(VECTOR, 1, mask)), 1);
    t.same("sent", sent, Ok(count as u64 - 1));
    for cpu in 1..count {
        t.is("finished", finished(cpu));
        t.eq("vector", seen(cpu).load(SeqCst), VECTOR.into());
    }
}

/// Those who wait sleep, are woken in the order they came, and each wait is one exit.
fn wake(t: &mut T) {
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
            t.is("sleeps", patiently(|| page_run_state(cpu) == run_state::WAITING));
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

fn page_run_state(cpu: usize) -> u32 {
    let offset = core::mem::offset_of!(VcpuPage, run_state);
    // SAFETY: a word of a page that the host writes.
    unsafe { ((PAGES[cpu].address() + offset) as *const u32).read_volatile() }
}

/// Locks, conditions and semaphores of all processors at once: exclusion, and everyone gets through.
fn contended_locks(t: &mut T) {
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

/// After a flush no processor uses an old translation.
fn flush(t: &mut T) {
    use crate::paging::{TEST_VA, Window, frame, pte};
    let Some((contract, processor, _)) = several(t, feature::FLUSH_TLB) else { return };
    static STOP: AtomicU32 = AtomicU32::new(0);
    let window = Window::new();
    (frame(0)[0], frame(1)[0]) = (1, 2);
    STOP.store(0, SeqCst);
    seen(1).store(0, SeqCst);
    begin(1, |_| {
        // How often it has looked, and what it saw last.
        for looks in 1u64.. {
            // SAFETY: mapped by the window.
            let value: u64 = unsafe { (TEST_VA as *const u8).read_volatile() }.into();
            seen(1).store(looks << 8 | value, SeqCst);
            if STOP.load(SeqCst) != 0 {
                break;
            }
        }
    });
    for round in 0..20 {
        let (new, value) = if round % 2 == 0 { (1, 2) } else { (0, 1) };
        let looks = seen(1).load(SeqCst) >> 8;
        t.is("looks", patiently(|| seen(1).load(SeqCst) >> 8 > looks));
        *window.entry(3, 0) = physical(frame(new)) | pte::ALL;
        let mut flushed = Ok(0);
        t.eq("exits", exits(contract, &processor, || flushed = contract.flush_tlb(0, 1 | 1 << vcpu(1), &[])), 1);
        t.same("flushed", flushed, Ok(2));
        // What it was about to store is of before the flush; the look behind that is not.
        let looks = seen(1).load(SeqCst) >> 8;
        t.is("looks again", patiently(|| seen(1).load(SeqCst) >> 8 >= looks + 2));
        t.eq("the new page", seen(1).load(SeqCst) & 0xFF, value);
    }
    STOP.store(1, SeqCst);
    t.is("finished", finished(1));
}

/// Timers of all processors within their slack: one wake-up of the host.
fn timers_of_all(t: &mut T) {
    let Some((contract, processor, count)) = several(t, feature::CLOCK | feature::TIMER) else { return };
    static DEADLINE: AtomicU64 = AtomicU64::new(0);
    fn arm(cpu: usize) {
        let processor = shared().processor(&PAGES[cpu]);
        let armed = processor.set_timer(0, DEADLINE.load(SeqCst) + cpu as u64 * 100_000, 1_000 * MILLISECOND, VECTOR);
        seen(cpu).store(u64::from(armed == Ok(false)), SeqCst);
    }
    let (wakeups, raised) = contract.timer_counts();
    DEADLINE.store(processor.now() + 1_000 * MILLISECOND, SeqCst);
    for cpu in 1..count {
        begin(cpu, arm);
    }
    arm(0);
    for cpu in 0..count {
        t.is("finished", cpu == 0 || finished(cpu));
        t.eq("armed", seen(cpu).load(SeqCst), 1);
    }
    t.is("all come", patiently(|| contract.timer_counts().1 == raised + count as u64));
    t.eq("wake-ups of the host", contract.timer_counts().0, wakeups + 1);
    for cpu in 1..count {
        begin(cpu, apic::drain_on);
        t.is("drained", finished(cpu));
    }
    apic::drain();
}

/// A processor in HLT says so, and nothing is yielded to it.
fn halted(t: &mut T) {
    let Some((contract, _, _)) = several(t, feature::RUN_STATE | feature::YIELD | feature::IPI) else { return };
    begin(1, |cpu| {
        shared().processor(&PAGES[cpu]);
        crate::run::run_on(cpu, &code!("sti", "hlt", "cli").kernel_on(cpu));
        apic::write(apic::reg::EOI, 0);
        seen(cpu).store(page_preempted(cpu).into(), SeqCst);
    });
    t.is("halts", patiently(|| page_run_state(1) == run_state::HALTED));
    let told = contract.uses(feature::STEAL);
    t.is("preempted", patiently(|| (page_preempted(1) != 0) == told));
    t.same("yield", contract.yield_to(Some(vcpu(1))), Ok(false));
    t.same("wake it", contract.send_ipi(VECTOR, vcpu(1), 1), Ok(1));
    t.is("finished", finished(1));
    t.eq("runs", page_run_state(1), run_state::RUNNING);
    t.eq("preempted while it ran", seen(1).load(SeqCst), 0);
}

/// The generation id is there, stays, and changes when the VM is used a second time.
fn generation(t: &mut T) {
    let Some((contract, _)) = using(t, feature::GENERATION) else { return };
    let first = contract.terms().generation;
    t.is("not zero", first != [0; 2]);
    t.same("stays", contract.terms().generation, first);
    outl(port::GENERATION, 0);
    t.is("changes", contract.terms().generation != first);
}

/// A revocation that nobody answers is overdue after a while, for all to see; the feature works until it is given up.
fn overdue(t: &mut T) {
    let Some((contract, processor)) = using(t, feature::TIME_OF_DAY | feature::CLOCK) else { return };
    until(&processor, processor.now() + 200 * MILLISECOND); // the rate of calls is ours again
    let epoch = contract.terms().epoch;
    outl(port::REVOKE, feature::TIME_OF_DAY as u32);
    let terms = contract.terms();
    t.eq("epoch", terms.epoch, epoch + 1);
    t.eq("revoking", terms.revoking, feature::TIME_OF_DAY);
    t.is("not overdue yet", !terms.overdue);
    let end = processor.now() + 5_000 * MILLISECOND;
    while !contract.terms().overdue && processor.now() < end {
        core::hint::spin_loop();
    }
    t.is("overdue", contract.terms().overdue);
    t.is("still honoured", contract.time_of_day().is_ok());
    t.same("a stale epoch", raw(call::REVOKE_ACK, [epoch, 0, 0, 0]), status::STALE_EPOCH);
    t.same("given up", contract.handle_revocation(|_| ()), Ok(feature::TIME_OF_DAY));
    t.same("refused", contract.time_of_day(), Err(Status::NotAccepted));
    let terms = contract.terms();
    t.is("settled", !terms.overdue && terms.revoking == 0 && terms.accepted & feature::TIME_OF_DAY == 0);
}

/// Each feature in turn is taken back: the event comes, the guest gives it up, and it is refused from then on.
fn revoked(t: &mut T) {
    let Some((contract, processor)) = using(t, 0) else { return };
    apic::enable();
    t.same("event", contract.set_event(VECTOR), Ok(()));
    let accepted = contract.terms().accepted & !feature::LEDGER;
    for (bit, name) in feature::NAMES {
        if accepted & bit == 0 {
            continue;
        }
        outl(port::REVOKE, bit as u32);
        t.same("the event", apic::take(), Some(VECTOR.into()));
        apic::write(apic::reg::EOI, 0);
        t.is(name, contract.uses(bit));
        let mut told = 0;
        t.same(name, contract.handle_revocation(|features| told = features), Ok(bit));
        t.eq(name, told, bit);
        t.is(name, !contract.uses(bit));
        t.eq(name, contract.terms().accepted & bit, 0);
        t.same(name, contract.accept(bit), Err(Status::NotOffered));
    }
    let word = AtomicU32::new(0);
    let word = physical(&raw const word);
    for (number, args) in [
        (call::SET_TIMER, [0, 1, 0, VECTOR.into()]),
        (call::ACK, [0; 4]),
        (call::YIELD_TO, [u64::MAX, 0, 0, 0]),
        (call::SEND_IPI, [VECTOR.into(), 0, 1, 0]),
        (call::FLUSH_TLB, [1, 0, 0, 0]),
        (call::MULTICALL, [word, 0, 0, 0]),
        (call::WAIT, [word, 1, 0, 0]),
        (call::WAKE, [word, 1, 0, 0]),
    ] {
        t.same(number, raw(number, args), status::NOT_ACCEPTED);
    }
    // Locks go on without a host that helps.
    let mutex = Mutex::new(0);
    *mutex.lock(contract) += 1;
    t.eq("the mutex", *mutex.lock(contract), 1);
    t.same("no more events", contract.set_event(0), Ok(()));
    let _ = processor;
}
