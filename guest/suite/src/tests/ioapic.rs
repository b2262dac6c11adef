//! The I/O APIC: registers, edge and level, masks, remote IRR (82093AA datasheet; ICH9 datasheet 13.5); needs the test device.

use crate::apic::{self, bit, enable, io, reg, take, take_halted};
use crate::cpu::{cpuid, inb, outb};
use crate::tap::*;
use crate::tests;

tests![
    registers, edge, edge_while_masked_line, level, level_while_masked, remote_irr, level_again_after_eoi, two_levels, level_lowered_before_eoi,
    trigger_mode_switch, tmr, polarity, destination_logical, pic_mask_registers,
    halted_by_edge, halted_by_level, halted_by_pic,
];

/// An input nothing else of a PC drives, and another.
const INPUT: u32 = 14;
const OTHER: u32 = 15;

/// All masked, lines low, local APIC ready.
fn prepare() {
    enable();
    io::line(INPUT, false);
    io::line(OTHER, false);
    io::mask_all();
    apic::drain();
}

/// Our APIC ID as a destination field.
fn ours() -> u64 {
    u64::from(cpuid(1, 0)[1] >> 24) << 56
}

fn end_of_interrupt() {
    apic::write(reg::EOI, 0);
}

/// Identification, version, which bits of an entry can be written.
fn registers(t: &mut T) {
    prepare();
    io::write(0, 0xFFFF_FFFF);
    t.eq("ID", io::read(0), 0x0F00_0000);
    io::write(0, 0);
    let version = io::read(1);
    t.is("version", matches!(version & 0xFF, 0x11 | 0x20));
    t.eq("entries", version >> 16 & 0xFF, 23);
    for input in [0, INPUT, 23] {
        io::set_entry(input, io::MASKED | 0xFF00_0000_0000_A8FE);
        t.eq("read back", io::entry(input), io::MASKED | 0xFF00_0000_0000_A8FE);
        // Delivery status and remote IRR are read-only.
        io::set_entry(input, io::MASKED | 0x5000 | 0xFE);
        t.eq("read-only bits", io::entry(input), io::MASKED | 0xFE);
    }
    prepare();
}

/// One interrupt a rising edge, none for a falling one or a high line.
fn edge(t: &mut T) {
    prepare();
    io::set_entry(INPUT, ours() | 0x50);
    io::line(INPUT, true);
    t.same("rise", take(), Some(0x50));
    t.is("not level", !bit(reg::TMR, 0x50));
    end_of_interrupt();
    t.same("stays high", take(), None);
    io::line(INPUT, false);
    t.same("fall", take(), None);
    io::line(INPUT, true);
    t.same("rises again", take(), Some(0x50));
    end_of_interrupt();
    prepare();
}

/// Edges on another input do not matter, and a masked input sends nothing while masked.
fn edge_while_masked_line(t: &mut T) {
    prepare();
    io::set_entry(INPUT, ours() | io::MASKED | 0x50);
    io::line(INPUT, true);
    t.same("masked", take(), None);
    io::line(INPUT, false);
    io::set_entry(INPUT, ours() | 0x50);
    t.same("fell before it was unmasked", take(), None);
    io::line(OTHER, true);
    t.same("another input", take(), None);
    prepare();
}

/// A level is taken, and taken again after EOI for as long as it is high.
fn level(t: &mut T) {
    prepare();
    io::set_entry(INPUT, ours() | io::LEVEL | 0x51);
    io::line(INPUT, true);
    t.same("high", take(), Some(0x51));
    t.same("in service", take(), None);
    end_of_interrupt();
    t.same("still high", take(), Some(0x51));
    io::line(INPUT, false);
    end_of_interrupt();
    t.same("low", take(), None);
    prepare();
}

/// A level raised while masked is delivered when unmasked.
fn level_while_masked(t: &mut T) {
    prepare();
    io::set_entry(INPUT, ours() | io::LEVEL | io::MASKED | 0x51);
    io::line(INPUT, true);
    t.same("masked", take(), None);
    io::set_entry(INPUT, ours() | io::LEVEL | 0x51);
    t.same("unmasked", take(), Some(0x51));
    io::line(INPUT, false);
    end_of_interrupt();
    prepare();
}

