//! Segment loads, descriptor checks, far transfers and fast system calls in IA-32e mode (SDM volume 3, chapter 5; volume 2).

use crate::cpu::{vector as v, *};
use crate::paging::{frame, physical};
use crate::run::{self, Code, Exit, Regs, USER_ALIAS};
use crate::tables::*;
use crate::tap::*;
use crate::{code, tests};

tests![
    data_loads, ss_loads, accessed_bit, null_loads, compat_null_and_limits, fs_gs_bases, far_jump, far_call_and_ret,
    far_ret_outer, call_gates, call_gate_stack, compat_code,     lar_lsl, verr_verw, arpl, store_tables, umip, lldt_ltr, lgdt_lidt_canonical, mov_from_segment, iret_compat,
    iret_nulls_data_segments, rflags_privilege,
];

const DATA: u64 = 0x00CF_9300_0000_FFFF;
const CODE64: u64 = 0x00AF_9B00_0000_FFFF;
const DPL3: u64 = 3 << 45;

/// Selector of scratch descriptor `n`, set to `descriptor`.
fn put(n: u16, descriptor: u64) -> u64 {
    set_descriptor(scratch(n), descriptor).into()
}

/// A load that faults with an error code of its selector (RPL cleared).
fn sel(vector: u64, selector: u64) -> Event {
    Event(vector, selector & !3)
}

/// DS, ES, FS, GS: type, privilege, presence (SDM volume 2, MOV: #GP(selector) before #NP(selector)).
fn data_loads(t: &mut T) {
    let loads = [
        ("ds", code!("mov ds, eax")),
        ("es", code!("mov es, eax")),
        ("fs", code!("mov fs, eax")),
        ("gs", code!("mov gs, eax")),
        ("lfs", code!("mov [rsp - 4], ax", "mov dword ptr [rsp - 8], 0"; "lfs ecx, [rsp - 8]")),
        ("lgs", code!("mov [rsp - 4], ax", "mov dword ptr [rsp - 8], 0"; "lgs ecx, [rsp - 8]")),
    ];
    let execute_only = put(0, CODE64 & !(1 << 41));
    let absent = put(1, DATA & !PRESENT);
    let absent3 = put(2, DATA & !PRESENT | DPL3);
    let system = put(3, 0x0000_8200_0000_0000);
    let conforming = put(4, 0x00AF_9F00_0000_FFFF);
    let absent_system = put(5, 0x0000_0200_0000_0000);
    let kernel = [
        ("data", u64::from(KERNEL_DATA), DONE),
        ("user data", u64::from(USER_DATA), DONE),
        ("readable code", u64::from(KERNEL_CODE), DONE),
        ("RPL above DPL", u64::from(KERNEL_DATA | 3), sel(v::GP, KERNEL_DATA.into())),
        ("execute-only code", execute_only, sel(v::GP, execute_only)),
        ("not present", absent, sel(v::NP, absent)),
        ("system", system, sel(v::GP, system)),
        ("absent system", absent_system, sel(v::GP, absent_system)),
        ("beyond the GDT", 0x8000, gp(0x8000)),
        ("LDT without one", 0x000C, gp(0x000C)),
        ("conforming code", conforming | 3, DONE),
    ];
    let user = [
        ("kernel data", u64::from(KERNEL_DATA), sel(v::GP, KERNEL_DATA.into())),
        ("kernel data, not present", absent, sel(v::GP, absent)),
        ("user data, not present", absent3 | 3, sel(v::NP, absent3)),
        ("user data, RPL 0", u64::from(USER_DATA & !3), DONE),
        ("conforming code", conforming | 3, DONE),
    ];
    for (register, code) in loads {
        for (what, selector, want) in kernel {
            let exit = code.kernel().with(|r| r.rax = selector).run();
            t.event(format_args!("{register}, {what}"), &exit, want);
        }
        for (what, selector, want) in user {
            let exit = code.user().with(|r| r.rax = selector).run();
            t.event(format_args!("{register}, user, {what}"), &exit, want);
        }
    }
}

