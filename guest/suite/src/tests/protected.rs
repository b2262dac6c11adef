//! 32-bit protected mode without IA-32e: exceptions, 2-level and PAE paging, tasks, virtual-8086 mode
//! (SDM volume 3, chapters 4, 6, 8 and 20).

use crate::cpu::{vector as v, *};
use crate::legacy::{
    CODE_SEGMENT, DATA_SEGMENT, Legacy, TSS, TSS_SELECTOR, gate32, idt32, low, prepare, stub, tss_descriptor, write_tss,
};
use crate::paging::{Table, physical, pte};
use crate::run::Code;
use crate::tables::{KERNEL_CODE32, KERNEL_DATA, PRESENT, USER_CODE32, USER_DATA, gdt, scratch, segment, set_descriptor};
use crate::tap::*;
use crate::{code, tests};
use core::ptr::addr_of_mut;

tests![
    exceptions, gates, inner_stack, segment_checks, paging_rights, paging_4m, paging_accessed_dirty, pae_paging, pae_pdptes,
    no_wp_and_nx, task_jump, task_call_and_return, task_gate, task_faults, task_busy, task_switched_flag, task_trap_bit,
    far_call_gate, virtual_8086, virtual_8086_iopl, control_registers,
];

/// Checks vector, error code and EIP.
fn ends(t: &mut T, what: &str, exit: &Legacy, want: Event, eip: u64) {
    let error = if exit.error == u32::MAX { crate::run::NO_ERROR } else { exit.error.into() };
    let got = Event(exit.vector.into(), error);
    let at = u64::from(exit.eip);
    t.check(got == want && at == eip, || crate::println!("#   {what}: got {got} at {at:#x}, want {want} at {eip:#x}"));
}

/// Checks that a snippet ran to its end.
fn done(t: &mut T, what: &str, exit: &Legacy) {
    t.check(u64::from(exit.vector) == v::DONE, || {
        let (vector, error, at) = (exit.vector, exit.error, exit.eip);
        crate::println!("#   {what}: got vector {vector:#x} error {error:#x} at {at:#x}, want completion");
    });
}

/// Vector, error code and saved EIP of 32-bit exceptions.
fn exceptions(t: &mut T) {
    prepare();
    for (what, code, want) in [
        ("ud2", code!(32: "nop"; "ud2"), UD),
        ("div", code!(32: "xor ecx, ecx"; "div ecx"), plain(v::DE)),
        ("null ds", code!(32: "xor eax, eax", "mov ds, ax"; "mov al, [0]"), gp(0)),
        ("mov ds, beyond the GDT", code!(32: "mov eax, 0x1000"; "mov ds, ax"), gp(0x1000)),
        ("mov ss, null", code!(32: "xor eax, eax"; "mov ss, ax"), gp(0)),
        ("16 bytes", code!(32: ""; ".fill 15, 1, 0x66", "nop"), gp(0)),
    ] {
        ends(t, what, &code.protected().run(), want, code.mark);
    }
    let user = code!(32: "nop"; "cli");
    ends(t, "cli, user", &user.protected_user().run(), gp(0), user.mark);
    let bound = code!(32: "push 10", "push 5", "mov eax, 4"; ".byte 0x62, 0x04, 0x24");
    ends(t, "bound", &bound.protected().run(), plain(v::BR), bound.mark);
    let into = code!(32: "mov al, 0x7F", "inc al"; "into"; "nop");
    ends(t, "into", &into.protected().run(), plain(v::OF), into.next);
}

