//! The mask, the end of an interrupt in memory, interrupts to several.

use super::*;

/// A masked section costs no exit, an interrupt waits for its end, and acknowledging it is one.
pub(super) fn masked_interrupts(t: &mut T) {
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
    shows(Case::Use, feature::INTERRUPTS);
}

/// An interrupt that is alone ends without an exit; one whose end the host has to see, with one.
pub(super) fn ends_in_memory(t: &mut T) {
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
    shows(Case::Use, feature::EOI);
}

/// One exit interrupts all others.
pub(super) fn ipi(t: &mut T) {
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
    shows(Case::Use, feature::IPI);
}