/// SS: writable data with DPL = RPL = CPL; not present is #SS (SDM volume 2, MOV).
fn ss_loads(t: &mut T) {
    let loads = [code!("mov ss, eax"), code!("mov [rsp - 4], ax", "mov [rsp - 8], esp"; "lss ecx, [rsp - 8]")];
    let read_only = put(0, DATA & !(1 << 41));
    let absent = put(1, DATA & !PRESENT);
    let dpl3 = put(2, DATA | DPL3);
    for code in loads {
        for (what, selector, want) in [
            ("data", u64::from(KERNEL_DATA), DONE),
            ("null at level 0", 0, DONE),
            ("null, RPL 3, at level 0", 3, gp(0)),
            ("null, RPL 1, at level 0", 1, gp(0)),
            ("code", KERNEL_CODE.into(), sel(v::GP, KERNEL_CODE.into())),
            ("read-only", read_only, sel(v::GP, read_only)),
            ("not present", absent, sel(v::SS, absent)),
            ("DPL 3", dpl3, sel(v::GP, dpl3)),
            ("RPL 3", u64::from(KERNEL_DATA | 3), sel(v::GP, KERNEL_DATA.into())),
            ("beyond the GDT", 0x8000, gp(0x8000)),
        ] {
            t.event(what, &code.kernel().with(|r| r.rax = selector).run(), want);
        }
        for (what, selector, want) in [
            ("user data", u64::from(USER_DATA), DONE),
            ("null at level 3", 0, gp(0)),
            ("null, RPL 3, at level 3", 3, gp(0)),
            ("RPL 0", u64::from(USER_DATA & !3), sel(v::GP, USER_DATA.into())),
        ] {
            t.event(what, &code.user().with(|r| r.rax = selector).run(), want);
        }
    }
}

/// Loading sets the descriptor's accessed bit (SDM 3.4.5.1).
fn accessed_bit(t: &mut T) {
    for code in [code!("mov ds, eax"), code!("mov ss, eax"), code!("mov gs, eax")] {
        let selector = put(0, DATA & !(1 << 40));
        t.runs("load", &code.kernel().with(|r| r.rax = selector));
        t.eq("accessed", gdt()[selector as usize / 8], DATA);
    }
    let selector = put(0, CODE64 & !(1 << 40));
    let code = code!("push rax", "lea rbx, [rip + 773f]", "push rbx"; ".byte 0x48, 0xCB"; "nop");
    t.runs("retfq", &code.kernel().with(|r| r.rax = selector));
    t.eq("accessed", gdt()[selector as usize / 8], CODE64);
}

/// A null selector loads; in 64-bit mode it can be used, in compatibility mode the use is #GP(0).
fn null_loads(t: &mut T) {
    for selector in 0..4u64 {
        let exit = t.runs("ds", &code!("mov ds, eax", "mov al, ds:[rsp]", "mov ecx, ds").kernel().with(|r| r.rax = selector));
        t.eq("selector", exit.regs.rcx, selector);
    }
    let code = code!(32: "mov ds, eax"; "mov al, ds:[esp]");
    t.fault("compatibility mode", code, &code.user32().run(), gp(0));
}

/// Limits and types are checked in compatibility mode only (SDM 5.3.1).
fn compat_null_and_limits(t: &mut T) {
    let base = frame(0).as_ptr() as u32 + USER_ALIAS as u32;
    let small = u64::from(set_descriptor(scratch(0), segment(base, 0xFF, 0xF3, 0x4)) | 3);
    let down = u64::from(set_descriptor(scratch(1), segment(base, 0xFF, 0xF7, 0x0)) | 3);
    let read_only = u64::from(set_descriptor(scratch(2), segment(base, 0xFF, 0xF1, 0x4)) | 3);
    let read = code!(32: "mov es, eax"; "mov ecx, es:[ebx]");
    let write = code!(32: "mov es, eax"; "mov es:[ebx], ecx");
    for (what, code, selector, offset, want) in [
        ("inside", read, small, 0xFC, DONE),
        ("last byte outside", read, small, 0xFD, gp(0)),
        ("beyond", read, small, 0x100, gp(0)),
        ("wraps", read, small, 0xFFFF_FFFE, gp(0)),
        ("expand-down, below", read, down, 0xFC, gp(0)),
        ("expand-down, first", read, down, 0x100, DONE),
        ("expand-down, 16-bit top", read, down, 0xFFFC, DONE),
        ("expand-down, beyond the top", read, down, 0xFFFD, gp(0)),
        ("read-only, read", read, read_only, 0, DONE),
        ("read-only, write", write, read_only, 0, gp(0)),
    ] {
        let exit = code.user32().with(|r| (r.rax, r.rbx) = (selector, offset)).run();
        t.event(what, &exit, want);
    }
    let through_code = code!(32: "mov cs:[ebx], ecx");
    t.fault("write through CS", through_code, &through_code.user32().with(|r| r.rbx = base.into()).run(), gp(0));
    // The stack segment's faults are #SS(0).
    let code = code!(32: "mov ss, eax"; "mov ecx, [ebp]");
    let exit = code.user32().with(|r| (r.rax, r.rbp) = (small, 0x100)).run();
    t.fault("stack segment", code, &exit, Event(v::SS, 0));
    let code = code!(32: "mov ss, eax", "mov esp, 2"; "push ecx");
    t.fault("push", code, &code.user32().with(|r| r.rax = small).run(), Event(v::SS, 0));
}