/// DPL and presence of gates; the error code is vector * 8 + 2.
fn gates(t: &mut T) {
    prepare();
    let code = code!(32: ""; "int 0x40"; "nop");
    for (what, gate, user, want, eip) in [
        ("DPL 3", gate32(stub(0x40), KERNEL_CODE32, 0xEE), true, plain(0x40), code.next),
        ("DPL 0, user", gate32(stub(0x40), KERNEL_CODE32, 0x8E), true, gp(0x202), code.mark),
        ("DPL 0, kernel", gate32(stub(0x40), KERNEL_CODE32, 0x8E), false, plain(0x40), code.next),
        ("not present", gate32(stub(0x40), KERNEL_CODE32, 0x6E), true, Event(v::NP, 0x202), code.mark),
        ("null selector", gate32(stub(0x40), 0, 0xEE), true, gp(0), code.mark),
        ("data selector", gate32(stub(0x40), KERNEL_DATA, 0xEE), true, gp(KERNEL_DATA.into()), code.mark),
        ("call gate type", gate32(stub(0x40), KERNEL_CODE32, 0xEC), true, gp(0x202), code.mark),
    ] {
        idt32()[0x40] = gate;
        let state = if user { code.protected_user() } else { code.protected() };
        ends(t, what, &state.run(), want, eip);
    }
}

/// A change to level 0 takes SS0:ESP0 (SDM volume 2, INT n).
fn inner_stack(t: &mut T) {
    prepare();
    let code = code!(32: ""; "int 0x40"; "nop");
    // The handler is a snippet that keeps ESP; its own closing INT stays at level 0.
    let handler = code!(32: "mov eax, esp", "mov ebx, [esp + 12]", "mov ecx, [esp + 16]");
    idt32()[0x40] = gate32(handler.start as u32, KERNEL_CODE32, 0xEE);
    let state = code.protected_user();
    let exit = state.run();
    done(t, "int n", &exit);
    t.eq("ESP0 less five doublewords", exit.eax, 0x6F00 - 20);
    t.same("ESP and SS pushed", (exit.ebx, exit.ecx), (state.esp, USER_DATA.into()));
}

/// Loads of SS and far transfers.
fn segment_checks(t: &mut T) {
    prepare();
    let absent = set_descriptor(scratch(0), segment(0, 0xF_FFFF, 0x13, 0xC));
    let code = code!(32: ""; "mov ss, ax");
    for (what, selector, want) in [
        ("not present", absent, Event(v::SS, absent.into())),
        ("RPL", KERNEL_DATA | 3, gp(KERNEL_DATA.into())),
        ("code", KERNEL_CODE32, gp(KERNEL_CODE32.into())),
    ] {
        ends(t, what, &code.protected().with(|r| r.eax = selector.into()).run(), want, code.mark);
    }
    let limit = set_descriptor(scratch(1), segment(0, 0xFFF, 0x93, 0x4));
    for (what, code, want) in [
        ("beyond the limit", code!(32: "mov es, ax"; "mov bl, es:[0x1000]"), gp(0)),
        ("across the limit", code!(32: "mov es, ax"; "mov ebx, es:[0xFFD]"), gp(0)),
        ("lds, wraps", code!(32: "mov es, ax"; "mov ebx, es:[0xFFFFFFFE]"), gp(0)),
    ] {
        ends(t, what, &code.protected().with(|r| r.eax = limit.into()).run(), want, code.mark);
    }
    let retf = code!(32: "push 0x10", "push 0"; ".byte 0xCB");
    ends(t, "retf to data", &retf.protected().run(), gp(0x10), retf.mark);
    let call = code!(32: ".byte 0x9A", ".long 0", ".short 0");
    ends(t, "call far null", &call.protected().run(), gp(0), call.start);
}

/// A page directory and a table of two-level paging; and PAE's.
struct Tables32 {
    directory: Table,
    table: Table,
    pointers: Table,
    directories: [Table; 4],
    pae_table: Table,
}

const EMPTY: Table = Table([0; 512]);
static mut TABLES: Tables32 =
    Tables32 { directory: EMPTY, table: EMPTY, pointers: EMPTY, directories: [EMPTY; 4], pae_table: EMPTY };

fn tables() -> &'static mut Tables32 {
    // SAFETY: one processor uses them, and no caller holds two of these.
    unsafe { &mut *addr_of_mut!(TABLES) }
}

/// Where the page under test is, and its physical frame.
const PAGE: u32 = 0x4000_0000;
const USER_CODE_AT: u32 = 0x8000_0000;

