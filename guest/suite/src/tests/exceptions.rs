//! Exceptions: vector, error code, saved RIP, priority; delivery through the IDT (SDM volume 3, chapter 6).

use crate::cpu::{vector as v, *};
use crate::run::Regs;
use crate::tables::*;
use crate::tap::*;
use crate::{code, paging, run, tests};

tests![
    divide,
    undefined,
    undefined_in_64_bit,
    undefined_operands,
    length_limit,
    lock_prefix,
    breakpoints_and_overflow,
    bound,
    privileged,
    non_canonical_data,
    non_canonical_branch,
    alignment,
    int_n_checks,
    gate_targets,
    external_flag,
    double_fault,
    serial_faults,
    stack_choice,
    gate_flags,
    saved_rf,
    iret_checks,
];

/// An address whose bits 63:47 are not all equal.
const HOLE: u64 = 1 << 47;

/// #DE is a fault (SDM 6.15): too large a quotient as well as a zero divisor.
fn divide(t: &mut T) {
    let cases = [
        ("div cl", code!("div cl"), 0x100, 0, 0),
        ("div cl, quotient 0x100", code!("div cl"), 0x100, 0, 1),
        ("div cx, quotient 0x10000", code!("div cx"), 0, 1, 1),
        ("div ecx", code!("div ecx"), 5, 0, 0),
        ("div ecx, quotient 1 << 32", code!("div ecx"), 0, 7, 7),
        ("div rcx", code!("div rcx"), 0, 7, 7),
        ("idiv cl, quotient 128", code!("idiv cl"), 128, 0, 1),
        ("idiv cx, 0x8000 / -1", code!("idiv cx"), 0x8000, 0xFFFF, 0xFFFF),
        ("idiv ecx, MIN / -1", code!("idiv ecx"), 0x8000_0000, 0xFFFF_FFFF, 0xFFFF_FFFF),
        ("idiv rcx, MIN / -1", code!("idiv rcx"), 1 << 63, u64::MAX, u64::MAX),
    ];
    for (what, code, rax, rdx, rcx) in cases {
        let exit = code.kernel().with(|r| (r.rax, r.rdx, r.rcx) = (rax, rdx, rcx)).run();
        t.fault(what, code, &exit, plain(v::DE));
        t.eq(what, exit.regs.rax, rax);
        t.eq(what, exit.regs.rdx, rdx);
    }
    let aam = code!(32: ".byte 0xD4, 0");
    t.fault("aam 0", aam, &aam.user32().run(), plain(v::DE));
    let exit = code!("idiv cl").kernel().with(|r| (r.rax, r.rcx) = (0xFF80, 1)).run();
    t.done("idiv cl, quotient -128", &exit);
    t.eq("quotient and remainder", exit.regs.rax, 0x0080);
}

/// Opcodes that are undefined in every mode (SDM volume 2, appendix A).
fn undefined(t: &mut T) {
    let cases = [
        ("ud2", code!("ud2")),
        ("ud1", code!(".byte 0x0F, 0xB9, 0xC0")),
        ("ud0", code!(".byte 0x0F, 0xFF, 0xC0")),
        ("0F 04", code!(".byte 0x0F, 0x04")),
        ("0F 0A", code!(".byte 0x0F, 0x0A")),
        ("0F 24 (test registers)", code!(".byte 0x0F, 0x24, 0xC0")),
        ("0F 26", code!(".byte 0x0F, 0x26, 0xC0")),
        ("0F 36", code!(".byte 0x0F, 0x36")),
        ("0F 39", code!(".byte 0x0F, 0x39")),
        ("0F A6", code!(".byte 0x0F, 0xA6, 0x00")),
        ("rsm outside of SMM", code!("rsm")),
        ("FE /2", code!(".byte 0xFE, 0xD0")),
        ("FF /7", code!(".byte 0xFF, 0xF8")),
        ("C6 /1", code!(".byte 0xC6, 0xC8, 0")),
        ("8F /1", code!(".byte 0x8F, 0x08")),
        ("0F 00 /6", code!(".byte 0x0F, 0x00, 0xF0")),
        ("0F BA /0", code!(".byte 0x0F, 0xBA, 0xC0, 0")),
        ("0F C7 /0", code!(".byte 0x0F, 0xC7, 0x00")),
        ("0F 71 /0", code!(".byte 0x0F, 0x71, 0xC0, 0")),
        ("0F AE /4 register form", code!(".byte 0x0F, 0xAE, 0xE0")),
    ];
    for (what, code) in cases {
        t.faults(what, code, UD);
        t.user_faults(what, code, UD);
    }
}

