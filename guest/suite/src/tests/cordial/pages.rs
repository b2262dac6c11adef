//! The shared pages: where they may be, twice, and what stands there.

use super::*;
use contract::native::{EXIT_CAUSES, offset};

/// Page registers take a page of RAM and nothing else; what is refused leaves everything where it was, at work. A page that is
/// taken back is the guest's alone.
pub(super) fn bad_pages(t: &mut T) {
    let Some(offered) = contract(t).map(|contract| contract.terms().offered) else { return };
    let Some((contract, processor)) = using(t, offered) else { return };
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
    shows(Case::BadArgument, work(t, contract, &processor));
    t.event("page taken back", &write_msr(msr::VCPU_PAGE, 0), DONE);
    t.eq("reads", rdmsr(msr::BASE + msr::VCPU_PAGE), 0);
    let before = page::<[u8; 4096]>(0, 0);
    outl(port::RATE, contract.found().tsc_khz);
    contract.sync();
    t.is("not written", page::<[u8; 4096]>(0, 0) == before);
    contract.processor(&PAGES[0]);
}

/// Looks at what the host does with the pages, as far as it is accepted. Says of which features.
fn work(t: &mut T, contract: &Contract, processor: &Processor) -> u64 {
    apic::enable();
    let accepted = contract.terms().accepted;
    if accepted & feature::GENERATION != 0 {
        let before = contract.terms().generation;
        outl(port::GENERATION, 0);
        t.is("a new generation", contract.terms().generation != before);
    }
    if accepted & feature::CLOCK != 0 {
        let before = page::<u32>(0, offset::TIME);
        outl(port::RATE, contract.found().tsc_khz);
        let after = page::<u32>(0, offset::TIME);
        t.is("the time is written", after != before && after.is_multiple_of(2));
    }
    t.eq("exits of nothing", exits(contract, processor, || contract.sync()), 1);
    if accepted & feature::INTERRUPTS != 0 {
        let guard = processor.mask();
        apic::send_self(VECTOR.into());
        t.same("held back", apic::take(), None);
        drop(guard);
        t.same("delivered", apic::take(), Some(VECTOR.into()));
        apic::write(apic::reg::EOI, 0);
    }
    if accepted & feature::EOI != 0 {
        apic::send_self(VECTOR.into());
        t.same("taken", apic::take(), Some(VECTOR.into()));
        t.eq("ends in memory", page::<u8>(0, offset::EOI), 1);
        apic::write(apic::reg::EOI, 0);
    }
    let looked_at =
        feature::GENERATION | feature::CLOCK | feature::LEDGER | feature::INTERRUPTS | feature::EOI;
    accepted & looked_at
}

/// Three pages; what is next to the one in use stays as it is.
static OTHERS: [Shared<VcpuPage>; 3] = [const { Shared::new() }; 3];
const UNTOUCHED: u8 = 0x5A;

fn bytes(page: u64) -> [u8; 4096] {
    // SAFETY: callers name pages of ours.
    unsafe { (page as *const [u8; 4096]).read_volatile() }
}

/// Both kinds of pages registered twice: in the same place, in another one, and both in one place.
pub(super) fn pages_twice(t: &mut T) {
    let Some((contract, processor)) = using(t, 0) else { return };
    for page in &OTHERS {
        // SAFETY: a page of the suite's own.
        unsafe { (page.address() as *mut u8).write_bytes(UNTOUCHED, 4096) };
    }
    let other = physical(OTHERS[1].address() as *const u8);
    let first = [msr::VM_PAGE, msr::VCPU_PAGE].map(|register| rdmsr(msr::BASE + register));
    let version = |page: u64| u32::from_le_bytes([0, 1, 2, 3].map(|byte| bytes(page & !0xFFF)[byte]));
    let terms = contract.terms();
    for register in first {
        t.is("registered", register & msr::PAGE_ENABLE != 0);
    }
    for (register, page) in [(msr::VM_PAGE, first[0]), (msr::VCPU_PAGE, first[1])] {
        let before = version(page);
        t.event("again", &write_msr(register, page), DONE);
        t.eq("reads", rdmsr(msr::BASE + register), page);
        t.is("the version is even, and went on", version(page) % 2 == 0 && version(page) >= before);
    }
    t.same("terms", contract.terms(), terms);
    work(t, contract, &processor);

    for (register, page) in [(msr::VM_PAGE, first[0]), (msr::VCPU_PAGE, first[1])] {
        t.event("elsewhere", &write_msr(register, other | msr::PAGE_ENABLE), DONE);
        let before = bytes(page & !0xFFF);
        outl(port::GENERATION, 0);
        outl(port::RATE, contract.found().tsc_khz);
        contract.sync();
        t.is("the first one is left alone", bytes(page & !0xFFF) == before);
        t.is("the other one is in use", bytes(other)[8..] != [UNTOUCHED; 4088]);
        t.event("back", &write_msr(register, page), DONE);
    }
    work(t, contract, &processor);

    for register in [msr::VM_PAGE, msr::VCPU_PAGE, msr::VM_PAGE] {
        t.event("one for both", &write_msr(register, other | msr::PAGE_ENABLE), DONE);
        outl(port::RATE, contract.found().tsc_khz);
        contract.sync();
    }
    t.is("nothing beside it", [0, 2].into_iter().all(|page| bytes(OTHERS[page].address() as u64) == [UNTOUCHED; 4096]));
    for (register, page) in [(msr::VM_PAGE, first[0]), (msr::VCPU_PAGE, first[1])] {
        t.event("apart again", &write_msr(register, page), DONE);
    }
    t.same("terms", (contract.terms().epoch, contract.terms().accepted), (terms.epoch, terms.accepted));
    work(t, contract, &processor);
}

/// Each exit is in the counter of its cause, and in no other.
pub(super) fn ledger(t: &mut T) {
    let Some((contract, processor)) = using(t, feature::LEDGER) else { return };
    let counts = || {
        contract.sync();
        processor.exits()
    };
    let before = counts();
    for _ in 0..3 {
        inb(0x80);
    }
    rdmsr(msr::BASE + msr::VM_PAGE);
    let after = counts();
    for (index, cause) in EXIT_CAUSES.into_iter().enumerate() {
        let expected = match cause {
            "port-read" => 3,
            "msr-read" | "hypercall" => 1,
            _ => 0,
        };
        t.eq(cause, after[index] - before[index], expected);
    }
    shows(Case::Use, feature::LEDGER);
}

/// The generation id is there, stays, and changes when the VM is used a second time.
pub(super) fn generation(t: &mut T) {
    let Some((contract, _)) = using(t, feature::GENERATION) else { return };
    let first = contract.terms().generation;
    t.is("not zero", first != [0; 16]);
    t.same("stays", contract.terms().generation, first);
    outl(port::GENERATION, 0);
    t.is("changes", contract.terms().generation != first);
    shows(Case::Use, feature::GENERATION);
}