fn directory_entry(index: usize) -> &'static mut u32 {
    // SAFETY: the index is that of an entry in the page.
    unsafe { &mut *tables().directory.0.as_mut_ptr().cast::<u32>().add(index) }
}

fn table_entry(index: usize) -> &'static mut u32 {
    // SAFETY: as above.
    unsafe { &mut *tables().table.0.as_mut_ptr().cast::<u32>().add(index) }
}

fn test_frame() -> u32 {
    physical(crate::paging::frame(0)) as u32
}

/// One to one for the supervisor with 4 MiB pages, the first GiB again for users, and a page of 4 KiB at [`PAGE`].
fn two_level() {
    tables().directory.0.fill(0);
    tables().table.0.fill(0);
    for i in 0..256 {
        *directory_entry(i) = (i as u32) << 22 | 0xE3;
        *directory_entry(512 + i) = (i as u32) << 22 | 0xE7;
    }
    *directory_entry(PAGE as usize >> 22) = physical(&raw const tables().table) as u32 | 7;
    *table_entry(0) = test_frame() | 7;
    crate::paging::frame(0)[..2].copy_from_slice(&[0xCD, 0xF0]);
}

impl Legacy {
    /// With 32-bit paging on.
    fn paged(self) -> Legacy {
        self.with(|r| {
            r.cr0 |= (cr0::PG | cr0::WP) as u32;
            r.cr3 = physical(&raw const tables().directory) as u32;
            r.cr4 |= cr4::PSE as u32;
        })
    }

    /// At the users' addresses.
    fn aliased(self) -> Legacy {
        self.with(|r| {
            r.eip += USER_CODE_AT;
            r.esp += USER_CODE_AT;
        })
    }
}

/// Every combination of P, W and U at both levels, by access, level and WP.
fn paging_rights(t: &mut T) {
    prepare();
    two_level();
    let read = code!(32: "mov al, [ebx]");
    let write = code!(32: "mov [ebx], al");
    for bits in 0..64u32 {
        let (upper, lower) = (bits & 7, bits >> 3);
        *directory_entry(PAGE as usize >> 22) = physical(&raw const tables().table) as u32 | upper;
        *table_entry(0) = test_frame() | lower;
        for (code, writes) in [(read, false), (write, true)] {
            for (user, wp) in [(true, true), (false, true), (false, false)] {
                let state = if user { code.protected_user().aliased() } else { code.protected() };
                let exit = state.paged().with(|r| {
                    r.ebx = PAGE + 16;
                    r.cr0 &= if wp { u32::MAX } else { !(cr0::WP as u32) };
                }).run();
                let both = upper & lower;
                let present = both & 1 != 0;
                let allowed = present && (!user || both & 4 != 0) && (!writes || both & 2 != 0 || !user && !wp);
                let error = u64::from(present) | u64::from(writes) << 1 | u64::from(user) << 2;
                let eip = if user { code.mark + u64::from(USER_CODE_AT) } else { code.mark };
                if allowed {
                    done(t, "allowed", &exit);
                } else {
                    ends(t, "refused", &exit, pf(error), eip);
                    t.eq("CR2", exit.cr2, PAGE + 16);
                }
            }
        }
    }
}

/// 4 MiB pages need CR4.PSE; PSE-36 bits beyond the address width are reserved (SDM 4.3).
fn paging_4m(t: &mut T) {
    prepare();
    two_level();
    let base = test_frame() & 0xFFC0_0000;
    let at = PAGE | test_frame() & 0x3F_FFFF;
    crate::paging::frame(0)[16] = 0x5A;
    *directory_entry(PAGE as usize >> 22) = base | 0x87;
    let read = code!(32: "mov al, [ebx]");
    let exit = read.protected().paged().with(|r| r.ebx = at + 16).run();
    done(t, "4 MiB page", &exit);
    t.eq("byte", exit.eax & 0xFF, 0x5A);
    *directory_entry(PAGE as usize >> 22) = base | 0x87 | 1 << 21;
    ends(t, "bit 21 is reserved", &read.protected().paged().with(|r| r.ebx = at).run(), pf(9), read.mark);
    if physical_bits() < 40 {
        *directory_entry(PAGE as usize >> 22) = base | 0x87 | 1 << 20;
        ends(t, "address bit 39", &read.protected().paged().with(|r| r.ebx = at).run(), pf(9), read.mark);
    }
    // PAT of a 4 MiB page is bit 12.
    *directory_entry(PAGE as usize >> 22) = base | 0x87 | 1 << 12;
    done(t, "PAT", &read.protected().paged().with(|r| r.ebx = at).run());
}