/// Opcodes that 64-bit mode took out of use (SDM volume 2, "64-Bit Mode: Invalid").
fn undefined_in_64_bit(t: &mut T) {
    let cases = [
        ("push es", code!(".byte 0x06")),
        ("pop es", code!(".byte 0x07")),
        ("push cs", code!(".byte 0x0E")),
        ("push ss", code!(".byte 0x16")),
        ("pop ss", code!(".byte 0x17")),
        ("push ds", code!(".byte 0x1E")),
        ("pop ds", code!(".byte 0x1F")),
        ("daa", code!(".byte 0x27")),
        ("das", code!(".byte 0x2F")),
        ("aaa", code!(".byte 0x37")),
        ("aas", code!(".byte 0x3F")),
        ("pusha", code!(".byte 0x60")),
        ("popa", code!(".byte 0x61")),
        ("82 /0", code!(".byte 0x82, 0xC0, 0")),
        ("call far", code!(".byte 0x9A, 0, 0, 0, 0, 0, 0")),
        ("into", code!(".byte 0xCE")),
        ("aam", code!(".byte 0xD4, 10")),
        ("aad", code!(".byte 0xD5, 10")),
        ("salc", code!(".byte 0xD6")),
        ("jmp far", code!(".byte 0xEA, 0, 0, 0, 0, 0, 0")),
    ];
    for (what, code) in cases {
        t.faults(what, code, UD);
    }
    // SYSENTER's flags aside, LAHF and SAHF came back to 64-bit mode; these must not fault.
    t.runs("lahf", &code!("lahf").kernel());
}

/// Registers that do not exist, and register forms of instructions that want memory.
fn undefined_operands(t: &mut T) {
    let cases = [
        ("mov cs, ax", code!(".byte 0x8E, 0xC8")),
        ("mov segment 6, ax", code!(".byte 0x8E, 0xF0")),
        ("mov ax, segment 7", code!(".byte 0x8C, 0xF8")),
        ("mov rax, cr1", code!(".byte 0x0F, 0x20, 0xC8")),
        ("mov cr1, rax", code!(".byte 0x0F, 0x22, 0xC8")),
        ("mov rax, cr5", code!(".byte 0x0F, 0x20, 0xE8")),
        ("mov rax, cr9", code!(".byte 0x44, 0x0F, 0x20, 0xC8")),
        ("mov cr15, rax", code!(".byte 0x44, 0x0F, 0x22, 0xF8")),
        ("mov rax, dr8", code!(".byte 0x44, 0x0F, 0x21, 0xC0")),
        ("lea rax, rax", code!(".byte 0x48, 0x8D, 0xC0")),
        ("lss eax, eax", code!(".byte 0x0F, 0xB2, 0xC0")),
        ("lfs eax, eax", code!(".byte 0x0F, 0xB4, 0xC0")),
        ("cmpxchg8b eax", code!(".byte 0x0F, 0xC7, 0xC8")),
        ("movnti eax, eax", code!(".byte 0x0F, 0xC3, 0xC0")),
        ("call far eax", code!(".byte 0xFF, 0xD8")),
        ("jmp far eax", code!(".byte 0xFF, 0xE8")),
        ("movntps xmm, xmm", code!(".byte 0x0F, 0x2B, 0xC0")),
        ("ldmxcsr register", code!(".byte 0x0F, 0xAE, 0xD0")),
        ("fxsave register", code!(".byte 0x0F, 0xAE, 0xC0")),
    ];
    for (what, code) in cases {
        t.faults(what, code, UD);
    }
}

/// More than 15 bytes are #GP(0) (SDM 2.3.11), even before a fault the instruction itself has.
fn length_limit(t: &mut T) {
    t.runs("15 bytes", &code!(".fill 14, 1, 0x66", "nop").kernel());
    t.faults("16 bytes", code!(".fill 15, 1, 0x66", "nop"), gp(0));
    t.faults("prefixes only", code!(".fill 20, 1, 0x2E"), gp(0));
}

