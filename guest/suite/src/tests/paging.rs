//! 4-level paging: access rights, reserved bits, accessed and dirty flags, page sizes, invalidation (SDM volume 3, chapter 4).

use crate::cpu::*;
use crate::paging::{TEST_VA, Window, frame, pfec, physical, pml4, pte, root};
use crate::run::Exit;
use crate::setup;
use crate::tap::*;
use crate::{code, tests};
use core::arch::asm;

tests![
    rights,
    rights_of_large_pages,
    accessed_and_dirty,
    reserved_bits,
    large_pages,
    page_crossing,
    crossing_instruction,
    cr2_of_crossing,
                        read_modify_write,
    implicit_supervisor,
    protection_keys,
    wrong_privilege_first,
    cr3_bits,
];

const PHYSICAL_LIMIT_BIT: u32 = 51;

/// What an access does.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Access {
    Read,
    Write,
    Fetch,
}

/// Modes that change what an access may do.
#[derive(Clone, Copy, Debug)]
struct Mode {
    user: bool,
    wp: bool,
    smep: bool,
    smap: bool,
    ac: bool,
}

impl Mode {
    /// Every combination this processor has.
    fn all() -> impl Iterator<Item = Mode> {
        let (smep, smap) = (Feature::SMEP.present(), Feature::SMAP.present());
        (0..32u32)
            .map(|n| Mode { user: n & 1 != 0, wp: n & 2 != 0, smep: n & 4 != 0, smap: n & 8 != 0, ac: n & 16 != 0 })
            .filter(move |m| (smep || !m.smep) && (smap || !m.smap))
    }

    fn enter(self) {
        write_cr0(if self.wp { setup::CR0 } else { setup::CR0 & !cr0::WP });
        let cr4 = read_cr4() & !(cr4::SMEP | cr4::SMAP);
        write_cr4(cr4 | if self.smep { cr4::SMEP } else { 0 } | if self.smap { cr4::SMAP } else { 0 });
    }
}

/// Back to the modes tests run in.
fn leave_mode() {
    write_cr4(read_cr4() & !(cr4::SMEP | cr4::SMAP));
    write_cr0(setup::CR0);
}

/// SDM 4.6.1 and 4.7, as a function: `None` if allowed, or the error code.
fn expected(entry: u64, access: Access, m: Mode) -> Option<u64> {
    let present = entry & pte::P != 0;
    let user_page = entry & pte::U != 0;
    let writable = entry & pte::W != 0;
    let allowed = present
        && match access {
            Access::Fetch if entry & pte::NX != 0 => false,
            Access::Fetch if m.user => user_page,
            Access::Fetch => !(m.smep && user_page),
            _ if m.user => user_page && (access == Access::Read || writable),
            _ if m.smap && user_page && !m.ac => false,
            Access::Read => true,
            Access::Write => writable || !m.wp,
        };
    let bit = |set, bit| if set { bit } else { 0 };
    (!allowed).then(|| {
        bit(present, pfec::P)
            | bit(access == Access::Write, pfec::W)
            | bit(m.user, pfec::U)
            // NXE is set throughout, so fetches are told apart from reads.
            | bit(access == Access::Fetch, pfec::I)
    })
}

/// Makes an access at `address`. The page must begin with [`fill_with_code`]'s instruction.
fn access(address: u64, access: Access, m: Mode) -> Exit {
    let code = match access {
        Access::Read => code!("mov al, [rbx + 16]"),
        Access::Write => code!("mov [rbx + 16], al"),
        Access::Fetch => code!("jmp rbx"),
    };
    let regs = if m.user { code.user() } else { code.kernel() };
    regs.with(|r| {
        r.rbx = address;
        r.rflags |= if m.ac { flag::AC } else { 0 };
        if access == Access::Fetch {
            r.rip = address;
        }
    })
    .run()
}

/// Puts `int 0xF0` at the start of a frame, so that running it ends a snippet.
fn fill_with_code(n: usize) {
    frame(n)[..2].copy_from_slice(&[0xCD, 0xF0]);
}