/// Accessed and dirty flags of both levels.
fn paging_accessed_dirty(t: &mut T) {
    prepare();
    for (code, dirty) in [(code!(32: "mov al, [ebx]"), 0u32), (code!(32: "mov [ebx], al"), 0x40)] {
        two_level();
        done(t, "access", &code.protected().paged().with(|r| r.ebx = PAGE + 16).run());
        t.eq("table entry", *table_entry(0) & 0x60, 0x20 | dirty);
        t.eq("directory entry", *directory_entry(PAGE as usize >> 22) & 0x60, 0x20);
    }
}

/// PAE: the same map as `two_level` with 2 MiB pages.
fn pae() {
    let t = tables();
    t.pointers.0.fill(0);
    t.pae_table.0.fill(0);
    for (i, directory) in t.directories.iter_mut().enumerate() {
        for (j, entry) in directory.0.iter_mut().enumerate() {
            let address = (j as u64) << 21;
            *entry = match i {
                0 => address | 0xE3,
                2 => address | 0xE7,
                _ => 0,
            };
        }
        t.pointers.0[i] = physical(&raw const *directory) | 1;
    }
    t.directories[1].0[0] = physical(&raw const t.pae_table) | 7;
    t.pae_table.0[0] = u64::from(test_frame()) | 7;
    crate::paging::frame(0)[..2].copy_from_slice(&[0xCD, 0xF0]);
}

impl Legacy {
    /// With PAE paging on.
    fn pae_paged(self) -> Legacy {
        self.with(|r| {
            r.cr0 |= (cr0::PG | cr0::WP) as u32;
            r.cr3 = physical(&raw const tables().pointers) as u32;
            r.cr4 |= cr4::PAE as u32;
        })
    }
}

/// Rights, NX and reserved bits under PAE (SDM 4.4).
fn pae_paging(t: &mut T) {
    prepare();
    pae();
    let read = code!(32: "mov al, [ebx]");
    let state = read.protected().pae_paged().with(|r| r.ebx = PAGE + 16);
    done(t, "mapped", &state.run());
    t.eq("accessed", tables().pae_table.0[0] & 0x60, 0x20);
    let frame = u64::from(test_frame());
    for (what, entry, want) in [
        ("not present", 0, pf(0)),
        ("address too wide", frame | 7 | 1 << 51, pf(9)),
        ("bit 62", frame | 7 | 1 << 62, pf(9)),
        ("bit 52", frame | 7 | 1 << 52, pf(9)),
    ] {
        tables().pae_table.0[0] = entry;
        ends(t, what, &state.run(), want, read.mark);
    }
    // EFER.NXE is on: fetches from such a page fault with I.
    let fetch = read.protected_user().aliased().pae_paged().with(|r| r.eip = PAGE);
    tables().pae_table.0[0] = frame | 7;
    done(t, "fetch", &fetch.run());
    tables().pae_table.0[0] = frame | 7 | pte::NX;
    ends(t, "fetch from an NX page", &fetch.run(), pf(0x15), PAGE.into());
    // A 2 MiB page's reserved bits.
    tables().directories[1].0[0] = 1 << 13 | 0x87;
    ends(t, "2 MiB page, bit 13", &state.run(), pf(9), read.mark);
}