/// LOCK on anything but the listed instructions with a memory destination is #UD (SDM volume 2, LOCK).
fn lock_prefix(t: &mut T) {
    let bad = [
        ("lock nop", code!(".byte 0xF0, 0x90")),
        ("lock mov [rax], eax", code!(".byte 0xF0, 0x89, 0x00")),
        ("lock add eax, [rax]", code!(".byte 0xF0, 0x03, 0x00")),
        ("lock add eax, eax", code!(".byte 0xF0, 0x01, 0xC0")),
        ("lock cmp [rax], eax", code!(".byte 0xF0, 0x39, 0x00")),
        ("lock cmp [rax], imm", code!(".byte 0xF0, 0x83, 0x38, 0")),
        ("lock test [rax], eax", code!(".byte 0xF0, 0x85, 0x00")),
        ("lock bt [rax], eax", code!(".byte 0xF0, 0x0F, 0xA3, 0x00")),
        ("lock bt [rax], imm", code!(".byte 0xF0, 0x0F, 0xBA, 0x20, 0")),
        ("lock xchg ebx, ecx", code!(".byte 0xF0, 0x87, 0xD9")),
        ("lock inc eax", code!(".byte 0xF0, 0xFF, 0xC0")),
        ("lock shl [rax], 1", code!(".byte 0xF0, 0xD1, 0x20")),
        ("lock push [rax]", code!(".byte 0xF0, 0xFF, 0x30")),
        ("lock movsb", code!(".byte 0xF0, 0xA4")),
        ("lock cmpxchg eax, ecx", code!(".byte 0xF0, 0x0F, 0xB1, 0xC8")),
    ];
    let data = paging::frame(0).as_ptr() as u64;
    for (what, code) in bad {
        t.fault(what, code, &code.kernel().with(|r| r.rax = data).run(), UD);
    }
    let good = [
        ("lock add [rax], eax", code!("lock add [rax], eax")),
        ("lock xchg [rax], ebx", code!("lock xchg [rax], ebx")),
        ("lock btc [rax], imm", code!("lock btc dword ptr [rax], 3")),
        ("lock not", code!("lock not dword ptr [rax]")),
        ("lock neg", code!("lock neg dword ptr [rax]")),
        ("lock xadd", code!("lock xadd [rax], ebx")),
        ("lock cmpxchg8b", code!("lock cmpxchg8b [rax]")),
    ];
    for (what, code) in good {
        t.runs(what, &code.kernel().with(|r| r.rax = data));
    }
}

/// INT3, INT n and INTO are traps: RIP is that of the next instruction.
fn breakpoints_and_overflow(t: &mut T) {
    let int3 = code!(""; "int3"; "nop");
    t.trap("int3", int3, &int3.kernel().run(), plain(v::BP));
    t.trap("int3, user", int3, &int3.user().run(), plain(v::BP));
    let cd03 = code!(""; ".byte 0xCD, 3"; "nop");
    t.trap("int 3, long form", cd03, &cd03.user().run(), plain(v::BP));
    // A software interrupt never pushes an error code, whatever its vector (SDM 6.4.2).
    let int13 = code!(""; "int 13"; "nop");
    t.trap("int 13", int13, &int13.user().run(), plain(v::GP));
    let int14 = code!(""; "int 14"; "nop");
    t.trap("int 14", int14, &int14.kernel().run(), plain(v::PF));
    let into = code!(32: ""; "into"; "nop");
    t.trap("into with OF", into, &into.user32().with(|r| r.rflags |= flag::OF).run(), plain(v::OF));
    t.runs("into without OF", &into.user32());
}

/// #BR is a fault; bounds are inclusive (SDM volume 2, BOUND).
fn bound(t: &mut T) {
    let page = paging::frame(0);
    page[..4].copy_from_slice(&(-5i32).to_le_bytes());
    page[4..8].copy_from_slice(&10i32.to_le_bytes());
    let address = page.as_ptr() as u64 + run::USER_ALIAS;
    let code = code!(32: ".byte 0x62, 0x03"); // bound eax, [ebx]
    for (index, inside) in [(-6i32, false), (-5, true), (0, true), (10, true), (11, false)] {
        let exit = code.user32().with(|r| (r.rax, r.rbx) = (u64::from(index as u32), address)).run();
        if inside {
            t.done("bound inside", &exit);
        } else {
            t.fault("bound outside", code, &exit, plain(v::BR));
        }
    }
}