/// Remote IRR: from acceptance by the local APIC until EOI.
fn remote_irr(t: &mut T) {
    prepare();
    io::set_entry(INPUT, ours() | io::LEVEL | 0x52);
    t.eq("idle", io::entry(INPUT) & io::REMOTE_IRR, 0);
    io::line(INPUT, true);
    t.eq("accepted", io::entry(INPUT) & io::REMOTE_IRR, io::REMOTE_IRR);
    t.same("taken", take(), Some(0x52));
    t.eq("in service", io::entry(INPUT) & io::REMOTE_IRR, io::REMOTE_IRR);
    io::line(INPUT, false);
    t.eq("not cleared by the line", io::entry(INPUT) & io::REMOTE_IRR, io::REMOTE_IRR);
    end_of_interrupt();
    t.eq("cleared by EOI", io::entry(INPUT) & io::REMOTE_IRR, 0);
    // An edge never sets it.
    io::set_entry(INPUT, ours() | 0x52);
    io::line(INPUT, true);
    t.eq("edge", io::entry(INPUT) & io::REMOTE_IRR, 0);
    t.same("taken", take(), Some(0x52));
    end_of_interrupt();
    prepare();
}

/// EOI with the line still high sends again and sets remote IRR again.
fn level_again_after_eoi(t: &mut T) {
    prepare();
    io::set_entry(INPUT, ours() | io::LEVEL | 0x53);
    io::line(INPUT, true);
    for _ in 0..5 {
        t.same("taken", take(), Some(0x53));
        end_of_interrupt();
        t.eq("remote IRR", io::entry(INPUT) & io::REMOTE_IRR, io::REMOTE_IRR);
    }
    io::line(INPUT, false);
    t.same("the one already requested", take(), Some(0x53));
    end_of_interrupt();
    t.same("no more", take(), None);
    prepare();
}

/// Two levels at once: by priority, each with its own remote IRR.
fn two_levels(t: &mut T) {
    prepare();
    io::set_entry(INPUT, ours() | io::LEVEL | 0x54);
    io::set_entry(OTHER, ours() | io::LEVEL | 0x74);
    io::line(INPUT, true);
    io::line(OTHER, true);
    t.same("higher first", take(), Some(0x74));
    io::line(OTHER, false);
    end_of_interrupt();
    t.eq("one ended", io::entry(OTHER) & io::REMOTE_IRR, 0);
    t.eq("the other has not", io::entry(INPUT) & io::REMOTE_IRR, io::REMOTE_IRR);
    t.same("then the lower", take(), Some(0x54));
    io::line(INPUT, false);
    end_of_interrupt();
    t.same("no more", take(), None);
    prepare();
}

/// Lowered and raised again while in service: one more after EOI.
fn level_lowered_before_eoi(t: &mut T) {
    prepare();
    io::set_entry(INPUT, ours() | io::LEVEL | 0x55);
    io::line(INPUT, true);
    t.same("taken", take(), Some(0x55));
    io::line(INPUT, false);
    io::line(INPUT, true);
    t.same("in service", take(), None);
    end_of_interrupt();
    t.same("after EOI", take(), Some(0x55));
    io::line(INPUT, false);
    end_of_interrupt();
    t.same("no more", take(), None);
    prepare();
}

/// Switching an entry to edge while remote IRR is set clears it: what kernels do to get rid of a stuck level.
fn trigger_mode_switch(t: &mut T) {
    prepare();
    io::set_entry(INPUT, ours() | io::LEVEL | 0x56);
    io::line(INPUT, true);
    t.same("taken", take(), Some(0x56));
    io::set_entry(INPUT, ours() | io::MASKED | 0x56);
    t.eq("edge", io::entry(INPUT) & io::REMOTE_IRR, 0);
    io::line(INPUT, false);
    end_of_interrupt();
    t.same("no more", take(), None);
    prepare();
}

/// TMR says level while such an interrupt is in the local APIC, and follows the trigger mode of the last acceptance.
fn tmr(t: &mut T) {
    prepare();
    io::set_entry(INPUT, ours() | io::LEVEL | 0x57);
    io::line(INPUT, true);
    t.is("level", bit(reg::TMR, 0x57));
    t.same("taken", take(), Some(0x57));
    io::line(INPUT, false);
    end_of_interrupt();
    io::set_entry(INPUT, ours() | 0x57);
    io::line(INPUT, true);
    t.is("edge", !bit(reg::TMR, 0x57));
    t.same("taken", take(), Some(0x57));
    end_of_interrupt();
    prepare();
}