/// FS and GS bases come from descriptors (32 bits) or MSRs; DS, ES, SS and CS bases are ignored in 64-bit mode.
fn fs_gs_bases(t: &mut T) {
    let data = frame(0).as_ptr() as u64;
    frame(0)[..8].copy_from_slice(&0x1122_3344_5566_7788u64.to_le_bytes());
    let selector = u64::from(set_descriptor(scratch(0), segment(data as u32, 0xF_FFFF, 0x93, 0xC)));
    for (what, code) in [("fs", code!("mov fs, eax", "mov rbx, fs:[0]")), ("gs", code!("mov gs, eax", "mov rbx, gs:[0]"))] {
        let exit = t.runs(what, &code.kernel().with(|r| r.rax = selector));
        t.eq(what, exit.regs.rbx, 0x1122_3344_5566_7788);
    }
    t.eq("MSR after the load", rdmsr(msr::FS_BASE), data);
    wrmsr(msr::GS_BASE, 0xFFFF_8000_0000_1000);
    let limit = u64::from(set_descriptor(scratch(1), segment(data as u32, 0, 0x93, 0x4)));
    t.runs("limits are ignored", &code!("mov fs, eax", "mov rbx, fs:[100]").kernel().with(|r| r.rax = limit));
    let exit = t.runs("ds", &code!("mov ds, eax", "mov rbx, ds:[rcx]").kernel().with(|r| (r.rax, r.rcx) = (selector, data)));
    t.eq("base of ds is ignored", exit.regs.rbx, 0x1122_3344_5566_7788);
    // LEA ignores the segment; a base that makes the sum non-canonical is #GP(0).
    wrmsr(msr::FS_BASE, 0x7FFF_FFFF_F000);
    let code = code!("mov rbx, fs:[0x1000]");
    t.faults("base plus offset non-canonical", code, gp(0));
    t.runs("lea", &code!("lea rbx, fs:[0x1000]").kernel());
    wrmsr(msr::FS_BASE, 0);
}

/// A far pointer on the stack: offset 64 bits at RSP, selector above. `jmp rex.w m16:64`, or 32 bits without.
fn far(code: Code, selector: u64, target: u64) -> Exit {
    code.kernel().with(|r| (r.rax, r.rbx) = (selector, target)).run()
}

/// Far JMP through memory: code segment checks (SDM volume 2, JMP).
fn far_jump(t: &mut T) {
    let code = code!("push rax", "push rbx"; ".byte 0x48, 0xFF, 0x2C, 0x24"); // jmp m16:64 [rsp]
    let code32 = code!("push rax", "shl rax, 32", "or rax, rbx", "push rax"; ".byte 0xFF, 0x2C, 0x24"); // jmp m16:32 [rsp]
    let target = code!("nop");
    // Intel takes REX.W here; AMD ignores it and reads m16:32 (APM volume 3, JMP far).
    let amd = is_amd();
    let forms: &[Code] = if amd { &[code32] } else { &[code, code32] };
    let absent = put(0, CODE64 & !PRESENT);
    let dpl3 = put(1, CODE64 | DPL3);
    let both = put(2, CODE64 | 1 << 54);
    let conforming3 = put(3, 0x00AF_FF00_0000_FFFF);
    for &code in forms {
        for (what, selector, want) in [
            ("null", 0, gp(0)),
            ("data", KERNEL_DATA.into(), sel(v::GP, KERNEL_DATA.into())),
            ("not present", absent, sel(v::NP, absent)),
            ("DPL 3", dpl3, sel(v::GP, dpl3)),
            ("RPL above CPL", u64::from(KERNEL_CODE | 3), sel(v::GP, KERNEL_CODE.into())),
            ("L and D", both, sel(v::GP, both)),
            ("conforming, DPL above CPL", conforming3, sel(v::GP, conforming3)),
            ("beyond the GDT", 0xF000, gp(0xF000)),
            ("TSS", tss_selector(0).into(), sel(v::GP, tss_selector(0).into())),
        ] {
            t.fault(what, code, &far(code, selector, target.start), want);
        }
        t.done("good", &far(code, KERNEL_CODE.into(), target.start));
        t.done("conforming", &far(code, CONFORMING.into(), target.start));
    }
    if !amd {
        t.fault("non-canonical", code, &far(code, KERNEL_CODE.into(), 1 << 47), gp(0));
    }
}