/// Instructions for privilege level 0 are #GP(0) elsewhere.
fn privileged(t: &mut T) {
    let cases = [
        ("hlt", code!("hlt")),
        ("cli", code!("cli")),
        ("sti", code!("sti")),
        ("mov rax, cr0", code!("mov rax, cr0")),
        ("mov cr0, rax", code!("mov cr0, rax")),
        ("mov rax, cr8", code!("mov rax, cr8")),
        ("mov rax, dr0", code!("mov rax, dr0")),
        ("mov dr7, rax", code!("mov dr7, rax")),
        ("clts", code!("clts")),
        ("lmsw", code!("lmsw ax")),
        ("invd", code!("invd")),
        ("wbinvd", code!("wbinvd")),
        ("invlpg", code!("invlpg [rax]")),
        ("rdmsr", code!("rdmsr")),
        ("wrmsr", code!("wrmsr")),
        ("lgdt", code!("lgdt [rsp]")),
        ("lidt", code!("lidt [rsp]")),
        ("lldt", code!("lldt ax")),
        ("ltr", code!("ltr ax")),
        ("swapgs", code!("swapgs")),
        ("sysretq", code!("sysretq")),
        ("in al, 0x80", code!("in al, 0x80")),
        ("out dx, eax", code!("out dx, eax")),
        ("insb", code!("insb")),
        ("outsd", code!("outsd")),
        ("xsetbv", code!("xsetbv")),
        ("rdpmc", code!("rdpmc")),
    ];
    for (what, code) in cases {
        t.user_faults(what, code, gp(0));
    }
    if !is_amd() {
        t.user_faults("sysexit", code!("sysexit"), gp(0));
    }
    // IOPL 3 opens CLI, STI and the ports, nothing else (SDM 19.5.1).
    for (what, code, open) in
        [("cli", code!("cli"), true), ("in", code!("in al, 0x80"), true), ("hlt", code!("hlt"), false)]
    {
        let exit = code.user().with(|r| r.rflags |= flag::IOPL3).run();
        t.event(what, &exit, if open { DONE } else { gp(0) });
    }
    // The I/O permission map: every byte of the access must be allowed (SDM 19.5.2).
    tss(0).ports[0x80 / 8] = 0xFE;
    t.runs("in al, permitted", &code!("in al, 0x80").user());
    t.user_faults("in ax, second byte not permitted", code!("in ax, 0x80"), gp(0));
    tss(0).ports[0x80 / 8] = 0xF0;
    t.runs("in eax, permitted", &code!("in eax, 0x80").user());
    t.user_faults("in eax at 0x81", code!("in eax, 0x81"), gp(0));
}

/// A non-canonical address is #GP(0), on the stack segment #SS(0) (SDM volume 1, 3.3.7.1).
fn non_canonical_data(t: &mut T) {
    let ss = Event(v::SS, 0);
    let cases = [
        ("mov rax, [rbx]", code!("mov rax, [rbx]"), gp(0)),
        ("mov [rbx], al", code!("mov [rbx], al"), gp(0)),
        ("mov rax, [rbp]", code!("mov rax, [rbp]"), ss),
        ("mov [rbp + 8], al", code!("mov [rbp + 8], al"), ss),
        ("mov rax, [rbx + rcx + 1]", code!("mov rax, [rbx + rcx + 1]"), gp(0)),
        ("lock inc [rbx]", code!("lock inc dword ptr [rbx]"), gp(0)),
        ("movsb, source", code!("mov rsi, rbx", "mov rdi, rsp"; "movsb"), gp(0)),
        ("movsb, destination", code!("mov rdi, rbx", "mov rsi, rsp"; "movsb"), gp(0)),
        ("push", code!("mov rsp, rbx"; "push rax"), ss),
        ("pop", code!("mov rsp, rbx"; "pop rax"), ss),
        ("push [rbx]", code!("push qword ptr [rbx]"), gp(0)),
        ("pop [rbx]", code!("pop qword ptr [rbx]"), gp(0)),
        ("enter", code!("mov rsp, rbx"; "enter 0, 0"), ss),
        ("leave", code!("leave"), ss),
        ("pushfq", code!("mov rsp, rbx"; "pushfq"), ss),
        ("lgdt", code!("lgdt [rbx]"), gp(0)),
        ("movaps", code!("movaps xmm0, [rbx]"), gp(0)),
        ("fld [rbp]", code!("fld dword ptr [rbp]"), ss),
        ("cmpxchg16b", code!("cmpxchg16b [rbx]"), gp(0)),
    ];
    for (what, code, want) in cases {
        // A little above, so that a push stays inside.
        let exit = code.kernel().with(|r| (r.rbx, r.rbp) = (HOLE + 64, HOLE + 64)).run();
        t.fault(what, code, &exit, want);
    }
    // These take an address and do not access memory.
    t.runs("lea", &code!("lea rax, [rbx]").kernel().with(|r| r.rbx = HOLE));
    t.runs("invlpg", &code!("invlpg [rbx]").kernel().with(|r| r.rbx = HOLE));
    t.runs("prefetcht0", &code!("prefetcht0 [rbx]").kernel().with(|r| r.rbx = HOLE));
    t.runs("nop [rbx]", &code!("nop dword ptr [rbx]").kernel().with(|r| r.rbx = HOLE));
}