/// Checks an access against [`expected`], with CR2.
fn check(t: &mut T, level: usize, entry: u64, kind: Access, m: Mode) {
    let exit = access(TEST_VA, kind, m);
    let want = expected(entry, kind, m).map_or(DONE, pf);
    let what = format_args!("level {level} entry {:x}{:03x} {kind:?} {m:?}", entry >> 63, entry & 0xFFF);
    t.event(what, &exit, want);
    if want != DONE {
        t.eq("CR2", exit.cr2, TEST_VA + if kind == Access::Fetch { 0 } else { 16 });
    }
}

/// Entries with every combination of P, W, U and NX.
fn combinations() -> impl Iterator<Item = u64> {
    (0..16u64).map(|n| n & 7 | n >> 3 << 63)
}

/// P, W, U and NX at each level, times access, privilege, WP, SMEP, SMAP and AC.
fn rights(t: &mut T) {
    let window = Window::new();
    fill_with_code(0);
    for level in 0..4 {
        let original = *window.entry(level, 0);
        for bits in combinations() {
            window.set(level, original & !(pte::ALL | pte::NX) | bits);
            for m in Mode::all() {
                m.enter();
                for kind in [Access::Read, Access::Write, Access::Fetch] {
                    check(t, level, bits, kind, m);
                }
                leave_mode();
            }
        }
        window.set(level, original);
    }
}

/// The same for 2 MiB pages, and 1 GiB pages where the processor has them.
fn rights_of_large_pages(t: &mut T) {
    let window = Window::new();
    fill_with_code(0);
    for (level, size) in [(2usize, 21u32), (1, 30)] {
        if level == 1 && !Feature::PDPE1GB.present() {
            continue;
        }
        // The frame must appear at the same offset within the large page.
        let base = physical(frame(0)) & !((1 << size) - 1);
        let address = TEST_VA & !((1 << size) - 1) | (physical(frame(0)) - base);
        for bits in combinations() {
            window.set(level, base | pte::PS | bits);
            for m in Mode::all().filter(|m| !m.ac) {
                m.enter();
                invlpg(address);
                for kind in [Access::Read, Access::Write, Access::Fetch] {
                    let exit = access(address, kind, m);
                    t.event(
                        format_args!("{size}: {bits:x} {kind:?} {m:?}"),
                        &exit,
                        expected(bits, kind, m).map_or(DONE, pf),
                    );
                }
                leave_mode();
            }
        }
        *window.entry(level, 0) = 0;
    }
}

/// Accessed is set at every level used, dirty by writes in the last entry alone (SDM 4.8).
fn accessed_and_dirty(t: &mut T) {
    let window = Window::new();
    fill_with_code(0);
    let kernel = Mode { user: false, wp: true, smep: false, smap: false, ac: false };
    let user = Mode { user: true, ..kernel };
    for m in [kernel, user] {
        for kind in [Access::Read, Access::Write, Access::Fetch] {
            window.clear_accessed();
            t.done("access", &access(TEST_VA, kind, m));
            for level in 0..4 {
                let dirty = if level == 3 && kind == Access::Write { pte::D } else { 0 };
                let got = *window.entry(level, 0) & (pte::A | pte::D);
                t.eq(format_args!("level {level} {kind:?}"), got, pte::A | dirty);
            }
        }
        // A write after a read that filled the TLB must still set dirty.
        window.clear_accessed();
        t.done("read", &access(TEST_VA, Access::Read, m));
        t.done("write", &access(TEST_VA, Access::Write, m));
        t.eq("dirty after read, write", *window.entry(3, 0) & pte::D, pte::D);
        // A write that is refused sets no dirty flag.
        *window.entry(3, 0) &= !pte::W;
        window.clear_accessed();
        t.event(
            "write refused",
            &access(TEST_VA, Access::Write, m),
            pf(pfec::P | pfec::W | if m.user { pfec::U } else { 0 }),
        );
        t.eq("not dirty", *window.entry(3, 0) & pte::D, 0);
        *window.entry(3, 0) |= pte::W;
        window.flush();
    }
    // Flags already set stay; software's bits 9-11 and 52-58 are ignored.
    window.set(3, physical(frame(0)) | pte::ALL | 0xE00 | 0x7F << 52);
    t.done("ignored bits", &access(TEST_VA, Access::Write, kernel));
    t.eq(
        "ignored bits kept",
        *window.entry(3, 0),
        physical(frame(0)) | pte::ALL | 0xE00 | 0x7F << 52 | pte::A | pte::D,
    );
}