/// Far CALL pushes CS and RIP in the operand size; far RET takes them back.
fn far_call_and_ret(t: &mut T) {
    let code = code!("push rax", "shl rax, 32", "or rax, rbx", "push rax"; ".byte 0xFF, 0x1C, 0x24"; "nop"); // call m16:32
    let target = code!("nop");
    let exit = far(code, KERNEL_CODE.into(), target.start);
    t.done("call", &exit);
    t.eq("two doublewords pushed", exit.regs.rsp, run::snippet_stack(0) - 16 - 8);
    // SAFETY: the far call has just pushed them on the snippet's stack, which is mapped and aligned.
    let pushed = unsafe { *(exit.regs.rsp as *const [u32; 2]) };
    t.eq("return address", u64::from(pushed[0]), code.next);
    t.eq("CS", pushed[1], KERNEL_CODE.into());
    let ret = code!("push rax", "push rbx"; ".byte 0x48, 0xCB"); // retfq
    t.done("retfq", &far(ret, KERNEL_CODE.into(), target.start));
    for (what, selector, want) in [
        ("null", 0, gp(0)),
        ("data", u64::from(KERNEL_DATA), sel(v::GP, KERNEL_DATA.into())),
        ("DPL above RPL", u64::from(USER_CODE & !3), sel(v::GP, USER_CODE.into())),
    ] {
        t.fault(what, ret, &far(ret, selector, target.start), want);
    }
    t.fault("non-canonical", ret, &far(ret, KERNEL_CODE.into(), 1 << 47), gp(0));
    let inner = code!("push 8", "push rbx"; ".byte 0x48, 0xCB");
    t.fault("to an inner level", inner, &inner.user().with(|r| r.rbx = target.start).run(), gp(KERNEL_CODE.into()));
}

/// Far RET to level 3 takes RSP and SS too, and releases parameters on both stacks.
fn far_ret_outer(t: &mut T) {
    let target = code!("nop");
    let code = code!("push rcx", "push rdx", "push 0", "push rax", "push rbx"; ".byte 0x48, 0xCA, 8, 0"); // retfq 8
    let regs = code.kernel().with(|r| {
        r.rax = USER_CODE.into();
        r.rbx = target.start + USER_ALIAS;
        r.rcx = USER_DATA.into();
        r.rdx = run::snippet_stack(0) + USER_ALIAS - 0x100;
    });
    let exit = t.runs("to level 3", &regs);
    t.eq("CS", exit.regs.cs, USER_CODE.into());
    t.eq("RSP", exit.regs.rsp, run::snippet_stack(0) + USER_ALIAS - 0x100 + 8);
    let mut bad = |what, change: &dyn Fn(&mut Regs), want| {
        t.fault(what, code, &regs.with(|r| change(r)).run(), want);
    };
    bad("SS null", &|r| r.rcx = 0, gp(0));
    bad("SS DPL", &|r| r.rcx = u64::from(KERNEL_DATA | 3), sel(v::GP, KERNEL_DATA.into()));
    let absent = put(0, DATA & !PRESENT | DPL3);
    bad("SS not present", &|r| r.rcx = absent | 3, sel(v::SS, absent));
}

/// A 64-bit call gate (SDM 5.8.3.1).
fn call_gate(target: u64, selector: u16, kind: u8) -> u128 {
    gate(target, selector, kind, 0)
}

/// Call gates: privilege, presence, and what they may lead to.
fn call_gates(t: &mut T) {
    let target = code!("nop");
    let code = code!("push rax", "shl rax, 32", "push rax"; ".byte 0xFF, 0x1C, 0x24"); // call m16:32 [rsp]
    let gate_at = |descriptor: u128| u64::from(set_wide_descriptor(scratch(0), descriptor));
    let absent = put(4, CODE64 & !PRESENT);
    let dpl3 = put(5, CODE64 | DPL3);
    let gate_sel = u64::from(scratch(0));
    for (what, descriptor, user, want) in [
        ("good", call_gate(target.start, KERNEL_CODE, 0xEC), true, DONE),
        ("good, kernel", call_gate(target.start, KERNEL_CODE, 0x8C), false, DONE),
        ("DPL below CPL", call_gate(target.start, KERNEL_CODE, 0x8C), true, gp(gate_sel)),
        ("not present", call_gate(target.start, KERNEL_CODE, 0x6C), true, Event(v::NP, gate_sel)),
        ("null target", call_gate(target.start, 0, 0xEC), true, gp(0)),
        ("data target", call_gate(target.start, KERNEL_DATA, 0xEC), true, gp(KERNEL_DATA.into())),
        ("32-bit target", call_gate(target.start, KERNEL_CODE32, 0xEC), true, gp(KERNEL_CODE32.into())),
        ("absent target", call_gate(target.start, absent as u16, 0xEC), true, Event(v::NP, absent)),
        ("outer target", call_gate(target.start, dpl3 as u16, 0xEC), false, gp(dpl3)),
        ("non-canonical target", call_gate(1 << 47, KERNEL_CODE, 0xEC), true, gp(0)),
        ("upper type not zero", call_gate(target.start, KERNEL_CODE, 0xEC) | 1 << (64 + 40), true, gp(gate_sel)),
        ("16-bit gate type", call_gate(target.start, KERNEL_CODE, 0xE4), true, gp(gate_sel)),
    ] {
        let selector = gate_at(descriptor);
        let regs = if user { code.user() } else { code.kernel() };
        t.event(what, &regs.with(|r| r.rax = selector).run(), want);
    }
}