/// Near branches to a non-canonical target are #GP(0) with the branch itself as RIP, and no stack effect.
fn non_canonical_branch(t: &mut T) {
    let cases = [
        ("jmp rbx", code!("jmp rbx")),
        ("call rbx", code!("call rbx")),
        ("ret", code!("push rbx"; "ret")),
        ("ret 8", code!("push rbx"; "ret 8")),
        ("jmp [rsp]", code!("push rbx"; "jmp [rsp]")),
    ];
    for (what, code) in cases {
        let exit = code.kernel().with(|r| r.rbx = HOLE).run();
        t.fault(what, code, &exit, gp(0));
        let pushed = if matches!(what, "jmp rbx" | "call rbx") { 0 } else { 8 };
        t.eq(what, exit.regs.rsp, run::snippet_stack(0) - pushed);
    }
    let iret = code!("push 0x10", "push rsp", "push 2", "push 8", "push rbx"; "iretq");
    t.fault("iretq", iret, &iret.kernel().with(|r| r.rbx = HOLE).run(), gp(0));
}

/// #AC(0) at privilege level 3 with CR0.AM and RFLAGS.AC (SDM 6.15, interrupt 17).
fn alignment(t: &mut T) {
    let page = paging::frame(0).as_ptr() as u64 + run::USER_ALIAS;
    let cases = [
        ("byte", code!("mov al, [rbx]"), 1),
        ("word", code!("mov ax, [rbx]"), 2),
        ("doubleword", code!("mov eax, [rbx]"), 4),
        ("quadword", code!("mov rax, [rbx]"), 8),
        ("write", code!("mov [rbx], eax"), 4),
        ("locked", code!("lock add [rbx], eax"), 4),
        ("single", code!("fld dword ptr [rbx]"), 4),
        ("push source", code!("push qword ptr [rbx]"), 8),
    ];
    for (what, code, size) in cases {
        for offset in [1, 2, 4, 8] {
            let regs = code.user().with(|r| (r.rbx, r.rflags) = (page + offset, r.rflags | flag::AC));
            write_cr0(crate::setup::CR0 | cr0::AM);
            let exit = regs.run();
            let kernel = code.kernel().with(|r| (r.rbx, r.rflags) = (page + offset, r.rflags | flag::AC)).run();
            write_cr0(crate::setup::CR0);
            if offset % size == 0 {
                t.done(what, &exit);
            } else {
                t.fault(what, code, &exit, Event(v::AC, 0));
            }
            t.done(what, &kernel);
            t.done("without CR0.AM", &regs.run());
        }
    }
    write_cr0(crate::setup::CR0 | cr0::AM);
    let regs = code!("mov eax, [rbx]").user().with(|r| r.rbx = page + 1);
    t.done("without RFLAGS.AC", &regs.run());
}

/// Runs `int 0x40` at both levels after the gate was replaced, and checks the #GP, #NP or delivery it leads to.
fn int_0x40(t: &mut T, what: &str, gate: u128, user: Event, kernel: Event) {
    let code = code!(""; "int 0x40"; "nop");
    idt(0)[0x40] = gate;
    for (regs, want) in [(code.user(), user), (code.kernel(), kernel)] {
        let exit = regs.run();
        let rip = if want.0 == 0x40 { code.next } else { code.mark };
        t.stopped_at(what, &exit, want, rip);
    }
}

