//! When a cached translation must be gone: INVLPG, CR3, global pages, PCIDs, INVPCID (SDM volume 3, 4.10).

use crate::cpu::*;
use crate::paging::{TEST_VA, Window, frame, pfec, physical, pte, root};
use crate::run;
use crate::tap::*;
use crate::{code, tests};
use core::arch::asm;

tests![
    stale_until_invlpg, global_pages, pcid, invpcid, invpcid_operands,
];

/// Runs a snippet that loads a byte and returns it.
fn read_byte(regs: &run::Regs) -> u64 {
    regs.run().regs.rax
}

/// A translation seen is dropped by INVLPG, MOV to CR3, and the change of CR4 or CR0 paging bits (SDM 4.10.4.1).
fn stale_until_invlpg(t: &mut T) {
    let window = Window::new();
    let read = code!("movzx eax, byte ptr [rbx]").kernel().with(|r| r.rbx = TEST_VA);
    let ways: [(&str, fn()); 4] = [
        ("invlpg", || invlpg(TEST_VA + 0xABC)),
        ("mov cr3", || write_cr3(read_cr3())),
        ("cr4.pge", || {
            write_cr4(read_cr4() ^ cr4::PGE);
            write_cr4(read_cr4() ^ cr4::PGE);
        }),
        ("cr4.smep", || {
            if Feature::SMEP.present() {
                write_cr4(read_cr4() ^ cr4::SMEP);
                write_cr4(read_cr4() ^ cr4::SMEP);
            } else {
                invlpg(TEST_VA);
            }
        }),
    ];
    frame(0)[0] = 0x11;
    frame(2)[0] = 0x22;
    for (what, way) in ways {
        window.set_page(0, physical(frame(0)) | pte::ALL);
        t.eq(what, read_byte(&read), 0x11);
        *window.entry(3, 0) = physical(frame(2)) | pte::ALL;
        way();
        t.eq(what, read_byte(&read), 0x22);
    }
    // Not-present entries are never cached (SDM 4.10.2.3): mapping a page needs no invalidation.
    window.set_page(0, 0);
    t.event("missing", &read.run(), pf(0));
    *window.entry(3, 0) = physical(frame(0)) | pte::ALL;
    t.done("mapped without invalidation", &read.run());
    // A fault drops the entry that caused it: more rights need no invalidation either (SDM 4.10.4.3).
    window.set_page(0, physical(frame(0)) | pte::P);
    t.eq("read-only", read_byte(&read), 0x11);
    let write = code!("mov [rbx], al").kernel().with(|r| r.rbx = TEST_VA);
    t.event("write refused", &write.run(), pf(pfec::P | pfec::W));
    *window.entry(3, 0) |= pte::W;
    t.done("write after rights were added", &write.run());
}

/// Global translations outlive MOV to CR3, not INVLPG nor a change of CR4.PGE (SDM 4.10.2.4).
fn global_pages(t: &mut T) {
    let window = Window::new();
    let read = code!("movzx eax, byte ptr [rbx]").kernel().with(|r| r.rbx = TEST_VA);
    frame(0)[0] = 0x11;
    frame(2)[0] = 0x22;
    write_cr4(read_cr4() | cr4::PGE);
    let prepare = || {
        window.set_page(0, physical(frame(0)) | pte::ALL | pte::G);
        let seen = read_byte(&read);
        *window.entry(3, 0) = physical(frame(2)) | pte::ALL | pte::G;
        seen
    };
    // That a stale global entry survives is allowed, not required; that these drop it is required.
    t.eq("first", prepare(), 0x11);
    invlpg(TEST_VA);
    t.eq("after invlpg", read_byte(&read), 0x22);
    t.eq("first", prepare(), 0x11);
    write_cr4(read_cr4() & !cr4::PGE);
    t.eq("after PGE was cleared", read_byte(&read), 0x22);
    // Without PGE the G bit means nothing: MOV to CR3 drops it.
    t.eq("first", prepare(), 0x11);
    write_cr3(read_cr3());
    t.eq("after mov cr3 without PGE", read_byte(&read), 0x22);
}

