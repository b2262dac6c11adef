//! The end of an interrupt in memory, interrupts by a call, extended destination ids.

use super::*;
use crate::apic::{io, reg};
use core::arch::asm;

/// A less urgent vector.
const LOWER: u8 = 0x41;

/// Ends an interrupt as a guest does that has PV EOI: true where that took no write to the APIC.
fn end_in_memory(place: *mut u8) -> bool {
    let ended: u8;
    // SAFETY: as above; one instruction, as the host demands.
    unsafe { asm!("btr dword ptr [{}], 0", "setc {}", in(reg) place, out(reg_byte) ended) };
    ended != 0
}

/// The byte of PV EOI: where it is, what it holds with an interrupt in service, and what becomes of it.
pub(super) fn pv_eoi(t: &mut T) {
    if !offered(t, feature::PV_EOI) {
        return;
    }
    apic::enable();
    frame(0).fill(0);
    let (byte, page) = (&raw mut frame(0)[0], physical(frame(0)));
    t.event("enable", &write_msr(pv::EOI, page | 1), DONE);
    refuses(t, pv::EOI, &[page | 2, page | 3]);
    shows(Case::BadArgument, feature::PV_EOI);
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
    shows(Case::Use, feature::PV_EOI);
}

/// The end of a level-triggered interrupt has to reach the I/O APIC.
pub(super) fn pv_eoi_of_levels(t: &mut T) {
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

/// An interrupt that comes while one is in service, and is less urgent, is not forgotten when that one ends in memory.
pub(super) fn pv_eoi_and_others(t: &mut T) {
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

/// Bits 55:49 of an I/O APIC entry are part of the destination where that is offered, and nothing else.
pub(super) fn extended_ids(t: &mut T) {
    const INPUT: u32 = 14;
    let Some(features) = features(t) else { return };
    apic::enable();
    io::mask_all();
    io::line(INPUT, false);
    io::set_entry(INPUT, apic_id() << 56 | 1 << 49 | u64::from(VECTOR));
    io::line(INPUT, true);
    let nobody = features >> feature::EXT_DEST_ID & 1 != 0;
    t.same("taken", apic::take(), if nobody { None } else { Some(VECTOR.into()) });
    shows(if nobody { Case::Use } else { Case::Refusal }, feature::EXT_DEST_ID);
    io::line(INPUT, false);
    io::mask_all();
    apic::drain();
}

/// An interrupt and an NMI to this processor; commands that name destinations themselves are refused.
pub(super) fn send_ipi(t: &mut T) {
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
    shows(Case::Use, feature::PV_SEND_IPI);
    for bad in [1 << 11, 1 << 18, 2 << 18, 3 << 18] {
        t.same("refused", hypercall(call::SEND_IPI, [1, 0, id, u64::from(VECTOR) | bad]), -22);
    }
    for nobody in [0xFE, 0xFFFF_FFFF] {
        t.same("nobody", hypercall(call::SEND_IPI, [u64::MAX, u64::MAX, nobody, VECTOR.into()]), 0);
    }
    t.same("nothing is sent", hypercall(call::SEND_IPI, [0, 0, id, VECTOR.into()]), 0);
    t.same("nothing came", apic::take(), None);
    shows(Case::BadArgument, feature::PV_SEND_IPI);
}

/// One call interrupts all others.
pub(super) fn ipi_to_others(t: &mut T) {
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