/// INT n: privilege and presence of the gate; the error code is vector * 8 + IDT (SDM volume 2, INT n; 6.13).
fn int_n_checks(t: &mut T) {
    let delivered = plain(0x40);
    let error = 0x40 * 8 + 2;
    let stub = run::stub(0, 0x40);
    int_0x40(t, "DPL 3", gate(stub, KERNEL_CODE, 0xEE, 1), delivered, delivered);
    int_0x40(t, "trap gate", gate(stub, KERNEL_CODE, 0xEF, 1), delivered, delivered);
    int_0x40(t, "DPL 0", gate(stub, KERNEL_CODE, 0x8E, 1), gp(error), delivered);
    int_0x40(t, "DPL 2", gate(stub, KERNEL_CODE, 0xCE, 1), gp(error), delivered);
    let np = Event(v::NP, error);
    int_0x40(t, "not present", gate(stub, KERNEL_CODE, 0x6E, 1), np, np);
    int_0x40(t, "DPL before presence", gate(stub, KERNEL_CODE, 0x0E, 1), gp(error), np);
    for kind in [0xE0, 0xE5, 0xE6, 0xE7, 0xE9, 0xEC, 0xFE] {
        int_0x40(t, "not a gate of IA-32e mode", gate(stub, KERNEL_CODE, kind, 1), gp(error), gp(error));
    }
    idt(0)[3] = gate(run::stub(0, 3), KERNEL_CODE, 0x8E, 1);
    let int3 = code!("int3");
    t.user_faults("int3, DPL 0", int3, gp(3 * 8 + 2));
    // INT1 stands for a hardware debug event: its gate's DPL is not checked (SDM volume 2, INT n).
    idt(0)[1] = gate(run::stub(0, 1), KERNEL_CODE, 0x8E, 1);
    let int1 = code!(""; ".byte 0xF1"; "nop");
    t.trap("int1, DPL 0", int1, &int1.user().run(), DB);

    let base = core::ptr::from_mut(idt(0)) as u64;
    for limit in [0xF0 * 16 + 15, 0xF1 * 16 + 14] {
        load_idt(Pointer { limit, base });
        t.faults("int n beyond the IDT", code!("int 0xF1"), gp(0xF1 * 8 + 2));
    }
}

/// The code segment a gate names: #GP(selector), #NP(selector), and #GP(0) for a null one.
fn gate_targets(t: &mut T) {
    let stub = run::stub(0, 0x40);
    let to = |selector| gate(stub, selector, 0xEE, 1);
    let both = |t: &mut T, what, selector, want| int_0x40(t, what, to(selector), want, want);
    let code64 = 0x00AF_9B00_0000_FFFF;
    both(t, "null", 0, gp(0));
    both(t, "null with RPL", 3, gp(0));
    both(t, "beyond the GDT", 0x1000, gp(0x1000));
    both(t, "data segment", KERNEL_DATA, gp(u64::from(KERNEL_DATA)));
    both(t, "32-bit code segment", KERNEL_CODE32, gp(u64::from(KERNEL_CODE32)));
    let user_code = u64::from(USER_CODE & !3);
    idt(0)[0x40] = to(USER_CODE & !3);
    t.faults("less privileged code segment", code!("int 0x40"), gp(user_code));
    both(t, "TSS", tss_selector(0), gp(u64::from(tss_selector(0))));
    both(t, "LDT selector, no LDT", 0x0C, gp(0x0C));
    let absent = set_descriptor(scratch(0), code64 & !PRESENT);
    both(t, "not present", absent, Event(v::NP, absent.into()));
    let both_sizes = set_descriptor(scratch(1), code64 | 1 << 54);
    both(t, "L and D", both_sizes, gp(both_sizes.into()));
    // The selector's RPL is not part of the check.
    both(t, "RPL 3", KERNEL_CODE | 3, plain(0x40));
    idt(0)[0x40] = gate(HOLE, KERNEL_CODE, 0xEE, 1);
    t.event("non-canonical target", &code!("int 0x40").user().run(), gp(0));
}

/// EXT (bit 0) is set when the event being delivered was not INT n, INT3 or INTO (SDM 6.13).
fn external_flag(t: &mut T) {
    idt(0)[6] = gate(run::stub(0, 6), KERNEL_CODE, 0x6E, 1);
    t.faults("#UD, gate not present", code!("ud2"), Event(v::NP, 6 * 8 + 3));
    t.user_faults("#UD, gate not present", code!("ud2"), Event(v::NP, 6 * 8 + 3));
    idt(0)[6] = gate(run::stub(0, 6), 0, 0x8E, 1);
    t.faults("#UD, null selector", code!("ud2"), gp(1));
    idt(0)[6] = gate(run::stub(0, 6), KERNEL_DATA, 0x8E, 1);
    t.faults("#UD, data selector", code!("ud2"), gp(u64::from(KERNEL_DATA) + 1));
    tss(0).ist[1] = HOLE + 64;
    idt(0)[6] = gate(run::stub(0, 6), KERNEL_CODE, 0x8E, 2);
    t.faults("#UD, non-canonical IST", code!("ud2"), Event(v::SS, 1));
    idt(0)[0x40] = gate(run::stub(0, 0x40), KERNEL_CODE, 0xEE, 2);
    t.faults("int n, non-canonical IST", code!("int 0x40"), Event(v::SS, 0));
    idt(0)[3] = gate(run::stub(0, 3), KERNEL_CODE, 0x6E, 1);
    t.faults("int3, gate not present", code!("int3"), Event(v::NP, 3 * 8 + 2));
}