/// The four PDPTEs are read when CR3 is written: reserved bits are #GP(0) then, changes unseen until then (SDM 4.4.1).
fn pae_pdptes(t: &mut T) {
    prepare();
    pae();
    let reload = code!(32: "mov eax, cr3"; "mov cr3, eax");
    let state = reload.protected().pae_paged();
    done(t, "good", &state.run());
    // The snippet spoils the entry itself, so that entering with paging still works.
    let spoil = code!(32: "or dword ptr [ebx + 24], ecx", "mov eax, cr3"; "mov cr3, eax");
    let pointers = physical(&raw const tables().pointers) as u32;
    for bit in [1u32, 2, 5, 6, 7, 8] {
        pae();
        let exit = spoil.protected().pae_paged().with(|r| (r.ebx, r.ecx) = (pointers, 1 << bit)).run();
        ends(t, "reserved bit of a PDPTE", &exit, gp(0), spoil.mark);
    }
    pae();
    let unseen = code!(32: "mov dword ptr [ebx + 8], 0", "mov al, [edx]", "mov eax, cr3", "mov cr3, eax"; "mov al, [edx]");
    let exit = unseen.protected().pae_paged().with(|r| (r.ebx, r.edx) = (pointers, PAGE + 16)).run();
    ends(t, "seen after the write of CR3", &exit, pf(0), unseen.mark);
}

/// Without PAE there is no NX and no I bit in the error code.
fn no_wp_and_nx(t: &mut T) {
    prepare();
    two_level();
    let fetch = code!(32: "nop").protected_user().aliased().paged().with(|r| r.eip = PAGE);
    done(t, "fetch", &fetch.run());
    *table_entry(0) = 0;
    ends(t, "fetch from a missing page", &fetch.run(), pf(4), PAGE.into());
    *table_entry(0) = test_frame() | 3;
    ends(t, "fetch from a supervisor page", &fetch.run(), pf(5), PAGE.into());
}

/// A second task's TSS, its selector, and a stack for it.
const OTHER_TSS: u32 = 0x5800;
const OTHER: u16 = scratch(4);
const OTHER_STACK: u32 = 0x5F00;
/// A third, for handlers that need a task of their own.
const HANDLER_TSS: u32 = 0x5A00;
const HANDLER: u16 = scratch(5);
const HANDLER_STACK: u32 = 0x5E00;

/// Builds a task that begins at `code`.
fn build_task(selector: u16, tss: u32, stack: u32, code: Code) {
    low(tss, 0x80).fill(0);
    for (offset, value) in [
        (0x20u32, code.start as u32),
        (0x24, 2),
        (0x38, stack),
        (0x34, 0xBBBB_BBBB),
        (0x48, KERNEL_DATA.into()),
        (0x4C, KERNEL_CODE32.into()),
        (0x50, KERNEL_DATA.into()),
        (0x54, KERNEL_DATA.into()),
        (0x64, 0x68 << 16),
    ] {
        low(tss + offset, 4).copy_from_slice(&value.to_le_bytes());
    }
    set_descriptor(selector, tss_descriptor(tss));
}

fn other_task(code: Code) {
    build_task(OTHER, OTHER_TSS, OTHER_STACK, code);
}

/// A task gate callable by users.
fn task_gate_to(selector: u16) -> u64 {
    u64::from(selector) << 16 | 0xE5 << 40
}

fn field(tss: u32, offset: u32) -> u32 {
    u32::from_le_bytes(low(tss + offset, 4).try_into().unwrap())
}

/// Whether a TSS descriptor is busy.
fn busy(selector: u16) -> bool {
    gdt()[selector as usize / 8] >> 41 & 1 != 0
}

/// JMP to a TSS: the old task's registers saved, the new one's loaded, busy moved, NT and the link left alone (SDM 8.3).
fn task_jump(t: &mut T) {
    prepare();
    let task = code!(32: "str edx", "pushfd", "pop ecx");
    other_task(task);
    let code = code!(32: "mov eax, 0x11111111"; ".byte 0xEA", ".long 0", ".short 0x80"; "nop");
    t.eq("selector in the instruction", OTHER, 0x80);
    let exit = code.protected().with(|r| r.esi = 0x5151_5151).run();
    done(t, "jump", &exit);
    t.eq("EBX from the TSS", exit.ebx, 0xBBBB_BBBB);
    t.eq("EDX is TR", exit.edx & 0xFFFF, OTHER.into());
    t.eq("NT", exit.ecx >> 14 & 1, 0);
    t.eq("saved EIP", u64::from(field(TSS, 0x20)), code.next);
    t.same("saved EAX and ESI", (field(TSS, 0x28), field(TSS, 0x40)), (0x1111_1111, 0x5151_5151));
    t.same("busy", (busy(TSS_SELECTOR), busy(OTHER)), (false, true));
    t.eq("no link", field(OTHER_TSS, 0) & 0xFFFF, 0);
}