/// Reserved bits set RSVD together with P (SDM 4.7, table 4-15 on for which are reserved).
fn reserved_bits(t: &mut T) {
    let window = Window::new();
    let m = Mode { user: false, wp: true, smep: false, smap: false, ac: false };
    let mut check = |what: &str, level: usize, value: u64| {
        window.set(level, value);
        for (kind, bits) in [(Access::Read, 0), (Access::Write, pfec::W), (Access::Fetch, pfec::I)] {
            t.event(
                format_args!("{what}, level {level}, {kind:?}"),
                &access(TEST_VA, kind, m),
                pf(pfec::P | pfec::RSVD | bits),
            );
            let user = access(TEST_VA, kind, Mode { user: true, ..m });
            t.event(format_args!("{what}, user, {kind:?}"), &user, pf(pfec::P | pfec::RSVD | pfec::U | bits));
        }
    };
    let width = physical_bits();
    for level in 0..4 {
        let original = *window.entry(level, 0);
        if width <= PHYSICAL_LIMIT_BIT {
            check("lowest bit beyond the physical address", level, original | 1 << width);
            check("bit 51", level, original | 1 << PHYSICAL_LIMIT_BIT);
        }
        window.set(level, original);
    }
    let original = *window.entry(0, 0);
    check("PS in a PML4 entry", 0, original | pte::PS);
    window.set(0, original);
    let original = *window.entry(1, 0);
    if Feature::PDPE1GB.present() {
        for bit in [13, 20, 29] {
            check("1 GiB page, address bit", 1, pte::ALL | pte::PS | 1 << bit);
        }
    } else {
        check("PS without 1 GiB pages", 1, original | pte::PS);
    }
    window.set(1, original);
    let original = *window.entry(2, 0);
    for bit in [13, 16, 20] {
        check("2 MiB page, address bit", 2, pte::ALL | pte::PS | 1 << bit);
    }
    window.set(2, original);
    // With EFER.NXE clear, bit 63 is reserved, and the I bit of the error code is never set (SDM 4.7).
    wrmsr(msr::EFER, rdmsr(msr::EFER) & !efer::NXE);
    window.set(3, *window.entry(3, 0) | pte::NX);
    for (kind, bits) in [(Access::Read, 0), (Access::Write, pfec::W), (Access::Fetch, 0)] {
        t.event("NX without NXE", &access(TEST_VA, kind, m), pf(pfec::P | pfec::RSVD | bits));
    }
    // A not-present entry has no reserved bits, and a fetch is then reported as a read.
    window.set(3, !pte::P);
    t.event("not present", &access(TEST_VA, Access::Fetch, m), pf(0));
}

/// Large pages map what they say, PAT bit and all.
fn large_pages(t: &mut T) {
    let window = Window::new();
    frame(0)[100] = 0x5A;
    let target = physical(frame(0)) + 100;
    for (level, size, present) in [(2usize, 21u32, true), (1, 30, Feature::PDPE1GB.present())] {
        if !present {
            continue;
        }
        let mask = (1u64 << size) - 1;
        let address = TEST_VA & !mask | target & mask;
        for extra in [0, 1 << 12, pte::G] {
            window.set(level, target & !mask | pte::ALL | pte::PS | extra);
            invlpg(address);
            let exit = code!("movzx eax, byte ptr [rbx]").user().with(|r| r.rbx = address).run();
            t.done("large page", &exit);
            t.eq("byte", exit.regs.rax, 0x5A);
        }
        // INVLPG of any address inside drops the whole page.
        *window.entry(level, 0) = 0;
        invlpg(address ^ 0x1000);
        let exit = code!("mov al, [rbx]").kernel().with(|r| r.rbx = address).run();
        t.event("after invlpg elsewhere in it", &exit, pf(0));
    }
}