/// Two contributory exceptions, or a page fault with either, make #DF(0) (SDM table 6-5).
fn double_fault(t: &mut T) {
    let df = Event(v::DF, 0);
    let absent = |n: usize| idt(0)[n] = gate(run::stub(0, n), KERNEL_CODE, 0x6E, 1);
    let unmapped = code!("mov rax, [rbx]").kernel().with(|r| r.rbx = paging::TEST_VA);
    absent(0);
    t.event("#DE then #NP", &code!("div cl").kernel().run(), df);
    absent(13);
    t.event("#GP then #NP", &code!("mov rax, [rbx]").kernel().with(|r| r.rbx = HOLE).run(), df);
    absent(12);
    t.event("#SS then #NP", &code!("pop rax").kernel().with(|r| r.rsp = HOLE).run(), df);
    absent(14);
    t.event("#PF then #NP", &unmapped.run(), df);
    tss(0).ist[1] = paging::TEST_VA + 4096;
    idt(0)[14] = gate(run::stub(0, 14), KERNEL_CODE, 0x8E, 2);
    t.event("#PF then #PF", &unmapped.run(), df);
    absent(11);
    absent(6);
    t.event("#UD then #NP then #NP", &code!("ud2").kernel().run(), df);
}

/// Benign exceptions, and a page fault after a contributory one, are handled one after the other (SDM table 6-5).
fn serial_faults(t: &mut T) {
    idt(0)[3] = gate(run::stub(0, 3), KERNEL_DATA, 0xEE, 1);
    t.faults("#BP then #GP", code!("int3"), gp(u64::from(KERNEL_DATA)));
    tss(0).ist[1] = paging::TEST_VA + 4096;
    idt(0)[13] = gate(run::stub(0, 13), KERNEL_CODE, 0x8E, 2);
    let code = code!("mov rax, [rbx]");
    let exit = code.kernel().with(|r| r.rbx = HOLE).run();
    t.fault("#GP then #PF", code, &exit, pf(paging::pfec::W));
    t.is("CR2 in the missing stack page", exit.cr2 & !0xFFF == paging::TEST_VA);
    idt(0)[6] = gate(run::stub(0, 6), KERNEL_CODE, 0x8E, 2);
    t.faults("#UD then #PF", code!("ud2"), pf(paging::pfec::W));
}

/// Which stack the frame goes to: IST, RSP0 on a change of level, the same one otherwise; aligned to 16 (SDM 6.14.2, 6.14.5).
fn stack_choice(t: &mut T) {
    let code = code!("ud2");
    for ist in 1..=7 {
        idt(0)[6] = gate(run::stub(0, 6), KERNEL_CODE, 0x8E, ist);
        let top = tss(0).ist[ist as usize - 1];
        t.eq("IST, kernel", code.kernel().run().frame, top);
        t.eq("IST, user", code.user().run().frame, top);
    }
    tss(0).ist[2] -= 5;
    idt(0)[6] = gate(run::stub(0, 6), KERNEL_CODE, 0x8E, 3);
    t.eq("IST is aligned downwards", code.user().run().frame, tss(0).ist[2] & !15);
    idt(0)[6] = gate_without_ist(0, 6);
    t.eq("RSP0", code.user().run().frame, tss(0).rsp[0]);
    for misaligned in [0, 1, 8, 15] {
        let rsp = run::snippet_stack(0) - misaligned;
        let exit = code.kernel().with(|r| r.rsp = rsp).run();
        t.eq("same stack, aligned", exit.frame, rsp & !15);
        t.eq("old RSP is pushed unaligned", exit.regs.rsp, rsp);
    }
    // A change to privilege level 0 through INT n leaves SS null with RPL 0 (SDM 6.14.4).
    let handler = code!("mov eax, ss");
    idt(0)[0x40] = gate(handler.start, KERNEL_CODE, 0xEE, 0);
    t.eq("SS after a change of level", code!("int 0x40").user().run().regs.rax, 0);
    t.eq("SS without one", code!("int 0x40").kernel().run().regs.rax, KERNEL_DATA.into());
}