/// CALL nests: link, NT, both busy; IRET goes back and clears them.
fn task_call_and_return(t: &mut T) {
    prepare();
    let task = code!(32: "2: pushfd", "pop ebx", "mov ecx, [0x5800]", "mov [0x6000], ebx", "mov [0x6004], ecx", "iretd", "jmp 2b");
    other_task(task);
    let code = code!(32: "mov eax, 0x22222222"; ".byte 0x9A", ".long 0", ".short 0x80"; "str edx", "pushfd", "pop ecx");
    let exit = code.protected().run();
    done(t, "call and return", &exit);
    t.eq("NT in the nested task", field(0x6000, 0) >> 14 & 1, 1);
    t.eq("link", field(0x6000, 4) & 0xFFFF, TSS_SELECTOR.into());
    t.eq("EAX restored", exit.eax, 0x2222_2222);
    t.eq("TR", exit.edx & 0xFFFF, TSS_SELECTOR.into());
    t.eq("NT cleared", exit.ecx >> 14 & 1, 0);
    t.same("busy", (busy(TSS_SELECTOR), busy(OTHER)), (true, false));
}

/// An interrupt through a task gate nests; an error code goes to the new task's stack (SDM 6.12.2).
fn task_gate(t: &mut T) {
    prepare();
    let task = code!(32: "mov eax, [esp]", "mov ebx, esp");
    other_task(task);
    let gate = task_gate_to(OTHER);
    idt32()[0x40] = gate;
    let code = code!(32: ""; "int 0x40"; "nop");
    let exit = code.protected_user().run();
    done(t, "int n", &exit);
    t.eq("no error code", exit.ebx, OTHER_STACK);
    t.eq("saved EIP", u64::from(field(TSS, 0x20)), code.next);
    t.eq("saved CS", field(TSS, 0x4C) & 0xFFFF, USER_CODE32.into());
    other_task(task);
    idt32()[13] = gate;
    let fault = code!(32: "mov eax, 0x1000"; "mov ds, ax");
    let exit = fault.protected().run();
    done(t, "#GP", &exit);
    t.eq("error code on the stack", exit.eax, 0x1000);
    t.eq("one doubleword", exit.ebx, OTHER_STACK - 4);
    t.eq("saved EIP", u64::from(field(TSS, 0x20)), fault.mark);
    t.same("busy", (busy(TSS_SELECTOR), busy(OTHER)), (true, true));
}