/// Accesses that cross into a page that faults: no part of a write may be seen.
fn page_crossing(t: &mut T) {
    let window = Window::new();
    let end = TEST_VA + 4096;
    // Bytes before the boundary, whether the error code says write. A read-modify-write is one access with write
    // permission: it reports W even where its first step is a read (so do processors of both vendors).
    let cases = [
        ("mov [rbx], rax", code!("mov [rbx], rax"), 4, true),
        ("mov rax, [rbx]", code!("mov rax, [rbx]"), 4, false),
        ("cmp [rbx], rax", code!("cmp [rbx], rax"), 4, false),
        ("add [rbx], rax", code!("add [rbx], rax"), 3, true),
        ("lock xadd", code!("lock xadd [rbx], rax"), 1, true),
        ("xchg", code!("xchg [rbx], rax"), 7, true),
        ("movups store", code!("movups [rbx], xmm0"), 9, true),
        ("push", code!("lea rsp, [rbx + 8]"; "push rax"), 2, true),
        ("pop [rbx]", code!("push rax"; "pop qword ptr [rbx]"), 2, true),
        ("fstp tbyte", code!("fldz"; "fstp tbyte ptr [rbx]"), 5, true),
        ("cmpxchg8b", code!("lock cmpxchg8b [rbx]"), 4, true),
        ("call", code!("lea rsp, [rbx + 8]"; "call 772b"), 4, true),
        ("enter", code!("lea rsp, [rbx + 8]"; "enter 0, 0"), 4, true),
        ("shl", code!("shl qword ptr [rbx], 3"), 4, true),
        ("shld", code!("shld [rbx], rax, 8"), 4, true),
        ("bt, register index", code!("xor eax, eax"; "bt qword ptr [rbx], rax"), 4, false),
        ("bts, register index", code!("xor eax, eax"; "bts qword ptr [rbx], rax"), 4, true),
        ("stosq", code!("mov rdi, rbx"; "stosq"), 4, true),
    ];
    for first in [false, true] {
        for (what, code, before, writes) in cases {
            for n in 0..2 {
                frame(n).fill(0xA5);
                window.set_page(n, physical(frame(n)) | pte::ALL);
            }
            window.set_page(usize::from(!first), 0);
            let exit = code.kernel().with(|r| (r.rbx, r.rax) = (end - before, 0x1122_3344_5566_7788)).run();
            t.fault(
                format_args!("{what}, missing page {}", u8::from(!first)),
                code,
                &exit,
                pf(if writes { pfec::W } else { 0 }),
            );
            t.eq(what, exit.cr2, if first { end - before } else { end });
            let touched = frame(usize::from(first)).iter().any(|&b| b != 0xA5);
            t.is(format_args!("{what}: the page that is there is untouched"), !touched);
        }
    }
}

/// An instruction whose bytes cross into a missing page: RIP is its start, CR2 the missing page.
fn crossing_instruction(t: &mut T) {
    let window = Window::new();
    let bytes = [0x48, 0xB8, 1, 2, 3, 4, 5, 6, 7, 8]; // mov rax, imm64
    for before in 1..10 {
        frame(0)[4096 - before..].copy_from_slice(&bytes[..before]);
        frame(1)[..10 - before].copy_from_slice(&bytes[before..]);
        frame(1)[10 - before..12 - before].copy_from_slice(&[0xCD, 0xF0]);
        let start = TEST_VA + 4096 - before as u64;
        let regs = code!("nop").user().with(|r| r.rip = start);
        window.set_page(1, physical(frame(1)) | pte::ALL);
        let exit = t.runs("both pages", &regs);
        t.eq("immediate", exit.regs.rax, 0x0807_0605_0403_0201);
        for (entry, error) in [(0, 0), (physical(frame(1)) | pte::ALL | pte::NX, pfec::P)] {
            window.set_page(1, entry);
            let exit = regs.run();
            t.stopped_at("second page refuses", &exit, pf(error | pfec::I | pfec::U), start);
            t.eq("CR2", exit.cr2, TEST_VA + 4096);
        }
    }
    // An instruction that ends with the page must not touch the next one.
    frame(0)[4094..].copy_from_slice(&[0xCD, 0xF0]);
    window.set_page(1, 0);
    t.runs("ends at the page's end", &code!("nop").user().with(|r| r.rip = TEST_VA + 4094));
}