/// Through a gate to level 0: RSP0 from the TSS, four quadwords pushed, SS null, RIP of the caller.
fn call_gate_stack(t: &mut T) {
    let target = code!("mov eax, ss");
    let code = code!("push rax", "shl rax, 32", "push rax"; ".byte 0xFF, 0x1C, 0x24"; "nop");
    let selector = u64::from(set_wide_descriptor(scratch(0), call_gate(target.start, KERNEL_CODE, 0xEC)));
    let exit = t.runs("user", &code.user().with(|r| r.rax = selector));
    t.eq("RSP0 used", exit.regs.rsp, tss(0).rsp[0] - 32);
    t.eq("SS is null", exit.regs.rax, 0);
    // SAFETY: the processor has just pushed them on the stack of RSP0, which is mapped and aligned.
    let frame = unsafe { *(exit.regs.rsp as *const [u64; 4]) };
    t.eq("RIP", frame[0], code.next + USER_ALIAS);
    t.eq("CS", frame[1], USER_CODE.into());
    t.eq("RSP", frame[2], run::snippet_stack(0) + USER_ALIAS - 16);
    t.eq("SS", frame[3], USER_DATA.into());
    tss(0).rsp[0] = (1 << 47) + 64;
    t.event("RSP0 non-canonical", &code.user().with(|r| r.rax = selector).run(), Event(v::SS, 0));
}

/// 32-bit and 16-bit code under IA-32e mode: operand sizes, high registers out of reach, upper halves.
fn compat_code(t: &mut T) {
    let exit = t.runs("inc is 40", &code!(32: ".byte 0x40").user32().with(|r| r.rax = 0xFFFF_FFFF));
    t.eq("EAX wraps", exit.regs.rax & 0xFFFF_FFFF, 0);
    let code = code!(32: "push 0x11223344", "pop ecx", "mov ax, 5", "call 2f", "2: pop ebx");
    let exit = t.runs("push, pop, call", &code.user32());
    t.eq("ECX", exit.regs.rcx & 0xFFFF_FFFF, 0x1122_3344);
    t.eq("ESP", exit.regs.rsp, run::snippet_stack(0) + USER_ALIAS);
    t.eq("EBX is below 4 GiB", exit.regs.rbx >> 32, 0);
    t.runs("pusha, popa", &code!(32: ".byte 0x60, 0x61").user32());
    t.runs("daa", &code!(32: ".byte 0x27").user32());
    t.runs("kernel", &code!(32: "mov eax, cr0").kernel32());
    let far = code!(32: ".byte 0xEA", ".long 0x80000000", ".short 0x10");
    t.event("jmp far to data", &far.user32().run(), gp(0x10));
    let syscall = code!(32: "syscall");
    if !is_amd() {
        t.fault("syscall in compatibility mode", syscall, &syscall.user32().run(), UD);
    }
}

/// What LAR shows; bits 19:16 are undefined.
const LAR_BITS: u64 = 0x00F0_FF00;