/// What is wrong with the new task: before the switch in the old one, after it in the new one (SDM table 8-1).
fn task_faults(t: &mut T) {
    prepare();
    let task = code!(32: "nop");
    let jump = code!(32: ""; ".byte 0xEA", ".long 0", ".short 0x80");
    let selector = u64::from(OTHER);
    for (what, descriptor, want) in [
        ("not present", tss_descriptor(OTHER_TSS) & !PRESENT, Event(v::NP, selector)),
        ("limit", segment(OTHER_TSS, 0x66, 0x89, 0), Event(v::TS, selector)),
        ("busy", tss_descriptor(OTHER_TSS) | 1 << 41, gp(selector)),
    ] {
        other_task(task);
        set_descriptor(OTHER, descriptor);
        ends(t, what, &jump.protected().run(), want, jump.mark);
    }
    let user = jump.protected_user();
    other_task(task);
    ends(t, "DPL 0 from level 3", &user.run(), gp(selector), jump.mark);
    // Found in the new task, whose state may then be of no use: the handler of #TS must be a task (SDM 6.15, interrupt 10).
    idt32()[v::TS as usize] = task_gate_to(HANDLER);
    let handler = code!(32: "pop eax", "mov ebx, esp");
    for (what, offset, value) in [
        ("CS null", 0x4Cu32, 0u32),
        ("CS data", 0x4C, KERNEL_DATA.into()),
        ("DS beyond the GDT", 0x54, 0x1000),
        ("LDT not an LDT", 0x60, KERNEL_DATA.into()),
    ] {
        other_task(task);
        build_task(HANDLER, HANDLER_TSS, HANDLER_STACK, handler);
        low(OTHER_TSS + offset, 4).copy_from_slice(&value.to_le_bytes());
        let exit = jump.protected().run();
        done(t, what, &exit);
        t.eq("error code", exit.eax, value);
        t.eq("one doubleword", exit.ebx, HANDLER_STACK);
        t.eq("link", field(HANDLER_TSS, 0) & 0xFFFF, OTHER.into());
        t.is("the new task is busy", busy(OTHER) && !busy(TSS_SELECTOR));
        t.eq("its EIP", u64::from(field(OTHER_TSS, 0x20)), task.start);
    }
}

/// IRET with NT to a task that is not busy is #TS(selector) (SDM volume 2, IRET).
fn task_busy(t: &mut T) {
    prepare();
    other_task(code!(32: "nop"));
    let code = code!(32: "push 0x4002", "popfd"; "iretd");
    write_tss(0, OTHER.into());
    ends(t, "link to a free task", &code.protected().run(), Event(v::TS, OTHER.into()), code.mark);
    write_tss(0, KERNEL_DATA.into());
    ends(t, "link to data", &code.protected().run(), Event(v::TS, KERNEL_DATA.into()), code.mark);
}

/// Every switch sets CR0.TS.
fn task_switched_flag(t: &mut T) {
    prepare();
    other_task(code!(32: "nop"; "fld1"));
    let jump = code!(32: ""; ".byte 0xEA", ".long 0", ".short 0x80");
    let exit = jump.protected().run();
    t.eq("vector", u64::from(exit.vector), v::NM);
    t.eq("TS", exit.cr0 >> 3 & 1, 1);
}

/// The T bit of a TSS is #DB with DR6.BT before the task's first instruction.
fn task_trap_bit(t: &mut T) {
    prepare();
    let task = code!(32: "nop");
    other_task(task);
    low(OTHER_TSS + 0x64, 1)[0] = 1;
    write_dr6(0xFFFF_0FF0);
    let jump = code!(32: ""; ".byte 0xEA", ".long 0", ".short 0x80");
    ends(t, "T bit", &jump.protected().run(), DB, task.start);
    t.eq("DR6", read_dr6(), 0xFFFF_0FF0 | 1 << 15);
}

/// A 32-bit call gate to level 0 copies parameters (SDM 5.8.5).
fn far_call_gate(t: &mut T) {
    prepare();
    let target = code!(32: "mov eax, esp", "mov ebx, [esp + 8]", "mov ecx, [esp + 12]");
    let gate = gate32(target.start as u32, KERNEL_CODE32, 0xEC) | 2 << 32;
    let selector = u32::from(set_descriptor(scratch(4), gate));
    let code = code!(32: "push 0x11", "push 0x22"; ".byte 0x9A", ".long 0", ".short 0x80"; "nop");
    t.eq("selector in the instruction", selector, 0x80);
    let exit = code.protected_user().run();
    done(t, "call", &exit);
    t.eq("SS, ESP, two parameters, CS, EIP", exit.eax, 0x6F00 - 24);
    t.same("parameters in order", (exit.ebx, exit.ecx), (0x22, 0x11));
}