/// CR2 holds the lowest faulting address; with both pages missing that is the access's first byte.
fn cr2_of_crossing(t: &mut T) {
    let window = Window::new();
    window.set_page(0, 0);
    window.set_page(1, 0);
    for offset in 4089..4096 {
        let exit = code!("mov rax, [rbx]").kernel().with(|r| r.rbx = TEST_VA + offset).run();
        t.eq("both pages missing", exit.cr2, TEST_VA + offset);
    }
    write_cr2(0x1234_5678_9ABC);
    t.eq("CR2 is writable", read_cr2(), 0x1234_5678_9ABC);
    let exit = code!("mov rax, [rbx]").kernel().with(|r| r.rbx = 1 << 47).run();
    t.event("non-canonical", &exit, gp(0));
    t.eq("only #PF writes CR2", exit.cr2, 0x1234_5678_9ABC);
}

/// Read-modify-write checks for write access at once: the error code says write, and nothing is read-faulted first.
fn read_modify_write(t: &mut T) {
    let window = Window::new();
    let cases = [
        ("add", code!("add [rbx], eax")),
        ("xchg", code!("xchg [rbx], eax")),
        ("cmpxchg, not equal", code!("lock cmpxchg [rbx], ecx")),
        ("shl", code!("shl dword ptr [rbx], 1")),
        ("btr", code!("btr dword ptr [rbx], 1")),
        ("movsb", code!("mov rdi, rbx", "mov rsi, rsp"; "movsb")),
        ("stosb", code!("mov rdi, rbx"; "stosb")),
        ("not", code!("not byte ptr [rbx]")),
    ];
    window.set(3, physical(frame(0)) | pte::P | pte::U);
    for (what, code) in cases {
        let exit = code.user().with(|r| (r.rbx, r.rax) = (TEST_VA, 0x1234)).run();
        t.fault(what, code, &exit, pf(pfec::P | pfec::W | pfec::U));
    }
    window.set(3, 0);
    for (what, code) in cases {
        let exit = code.user().with(|r| r.rbx = TEST_VA).run();
        t.fault(what, code, &exit, pf(pfec::W | pfec::U));
    }
    // REP with a count of zero accesses nothing.
    let none = code!("mov rdi, rbx", "mov rsi, rbx"; "rep movsb");
    t.done("rep movsb, count 0", &none.user().with(|r| r.rbx = TEST_VA).run());
    // BT with a register index reaches beyond the operand (SDM volume 2, BT).
    window.set_page(0, physical(frame(0)) | pte::ALL);
    window.set_page(1, 0);
    let bt = code!("bts dword ptr [rbx], eax");
    let exit = bt.kernel().with(|r| (r.rbx, r.rax) = (TEST_VA, 4096 * 8)).run();
    t.fault("bts beyond the page", bt, &exit, pf(pfec::W));
    t.eq("its address", exit.cr2, TEST_VA + 4096);
}

/// Descriptor-table and TSS reads are supervisor accesses whatever the CPL (SDM 4.6.1).
fn implicit_supervisor(t: &mut T) {
    // The GDT is on supervisor pages: loading a segment register from level 3 must work.
    t.runs("mov ds, user", &code!("mov ds, eax").user().with(|r| r.rax = crate::tables::USER_DATA.into()));
    // The page of a descriptor missing: an access without the U bit, though made by user code.
    let window = Window::new();
    window.set(3, 0);
    let base = crate::tables::gdt().as_ptr() as u64;
    let code = code!("mov ds, eax");
    // An LDT whose table is at a missing address.
    crate::tables::set_wide_descriptor(crate::tables::scratch(0), crate::tables::system(TEST_VA, 0xFFF, 0x82));
    // SAFETY: the suite itself uses no LDT.
    unsafe { asm!("lldt {:x}", in(reg) crate::tables::scratch(0)) };
    let exit = code.user().with(|r| r.rax = 0x0F).run();
    t.fault("LDT missing", code, &exit, pf(0));
    t.eq("CR2", exit.cr2, TEST_VA + 8);
    t.is("GDT below the window", base < TEST_VA);
    // SMAP applies to implicit accesses even with AC set (SDM 4.6.1).
    if Feature::SMAP.present() {
        window.set(3, physical(frame(0)) | pte::ALL);
        frame(0)[8..16].copy_from_slice(&0x00CF_F300_0000_FFFFu64.to_le_bytes());
        write_cr4(read_cr4() | cr4::SMAP);
        let exit = code.kernel().with(|r| (r.rax, r.rflags) = (0x0F, r.rflags | flag::AC)).run();
        write_cr4(read_cr4() & !cr4::SMAP);
        t.fault("LDT on a user page with SMAP and AC", code, &exit, pf(pfec::P));
    }
}