/// What delivery does to RFLAGS (SDM 6.12.1.3): TF, NT, RF, VM cleared; IF by interrupt gates only.
fn gate_flags(t: &mut T) {
    let handler = code!("pushfq", "pop rax");
    let set = flag::IF | flag::NT | flag::AC | flag::DF | flag::CF | flag::IOPL3;
    for (what, kind, kept) in
        [("interrupt gate", 0xEE, set & !(flag::IF | flag::NT)), ("trap gate", 0xEF, set & !flag::NT)]
    {
        idt(0)[0x40] = gate(handler.start, KERNEL_CODE, kind, 1);
        let exit = code!("int 0x40").user().with(|r| r.rflags |= set).run();
        t.eq(what, exit.regs.rax, kept | flag::FIXED);
    }
}

/// RF in the saved RFLAGS: set for faults, clear for traps (SDM 17.3.1.1).
fn saved_rf(t: &mut T) {
    let cases = [
        ("#UD", code!("ud2").kernel(), true),
        ("#GP", code!("mov rax, [rbx]").kernel().with(|r| r.rbx = HOLE), true),
        ("#PF", code!("mov rax, [rbx]").kernel().with(|r| r.rbx = paging::TEST_VA), true),
        ("#DE", code!("div cl").kernel(), true),
        ("int3", code!("int3").kernel(), false),
        ("int n", code!("int 0x40").user(), false),
        ("single step", code!("nop").kernel().with(|r| r.rflags |= flag::TF), false),
    ];
    for (what, regs, set) in cases {
        t.same(what, regs.run().regs.rflags & flag::RF != 0, set);
    }
}

/// IRETQ's checks of CS, SS and RIP (SDM volume 2, IRET).
fn iret_checks(t: &mut T) {
    let code = code!("push rax", "push rbx", "push rcx", "push rdx", "push rsi"; "iretq");
    let target = code!("nop").user();
    let regs = |change: &dyn Fn(&mut Regs)| {
        code.kernel()
            .with(|r| {
                (r.rax, r.rbx, r.rcx, r.rdx, r.rsi) = (target.ss, target.rsp, target.rflags, target.cs, target.rip)
            })
            .with(|r| change(r))
    };
    t.done("good frame", &regs(&|_| ()).run());
    let mut bad = |what, change: &dyn Fn(&mut Regs), want| {
        t.fault(what, code, &regs(change).run(), want);
    };
    let selector = |s: u16| gp(u64::from(s & !3));
    bad("CS null", &|r| r.rdx = 0, gp(0));
    bad("CS data", &|r| r.rdx = USER_DATA.into(), selector(USER_DATA));
    bad("CS beyond the GDT", &|r| r.rdx = 0xFFFB, gp(0xFFF8));
    bad("CS DPL above RPL", &|r| r.rdx = u64::from(KERNEL_CODE | 3), selector(KERNEL_CODE));
    bad("CS DPL below RPL", &|r| r.rdx = u64::from(USER_CODE & !3), selector(USER_CODE));
    bad("SS null with 64-bit CS at level 3", &|r| r.rax = 3, gp(0));
    bad("SS code", &|r| r.rax = USER_CODE.into(), selector(USER_CODE));
    bad("SS DPL", &|r| r.rax = u64::from(KERNEL_DATA | 3), selector(KERNEL_DATA));
    bad("SS RPL", &|r| r.rax = u64::from(USER_DATA & !3), selector(USER_DATA));
    bad("RIP non-canonical", &|r| r.rsi = HOLE, gp(0));
    let absent = set_descriptor(scratch(0), 0x00AF_FB00_0000_FFFF & !PRESENT) | 3;
    bad("CS not present", &|r| r.rdx = absent.into(), Event(v::NP, u64::from(absent & !3)));
    let absent = set_descriptor(scratch(1), 0x00CF_F300_0000_FFFF & !PRESENT) | 3;
    bad("SS not present", &|r| r.rax = absent.into(), Event(v::SS, u64::from(absent & !3)));
    let read_only = set_descriptor(scratch(2), 0x00CF_F100_0000_FFFF) | 3;
    bad("SS not writable", &|r| r.rax = read_only.into(), selector(read_only));
    bad("NT", &|r| r.rflags |= flag::NT, gp(0));
    // IRETQ at level 0 to level 0 with a null SS is allowed in 64-bit mode.
    let here = code!("nop");
    let exit = regs(&|r| (r.rax, r.rbx, r.rdx, r.rsi) = (0, here.kernel().rsp, KERNEL_CODE.into(), here.start)).run();
    t.done("SS null at level 0", &exit);
}