/// LAR and LSL: ZF, types, privilege, granularity (SDM volume 2).
fn lar_lsl(t: &mut T) {
    let byte_limit = u64::from(set_descriptor(scratch(0), segment(0, 0x1_2345, 0x93, 0)));
    let page_limit = u64::from(set_descriptor(scratch(1), segment(0, 0x1_2345, 0xF3, 0x8)));
    let call = u64::from(set_wide_descriptor(scratch(2), call_gate(0, KERNEL_CODE, 0x8C)));
    let interrupt_gate = u64::from(set_wide_descriptor(scratch(4), gate(0, KERNEL_CODE, 0x8E, 0)));
    let absent = u64::from(set_descriptor(scratch(6), segment(0, 0xFFF, 0x13, 0)));
    let tss = u64::from(tss_selector(0));
    let limit = size_of::<Tss>() as u64 - 1;
    // What, selector, at level 3, result of LAR, result of LSL.
    let cases = [
        ("bytes", byte_limit, false, Some(0x0001_9300), Some(0x1_2345)),
        ("pages", page_limit, false, Some(0x0081_F300), Some(0x1234_5FFF)),
        ("null", 0, false, None, None),
        ("beyond the GDT", 0x8000, false, None, None),
        ("call gate", call, false, Some(0x8C00), None),
        ("interrupt gate", interrupt_gate, false, None, None),
        ("TSS", tss, false, Some(0x8B00), Some(limit)),
        ("not present", absent, false, Some(0x1300), Some(0xFFF)),
        ("user, DPL 0", byte_limit, true, None, None),
        ("user, DPL 3", page_limit, true, Some(0x0081_F300), Some(0x1234_5FFF)),
    ];
    for (what, selector, user, lar, lsl) in cases {
        for (code, want, mask) in [(code!("lar ecx, eax"), lar, LAR_BITS), (code!("lsl ecx, eax"), lsl, u64::MAX)] {
            let regs = if user { code.user() } else { code.kernel() };
            let exit = t.runs(what, &regs.with(|r| (r.rax, r.rcx) = (selector, 0x5555_5555)));
            t.same(format_args!("{what}: ZF"), exit.regs.rflags & flag::ZF != 0, want.is_some());
            match want {
                Some(value) => t.eq(what, exit.regs.rcx & mask, value & mask),
                None => t.eq(what, exit.regs.rcx, 0x5555_5555),
            }
        }
    }
}

/// VERR and VERW: readable, writable, privilege (SDM volume 2).
fn verr_verw(t: &mut T) {
    let execute_only = put(0, CODE64 & !(1 << 41));
    let read_only = put(1, DATA & !(1 << 41));
    for (what, selector, user, readable, writable) in [
        ("data", u64::from(KERNEL_DATA), false, true, true),
        ("read-only", read_only, false, true, false),
        ("code", KERNEL_CODE.into(), false, true, false),
        ("execute-only", execute_only, false, false, false),
        ("null", 0, false, false, false),
        ("TSS", tss_selector(0).into(), false, false, false),
        ("kernel data, user", KERNEL_DATA.into(), true, false, false),
        ("user data, user", USER_DATA.into(), true, true, true),
        ("conforming code, user", u64::from(CONFORMING), true, true, false),
    ] {
        for (code, want) in [(code!("verr ax"), readable), (code!("verw ax"), writable)] {
            let regs = if user { code.user() } else { code.kernel() };
            let exit = t.runs(what, &regs.with(|r| r.rax = selector));
            t.same(what, exit.regs.rflags & flag::ZF != 0, want);
        }
    }
}

/// ARPL in compatibility mode: raises RPL and sets ZF (SDM volume 2). In 64-bit mode the opcode is MOVSXD.
fn arpl(t: &mut T) {
    for (destination, source, result, zf) in [(0x10u64, 3u64, 0x13u64, true), (0x13, 1, 0x13, false), (0x11, 1, 0x11, false), (0x10, 0x32, 0x12, true)] {
        let exit = t.runs("arpl", &code!(32: ".byte 0x63, 0xC8").user32().with(|r| (r.rax, r.rcx) = (destination, source)));
        t.eq("selector", exit.regs.rax & 0xFFFF, result);
        t.same("ZF", exit.regs.rflags & flag::ZF != 0, zf);
    }
    let exit = t.runs("movsxd", &code!("movsxd rax, ecx").kernel().with(|r| r.rcx = 0x8000_0000));
    t.eq("sign-extended", exit.regs.rax, 0xFFFF_FFFF_8000_0000);
}