/// Protection keys: user pages only, PK bit in the error code, WD honours CR0.WP for supervisors (SDM 4.6.2).
fn protection_keys(t: &mut T) {
    let wrpkru = code!("wrpkru");
    if !Feature::PKU.present() {
        t.faults("wrpkru without the feature", wrpkru, UD);
        return;
    }
    t.faults("wrpkru without CR4.PKE", wrpkru, UD);
    let window = Window::new();
    fill_with_code(0);
    write_cr4(read_cr4() | cr4::PKE);
    let m = Mode { user: true, wp: true, smep: false, smap: false, ac: false };
    for key in [1u64, 15] {
        window.set(3, physical(frame(0)) | pte::ALL | key << 59);
        for (name, rights, user_page) in
            [("none", 0, true), ("AD", 1, true), ("WD", 2, true), ("AD on a supervisor page", 1, false)]
        {
            window.set(3, *window.entry(3, 0) & !pte::U | if user_page { pte::U } else { 0 });
            t.done(name, &wrpkru.kernel().with(|r| r.rax = rights << (2 * key)).run());
            for m in [m, Mode { user: false, ..m }, Mode { user: false, wp: false, ..m }] {
                if m.user && !user_page {
                    continue;
                }
                for kind in [Access::Read, Access::Write, Access::Fetch] {
                    m.enter();
                    let exit = access(TEST_VA, kind, m);
                    leave_mode();
                    let write = kind == Access::Write;
                    let denied = user_page
                        && kind != Access::Fetch
                        && (rights & 1 != 0 || rights & 2 != 0 && write && (m.user || m.wp));
                    let bits = pfec::P | pfec::PK | if write { pfec::W } else { 0 } | if m.user { pfec::U } else { 0 };
                    t.event(
                        format_args!("key {key} {name} {kind:?} {m:?}"),
                        &exit,
                        if denied { pf(bits) } else { DONE },
                    );
                }
            }
        }
    }
    t.event("wrpkru, ecx != 0", &wrpkru.kernel().with(|r| r.rcx = 1).run(), gp(0));
    t.event("wrpkru, edx != 0", &wrpkru.kernel().with(|r| r.rdx = 1).run(), gp(0));
    t.done("wrpkru 0", &wrpkru.kernel().run());
    write_cr4(read_cr4() & !cr4::PKE);
}

/// Reserved bits of CR3 (SDM 2.5, 4.5).
fn cr3_bits(t: &mut T) {
    if is_tcg() {
        return t.skip("QEMU's translator takes any CR3 and is lost");
    }
    let code = code!("mov cr3, rax");
    let root = root();
    let width = physical_bits();
    let mut check = |what, value, want| t.event(what, &code.kernel().with(|r| r.rax = value).run(), want);
    if width < 52 {
        check("bit of MAXPHYADDR", root | 1 << width, gp(0));
    }
    check("bit 63 without PCIDE", root | 1 << 63, gp(0));
    check("bit 62", root | 1 << 62, gp(0));
    check("PWT and PCD", root | 0x18, DONE);
    check("ignored bits 0-2, 5-11", root | 0xFE7, DONE);
    write_cr3(root);
}

/// A page both reserved-bit wrong and not permitted reports both; not present reports neither (SDM figure 4-12).
fn wrong_privilege_first(t: &mut T) {
    let window = Window::new();
    let m = Mode { user: true, wp: true, smep: false, smap: false, ac: false };
    let original = *window.entry(1, 0);
    // A missing upper level wins over anything below.
    *window.entry(3, 0) = 1 << 51 | pte::P;
    window.set(1, 0);
    t.event("upper level missing", &access(TEST_VA, Access::Write, m), pf(pfec::W | pfec::U));
    window.set(1, original);
    // The tables of entries used must themselves be read: writes to read-only pages report P.
    window.set(0, pml4()[1] & !pte::W);
    window.set(3, physical(frame(0)) | pte::ALL);
    t.event("read-only by the PML4 entry", &access(TEST_VA, Access::Write, m), pf(pfec::P | pfec::W | pfec::U));
    t.done("and readable", &access(TEST_VA, Access::Read, m));
}