/// Virtual-8086 mode: real-mode addresses, sensitive instructions #GP(0) with IOPL below 3 (SDM 20.2.7).
fn virtual_8086(t: &mut T) {
    prepare();
    low(u32::from(DATA_SEGMENT) << 4, 1)[0] = 0x77;
    let exit = code!(16: "mov al, [0]", "mov bx, cs", "pushfd", "pop ecx").virtual_8086().with(|r| r.eflags |= 0x3000).run();
    done(t, "runs", &exit);
    t.same("AL, BX", (exit.eax & 0xFF, exit.ebx & 0xFFFF), (0x77, CODE_SEGMENT.into()));
    t.eq("VM is pushed as zero by PUSHFD", exit.ecx >> 17 & 1, 0);
    t.eq("VM in the saved flags", exit.eflags >> 17 & 1, 1);
    t.eq("DS on the stack", exit.ds, DATA_SEGMENT.into());
    for (what, code) in [
        ("cli", code!(16: ""; "cli")),
        ("sti", code!(16: ""; "sti")),
        ("pushf", code!(16: ""; "pushf")),
        ("popf", code!(16: ""; "popf")),
        ("int n", code!(16: ""; "int 0x40")),
        ("iret", code!(16: ""; ".byte 0xCF")),
        ("hlt", code!(16: ""; "hlt")),
        ("mov cr0", code!(16: ""; "mov eax, cr0")),
        ("in", code!(16: ""; "in al, 0x80")),
        ("lgdt", code!(16: ""; "lgdt [0]")),
        ("word at FFFF", code!(16: "mov bx, 0xFFFF"; "mov ax, [bx]")),
    ] {
        let exit = code.virtual_8086().run();
        ends(t, what, &exit, gp(0), code.mark_offset().into());
    }
    for (what, code) in [("sldt", code!(16: ""; "sldt ax")), ("lar", code!(16: ""; "lar ax, ax")), ("arpl", code!(16: ""; ".byte 0x63, 0xC0"))] {
        ends(t, what, &code.virtual_8086().run(), UD, code.mark_offset().into());
    }
    let int3 = code!(16: ""; "int3"; "nop");
    ends(t, "int3 needs no IOPL", &int3.virtual_8086().run(), plain(v::BP), int3.next_offset().into());
}

/// With IOPL 3 they run; IN and OUT go by the I/O map alone (SDM 20.2.8.1).
fn virtual_8086_iopl(t: &mut T) {
    prepare();
    let open = |code: Code| code.virtual_8086().with(|r| r.eflags |= 0x3000).run();
    done(t, "cli, pushf, popf", &open(code!(16: "cli", "pushf", "popf")));
    let int = code!(16: ""; "int 0x40"; "nop");
    ends(t, "int n", &open(int), plain(0x40), int.next_offset().into());
    let input = code!(16: ""; "in al, 0x80");
    ends(t, "in, not permitted", &open(input), gp(0), input.mark_offset().into());
    // A handler segment that is not level 0 is #GP(its selector).
    idt32()[0x40] = gate32(stub(0x40), USER_CODE32 & !3, 0xEE);
    ends(t, "handler at level 3", &open(int), gp((USER_CODE32 & !3).into()), int.mark_offset().into());
}

/// Control registers from 32-bit mode: reserved bits that only this mode can test.
fn control_registers(t: &mut T) {
    prepare();
    let set = code!(32: ""; "mov cr4, eax");
    if !is_tcg() {
        ends(t, "CR4 bit 15", &set.protected().with(|r| r.eax = 1 << 15).run(), gp(0), set.mark);
        if Feature::PCID.present() {
            ends(t, "PCIDE outside of IA-32e", &set.protected().with(|r| r.eax = 1 << 17).run(), gp(0), set.mark);
        }
        // Paging with LME set and PAE clear (SDM 4.1.1).
        let code = code!(32: "mov ecx, 0xC0000080", "rdmsr", "bts eax, 8", "wrmsr", "mov eax, cr0", "bts eax, 31"; "mov cr0, eax");
        ends(t, "PG with LME, without PAE", &code.protected().run(), gp(0), code.mark);
    }
    let exit = code!(32: "mov eax, cr0", "mov ebx, cr4").protected().run();
    done(t, "read", &exit);
    t.eq("PE, NE, ET", exit.eax & 0x8000_0031, 0x31);
}