/// SGDT, SIDT, SLDT, STR at any level.
fn store_tables(t: &mut T) {
    let at = frame(0).as_ptr() as u64 + USER_ALIAS;
    for (what, code, base, limit) in [
        ("sgdt", code!("sgdt [rbx]"), gdt().as_ptr() as u64, 511u16),
        ("sidt", code!("sidt [rbx]"), idt(0).as_ptr() as u64, 4095),
    ] {
        frame(0).fill(0xEE);
        t.runs(what, &code.user().with(|r| r.rbx = at));
        t.eq(what, u16::from_le_bytes(frame(0)[..2].try_into().unwrap()), limit);
        t.eq(what, u64::from_le_bytes(frame(0)[2..10].try_into().unwrap()), base);
        t.eq("ten bytes", frame(0)[10], 0xEE);
    }
    let ones = |r: &mut Regs| r.rax = u64::MAX;
    t.eq("str rax", code!(".byte 0x48, 0x0F, 0x00, 0xC8").user().with(ones).run().regs.rax, tss_selector(0).into());
    t.eq("str ax", code!(".byte 0x66, 0x0F, 0x00, 0xC8").user().with(ones).run().regs.rax, !0xFFFF | u64::from(tss_selector(0)));
    t.eq("sldt eax", code!("sldt eax").user().with(ones).run().regs.rax & 0xFFFF, 0);
}

/// CR4.UMIP: those and SMSW are #GP(0) above level 0 (SDM 2.5).
fn umip(t: &mut T) {
    if !Feature::UMIP.present() {
        return t.skip("no UMIP");
    }
    write_cr4(read_cr4() | cr4::UMIP);
    for (what, code) in [
        ("sgdt", code!("sgdt [rsp]")),
        ("sidt", code!("sidt [rsp]")),
        ("sldt", code!("sldt eax")),
        ("str", code!("str eax")),
        ("smsw", code!("smsw eax")),
    ] {
        t.user_faults(what, code, gp(0));
        t.runs(what, &code.kernel());
    }
    write_cr4(read_cr4() & !cr4::UMIP);
}

/// LLDT and LTR: type, presence, busy (SDM volume 2).
fn lldt_ltr(t: &mut T) {
    let (lldt, ltr) = (code!("lldt ax"), code!("ltr ax"));
    let base = frame(0).as_ptr() as u64;
    let ldt = u64::from(set_wide_descriptor(scratch(0), system(base, 0xFF, 0x82)));
    let absent_ldt = u64::from(set_wide_descriptor(scratch(2), system(base, 0xFF, 0x02)));
    let free = u64::from(set_wide_descriptor(scratch(4), system(core::ptr::from_ref(tss(0)) as u64, 0x67, 0x89)));
    let absent = u64::from(set_wide_descriptor(scratch(6), system(0, 0x67, 0x09)));
    let hole = u64::from(set_wide_descriptor(scratch(8), system(1 << 47, 0x67, 0x89)));
    let busy = u64::from(tss_selector(0));
    for (what, code, selector, want) in [
        ("lldt null", lldt, 0, DONE),
        ("lldt", lldt, ldt, DONE),
        ("lldt, not present", lldt, absent_ldt, sel(v::NP, absent_ldt)),
        ("lldt, TSS", lldt, busy, gp(busy)),
        ("lldt, data", lldt, KERNEL_DATA.into(), gp(KERNEL_DATA.into())),
        ("lldt, in the LDT", lldt, 0x0C, gp(0x0C)),
        ("ltr null", ltr, 0, gp(0)),
        ("ltr, busy", ltr, busy, gp(busy)),
        ("ltr, not present", ltr, absent, sel(v::NP, absent)),
        ("ltr, LDT", ltr, ldt, gp(ldt)),
        ("ltr, non-canonical base", ltr, hole, gp(hole)),
        ("ltr, in the LDT", ltr, 0x0C, gp(0x0C)),
        ("ltr, free", ltr, free, DONE),
    ] {
        if is_tcg() && matches!(what, "ltr null" | "ltr, non-canonical base") {
            continue; // QEMU's translator loads them and is lost at the next exception
        }
        t.event(what, &code.kernel().with(|r| r.rax = selector).run(), want);
    }
    t.eq("LTR sets busy", gdt()[free as usize / 8] >> 41 & 1, 1);
    // Descriptors in the LDT.
    frame(0)[8..16].copy_from_slice(&DATA.to_le_bytes());
    t.done("lldt", &lldt.kernel().with(|r| r.rax = ldt).run());
    t.done("LDT entry 1", &code!("mov ds, eax").kernel().with(|r| r.rax = 0x0C).run());
    t.event("LDT entry 0", &code!("mov ds, eax").kernel().with(|r| r.rax = 0x04).run(), gp(4));
    t.event("beyond the LDT", &code!("mov ds, eax").kernel().with(|r| r.rax = 0x104).run(), gp(0x104));
}