/// The polarity bit can be written; the test device's line is the chip's input after the inverter, so it changes nothing.
fn polarity(t: &mut T) {
    prepare();
    io::set_entry(INPUT, io::MASKED | io::ACTIVE_LOW | 0x58);
    t.eq("read back", io::entry(INPUT) & io::ACTIVE_LOW, io::ACTIVE_LOW);
    prepare();
}

/// Logical destinations.
fn destination_logical(t: &mut T) {
    prepare();
    apic::write(reg::LDR, 0x0200_0000);
    apic::write(reg::DFR, 0xFFFF_FFFF);
    for (destination, reached) in [(2u64, true), (0xFF, true), (4, false)] {
        io::set_entry(INPUT, destination << 56 | 1 << 11 | 0x59);
        io::line(INPUT, true);
        t.same(format_args!("{destination:#x}"), take().is_some(), reached);
        end_of_interrupt();
        io::line(INPUT, false);
    }
    apic::write(reg::LDR, 0);
    prepare();
}

/// The 8259s' mask registers read back what was written, and their initialisation does not hang (8259A datasheet).
fn pic_mask_registers(t: &mut T) {
    for (command, data, base) in [(0x20u16, 0x21u16, 0x20u8), (0xA0, 0xA1, 0x28)] {
        outb(command, 0x11);
        outb(data, base);
        outb(data, if command == 0x20 { 4 } else { 2 });
        outb(data, 1);
        for mask in [0xAAu8, 0x55, 0xFF] {
            outb(data, mask);
            t.eq("mask", inb(data), mask);
        }
        outb(command, 0x0B); // OCW3: read the in-service register
        t.eq("nothing in service", inb(command), 0);
    }
}

/// An edge ends HLT, each time.
fn halted_by_edge(t: &mut T) {
    prepare();
    io::set_entry(INPUT, ours() | 0x50);
    for _ in 0..3 {
        io::line(INPUT, true);
        t.same("rise", take_halted(), 0x50);
        t.is("not level", !bit(reg::TMR, 0x50));
        end_of_interrupt();
        io::line(INPUT, false);
    }
    prepare();
}

/// So does a level, once more after each EOI while it is high, and remote IRR falls with the EOI of a low one.
fn halted_by_level(t: &mut T) {
    prepare();
    io::set_entry(INPUT, ours() | io::LEVEL | 0x51);
    io::line(INPUT, true);
    for round in 0..3 {
        t.same("high", take_halted(), 0x51);
        t.is("level", bit(reg::TMR, 0x51));
        t.is("remote IRR", io::entry(INPUT) & io::REMOTE_IRR != 0);
        io::line(INPUT, round < 2);
        end_of_interrupt();
    }
    t.is("ended", io::entry(INPUT) & io::REMOTE_IRR == 0);
    // Another vector, another input, both at once: the higher first.
    io::set_entry(INPUT, ours() | io::LEVEL | 0x61);
    io::set_entry(OTHER, ours() | io::LEVEL | 0x71);
    io::line(INPUT, true);
    io::line(OTHER, true);
    for (input, vector) in [(OTHER, 0x71), (INPUT, 0x61)] {
        t.same("in order", take_halted(), vector);
        io::line(input, false);
        end_of_interrupt();
    }
    prepare();
}

/// The PIC's interrupts come through LINT0 where that is ExtINT, and are ended at the PIC.
fn halted_by_pic(t: &mut T) {
    const IRQ: u32 = 5;
    prepare();
    io::line(IRQ, false);
    for (port, value) in [(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 1), (0x21, !(1 << IRQ))] {
        outb(port, value);
    }
    apic::write(reg::LVT_LINT0, 0x700);
    for _ in 0..3 {
        io::line(IRQ, true);
        t.same("rise", take_halted(), u64::from(0x30 + IRQ));
        t.is("not in the local APIC", !bit(reg::ISR, 0x30 + IRQ));
        outb(0x20, 0x20); // OCW2: end of interrupt
        io::line(IRQ, false);
    }
    outb(0x21, 0xFF);
    prepare();
}
