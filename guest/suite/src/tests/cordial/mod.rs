//! The native dialect (docs/contract.md), where CPUID offers it, through the guest kit: each feature's use, its exits, its
//! refusal, bad arguments, and what becomes of it when the host takes it back.
//!
//! What a test shows of a feature it says by [`shows`]; a run is checked for cases that are missing.

mod agreement;
mod interrupts;
mod keeping;
mod lists;
mod pages;
mod pause;
mod processors;
mod storm;
mod time;
mod unused;
mod waiting;

use crate::apic;
use crate::cpu::*;
use crate::paging::{NO_RAM, physical};
use crate::run::Exit;
use crate::smp::{begin, finish, start};
use crate::tap::*;
use crate::{code, println, tests};
use contract::native::{call, feature, msr, status};
use core::ptr::{addr_of, addr_of_mut};
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};
use kit::{Contract, Processor, Shared, Status, VcpuPage, VmMemory};

tests! {
    agreement { found, refused_before_accepted, accepted, unknown_calls }
    pages { bad_pages, pages_twice, ledger }
    time { clock, clock_goes_on }
    keeping { clock_keeps }
    time { time_of_day, timer, merged_timers }
    interrupts { masked_interrupts, ends_in_memory }
    processors { stolen, yields, critical_sections }
    waiting { free_locks }
    lists { batch }
    waiting { wait_ends, wait_interrupted, bad_words }
    lists { bad_lists, bad_ranges }
    interrupts { ipi }
    waiting { wake, contended_locks, ping_pong }
    processors { flush }
    time { timers_of_all }
    processors { halted }
    pause { paused_in_wait, paused_with_timeout, paused_in_hlt, paused_with_timers, paused_in_yield }
    pages { generation }
    storm { storm }
    agreement { overdue, revoked_twice, revoked }
}

static MEMORY: VmMemory = VmMemory::new();
pub(super) static PAGES: [Shared<VcpuPage>; MAX_CPUS] = [const { Shared::new() }; MAX_CPUS];
static mut CONTRACT: Option<Contract> = None;

/// What the host offers a test guest to have it do: see docs/contract.md.
mod port {
    pub const REVOKE: u16 = 0x2100;
    pub const RATE: u16 = 0x2104;
    pub const GENERATION: u16 = 0x2108;
    pub const PAUSE: u16 = 0x210C;
    /// The host's CLOCK_MONOTONIC, nanoseconds: the low half is read first, and says of which moment.
    pub const HOST_NS: [u16; 2] = [0x2100, 0x2104];
}

const VECTOR: u8 = 0x61;
const MILLISECOND: u64 = 1_000_000;

/// Which vCPU a processor is: they are numbered by their APIC ids, processors in the order they came.
static VCPUS: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];
static WORD: AtomicU32 = AtomicU32::new(0);
static SEEN: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];

/// Says what is shown of each of `features`.
fn shows(case: Case, features: u64) {
    names(features).for_each(|(_, name)| case.of("cordial", name));
}

/// Each of `features`, and its name.
fn names(features: u64) -> impl Iterator<Item = (u64, &'static str)> {
    feature::NAMES.into_iter().filter(move |(bit, _)| features & bit != 0)
}

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

/// The contract on several processors, or a skipped test.
fn several(t: &mut T, features: u64) -> Option<(&'static Contract, Processor<'static>, usize)> {
    let (contract, processor) = using(t, features)?;
    let count = start_others(t);
    if count < 2 {
        t.skip("one processor");
        return None;
    }
    apic::enable();
    Some((contract, processor, count))
}

/// Starts the other processors, and learns which vCPUs they are. Returns how many there are, with this one.
fn start_others(t: &mut T) -> usize {
    let count = start();
    for (cpu, vcpu) in VCPUS.iter().enumerate().take(count).skip(1) {
        begin(cpu, |cpu| seen(cpu).store(u64::from(cpuid(1, 0)[1] >> 24), SeqCst));
        t.check(finished(cpu), || println!("#   processor {cpu} does not answer"));
        vcpu.store(seen(cpu).load(SeqCst), SeqCst);
    }
    count
}

fn vcpu(cpu: usize) -> u32 {
    VCPUS[cpu].load(SeqCst) as u32
}

/// The contract, on a processor that the first one has begun something on.
fn shared() -> &'static Contract {
    // SAFETY: it was made before others run what uses it, and stays.
    unsafe { (*addr_of!(CONTRACT)).as_ref() }.unwrap_or_else(|| halt_forever())
}

/// What a processor has to say.
fn seen(cpu: usize) -> &'static AtomicU64 {
    &SEEN[cpu]
}

/// A field of a vCPU page, as the host has written it.
fn page<V: Copy>(cpu: usize, offset: u64) -> V {
    // SAFETY: `offset` is one of the contract's, of a field that is a `V`, in a page that the host writes.
    unsafe { ((PAGES[cpu].address() as u64 + offset) as *const V).read_volatile() }
}

/// For closures whose result is looked at by its effect.
fn t_ok(result: Result<(), Status>) {
    let _ = result;
}