/// LGDT and LIDT refuse a non-canonical base (SDM volume 2).
fn lgdt_lidt_canonical(t: &mut T) {
    if is_tcg() {
        return t.skip("QEMU's translator loads them and is lost");
    }
    for code in [code!("push rbx", "push rax", "lea rcx, [rsp + 6]"; "lgdt [rcx]"), code!("push rbx", "push rax", "lea rcx, [rsp + 6]"; "lidt [rcx]")] {
        t.fault("base", code, &code.kernel().with(|r| r.rbx = 1 << 47).run(), gp(0));
    }
}

/// MOV from a segment register: 16 bits to memory, zero-extended to a 32- or 64-bit register.
fn mov_from_segment(t: &mut T) {
    let ones = |r: &mut Regs| r.rax = u64::MAX;
    t.eq("mov eax, cs", code!("mov eax, cs").kernel().with(ones).run().regs.rax, KERNEL_CODE.into());
    t.eq("mov rax, cs", code!(".byte 0x48, 0x8C, 0xC8").kernel().with(ones).run().regs.rax, KERNEL_CODE.into());
    t.eq("mov ax, cs", code!(".byte 0x66, 0x8C, 0xC8").kernel().with(ones).run().regs.rax, !0xFFFF | u64::from(KERNEL_CODE));
    frame(0)[..8].fill(0xEE);
    t.runs("mov [rbx], cs", &code!(".byte 0x48, 0x8C, 0x0B").kernel().with(|r| r.rbx = physical(frame(0))));
    t.eq("two bytes", u64::from_le_bytes(frame(0)[..8].try_into().unwrap()), 0xEEEE_EEEE_EEEE_0000 | u64::from(KERNEL_CODE));
    let exit = t.runs("push fs, pop gs", &code!("push fs", "pop gs").kernel());
    t.eq("RSP", exit.regs.rsp, run::snippet_stack(0));
}

/// IRET in its 32-bit form from compatibility mode, and IRETQ to compatibility mode.
fn iret_compat(t: &mut T) {
    let target = code!(32: "mov edx, cs");
    let exit = t.runs("iretq to compatibility mode", &target.user32());
    t.eq("CS", exit.regs.rdx & 0xFFFF, USER_CODE32.into());
    let code = code!(32: "pushfd", "push ebx", "push eax"; "iretd");
    let regs = code.user32().with(|r| (r.rbx, r.rax) = (USER_CODE32.into(), target.start + USER_ALIAS));
    t.runs("iretd at level 3", &regs);
    t.fault("to an inner level", code, &regs.with(|r| r.rbx = 0x38).run(), gp(0x38));
}

/// Returning to an outer level empties data segments the outer level may not use (SDM volume 2, IRET).
fn iret_nulls_data_segments(t: &mut T) {
    let code = code!("mov ds, eax", "mov es, ebx", "push 0x23", "push rcx", "push 2", "push 0x2B", "push rdx"; "iretq");
    let target = code!("mov eax, ds", "mov ebx, es");
    let exit = t.runs("iretq", &code.kernel().with(|r| {
        r.rax = KERNEL_DATA.into();
        r.rbx = USER_DATA.into();
        r.rcx = run::snippet_stack(0) + USER_ALIAS;
        r.rdx = target.start + USER_ALIAS;
    }));
    t.eq("DS, DPL 0", exit.regs.rax, 0);
    t.eq("ES, DPL 3", exit.regs.rbx, USER_DATA.into());
}

/// POPF at level 3 leaves IOPL alone, and IF unless IOPL is 3 (SDM volume 2, POPF).
fn rflags_privilege(t: &mut T) {
    let code = code!("push rax", "popfq", "pushfq", "pop rbx");
    let all = flag::IOPL3 | flag::IF | flag::CF | flag::NT | flag::AC | 1 << 21;
    let user = code.user().with(|r| r.rax = all).run();
    t.eq("user", user.regs.rbx, all & !(flag::IOPL3 | flag::IF) | flag::FIXED);
    let user = code.user().with(|r| (r.rax, r.rflags) = (0, flag::IOPL3 | flag::FIXED)).run();
    t.eq("user cannot lower IOPL", user.regs.rbx, flag::IOPL3 | flag::FIXED);
    let kernel = code.kernel().with(|r| r.rax = all & !flag::IF | flag::RF | flag::VM | 3 << 19).run();
    t.eq("RF and VM are not taken, VIF and VIP cleared", kernel.regs.rbx, all & !flag::IF | flag::FIXED);
    let popf16 = code!("push rax", ".byte 0x66, 0x9D", "pushfq", "pop rbx").kernel().with(|r| (r.rax, r.rflags) = (0, flag::AC | flag::FIXED)).run();
    t.eq("16-bit POPF keeps the upper half", popf16.regs.rbx, flag::AC | flag::FIXED);
}