/// A write to CR3 with bit 63 clear drops its PCID's translations, others' stay apart (SDM 4.10.4.1).
fn pcid(t: &mut T) {
    if !Feature::PCID.present() {
        return t.skip("no PCID");
    }
    let window = Window::new();
    let read = code!("movzx eax, byte ptr [rbx]").kernel().with(|r| r.rbx = TEST_VA);
    frame(0)[0] = 0x11;
    frame(2)[0] = 0x22;
    let root = root();
    write_cr3(root);
    write_cr4(read_cr4() | cr4::PCIDE);
    for (what, from, to, seen) in [
        ("same PCID, flushing", 5u64, 5u64, true),
        ("other PCID never used", 5, 6, true),
        ("back with flush", 6, 5, true),
    ] {
        write_cr3(root | from);
        window.set_page(0, physical(frame(0)) | pte::ALL);
        t.eq(what, read_byte(&read), 0x11);
        *window.entry(3, 0) = physical(frame(2)) | pte::ALL;
        write_cr3(root | to);
        t.same(what, read_byte(&read) == 0x22, seen);
        invlpg(TEST_VA);
    }
    // Bit 63 is not stored; with PCIDE clear it is reserved.
    write_cr3(root | 7 | 1 << 63);
    t.eq("bit 63 is not kept", read_cr3(), root | 7);
    // PCIDE cannot be cleared into nonzero PCID trouble: clearing it is always allowed and keeps CR3.
    write_cr3(root);
    write_cr4(read_cr4() & !cr4::PCIDE);
    let set = code!("mov cr4, rax").kernel().with(|r| r.rax = read_cr4() | cr4::PCIDE);
    write_cr3(root | 1 << 3);
    t.event("PCIDE with CR3[11:0] nonzero", &set.run(), gp(0));
    write_cr3(root);
    t.runs("PCIDE with CR3[11:0] zero", &set);
}

/// INVPCID's four types (SDM volume 2).
fn invpcid(t: &mut T) {
    if !Feature::INVPCID.present() {
        return t.skip("no INVPCID");
    }
    let window = Window::new();
    let read = code!("movzx eax, byte ptr [rbx]").kernel().with(|r| r.rbx = TEST_VA);
    frame(0)[0] = 0x11;
    frame(2)[0] = 0x22;
    write_cr4(read_cr4() | cr4::PGE);
    for (kind, address, global, dropped) in
        [(0u64, TEST_VA, 0, true), (1, 0, 0, true), (2, 0, pte::G, true), (3, 0, 0, true), (2, 0, 0, true)]
    {
        window.set_page(0, physical(frame(0)) | pte::ALL | global);
        t.eq("first", read_byte(&read), 0x11);
        *window.entry(3, 0) = physical(frame(2)) | pte::ALL | global;
        let descriptor = [0u64, address];
        // SAFETY: forgetting translations changes no mapping.
        unsafe { asm!("invpcid {}, [{}]", in(reg) kind, in(reg) &descriptor) };
        t.same(format_args!("type {kind}"), read_byte(&read) == 0x22, dropped);
    }
}

/// INVPCID's #GP(0) conditions.
fn invpcid_operands(t: &mut T) {
    let code = code!("push rbx", "push rcx"; "invpcid rax, [rsp]");
    let run = |kind: u64, pcid: u64, address: u64| {
        code.kernel().with(|r| (r.rax, r.rcx, r.rbx) = (kind, pcid, address)).run()
    };
    if !Feature::INVPCID.present() {
        return t.fault("without the feature", code, &run(0, 0, 0), UD);
    }
    for (what, kind, pcid, address, want) in [
        ("type 4", 4u64, 0u64, 0u64, gp(0)),
        ("type 1 << 32", 1 << 32, 0, 0, gp(0)),
        ("descriptor bit 12", 1, 1 << 12, 0, gp(0)),
        ("descriptor bit 63", 2, 1 << 63, 0, gp(0)),
        ("type 0, non-canonical", 0, 0, 1 << 47, gp(0)),
        ("type 0, PCID without PCIDE", 0, 1, 0, gp(0)),
        ("type 1, PCID without PCIDE", 1, 1, 0, gp(0)),
        ("type 2", 2, 0, 1 << 47, DONE),
        ("type 3", 3, 0, 0, DONE),
    ] {
        t.event(what, &run(kind, pcid, address), want);
    }
    t.user_faults("at privilege level 3", code, gp(0));
    t.faults("register operand", code!(".byte 0x66, 0x0F, 0x38, 0x82, 0xC0"), UD);
}
