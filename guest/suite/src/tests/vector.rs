//! Who may use x87, SSE and AVX, and what their state looks like (SDM volume 3, chapter 13; volume 1, chapters 8, 11 and 13).

use crate::cpu::{vector as v, *};
use crate::paging::frame;
use crate::run::Exit;
use crate::setup;
use crate::tap::*;
use crate::{code, tests};

tests![
    task_switched, emulation, wait_needs_both, osfxsr, avx_enables, vex_prefixes, alignment, unmasked_exceptions,
    mxcsr_reserved, x87_errors, fxsave_image, fxrstor_checks, xsave_alignment, xrstor_header, xsave_init, xsave_needs_osxsave,
];

/// Runs a snippet that begins with `mov cr0, rax`.
fn with_cr0(code: crate::run::Code, set: u64, clear: u64) -> Exit {
    let exit = code.kernel().with(|r| (r.rax, r.rbx) = (setup::CR0 | set & !clear, frame(0).as_ptr() as u64)).run();
    write_cr0(setup::CR0);
    exit
}

/// CR0.TS: #NM for x87, MMX, SSE; not for the instructions that do not touch the state (SDM table 13-1).
fn task_switched(t: &mut T) {
    for (what, code, want) in [
        ("fnop", code!("mov cr0, rax"; "fnop"), NM),
        ("fld1", code!("mov cr0, rax"; "fld1"), NM),
        ("emms", code!("mov cr0, rax"; "emms"), NM),
        ("movq mm0", code!("mov cr0, rax"; "movq mm0, rax"), NM),
        ("addps", code!("mov cr0, rax"; "addps xmm0, xmm0"), NM),
        ("ldmxcsr", code!("mov cr0, rax"; "ldmxcsr [rbx]"), NM),
        ("fxsave", code!("mov cr0, rax"; "fxsave [rbx]"), NM),
        ("fninit", code!("mov cr0, rax"; "fninit"), NM),
        ("wait, MP", code!("mov cr0, rax"; "wait"), NM),
        ("sfence", code!("mov cr0, rax"; "sfence"), DONE),
        ("prefetch", code!("mov cr0, rax"; "prefetcht0 [rbx]"), DONE),
        ("movnti", code!("mov cr0, rax"; "movnti [rbx], eax"), DONE),
        ("crc32", code!("mov cr0, rax"; "crc32 eax, eax"), DONE),
        ("popcnt", code!("mov cr0, rax"; "popcnt eax, eax"), DONE),
        ("clflush", code!("mov cr0, rax"; "clflush [rbx]"), DONE),
    ] {
        t.event(what, &with_cr0(code, cr0::TS, 0), want);
    }
}

/// CR0.EM: x87 is #NM, SSE and MMX are #UD.
fn emulation(t: &mut T) {
    for (what, code, want) in [
        ("fld1", code!("mov cr0, rax"; "fld1"), NM),
        ("fnstsw", code!("mov cr0, rax"; "fnstsw ax"), NM),
        ("emms", code!("mov cr0, rax"; "emms"), UD),
        ("addps", code!("mov cr0, rax"; "addps xmm0, xmm0"), UD),
        ("movaps, misaligned", code!("mov cr0, rax"; "movaps xmm0, [rbx + 1]"), UD),
        ("fxsave", code!("mov cr0, rax"; "fxsave [rbx]"), NM),
        ("wait", code!("mov cr0, rax"; "wait"), DONE),
    ] {
        t.event(what, &with_cr0(code, cr0::EM, 0), want);
        if want == UD {
            t.event("EM before TS", &with_cr0(code, cr0::EM | cr0::TS, 0), UD);
        }
    }
}

/// WAIT is #NM only with both MP and TS (SDM volume 2).
fn wait_needs_both(t: &mut T) {
    let code = code!("mov cr0, rax"; "wait");
    let run = |value: u64| {
        let exit = code.kernel().with(|r| r.rax = value).run();
        write_cr0(setup::CR0);
        exit
    };
    t.event("TS", &run(setup::CR0 & !cr0::MP | cr0::TS), DONE);
    t.event("MP", &run(setup::CR0), DONE);
    t.event("both", &run(setup::CR0 | cr0::TS), NM);
}

/// CR4.OSFXSR clear: SSE is #UD, FXSAVE is not.
fn osfxsr(t: &mut T) {
    let cr4 = read_cr4() & !cr4::OSFXSR;
    for (what, code, want) in [
        ("addps", code!("mov cr4, rax"; "addps xmm0, xmm0"), UD),
        ("movd xmm0", code!("mov cr4, rax"; "movd xmm0, eax"), UD),
        ("ldmxcsr", code!("mov cr4, rax"; "ldmxcsr [rbx]"), UD),
        ("movq mm0", code!("mov cr4, rax"; "movq mm0, rax"), DONE),
        ("fxsave", code!("mov cr4, rax"; "fxsave [rbx]"), DONE),
        ("sfence", code!("mov cr4, rax"; "sfence"), DONE),
        ("fld1", code!("mov cr4, rax"; "fld1"), DONE),
    ] {
        frame(0)[..4].copy_from_slice(&0x1F80u32.to_le_bytes());
        t.event(what, &code.kernel().with(|r| (r.rax, r.rbx) = (cr4, frame(0).as_ptr() as u64)).run(), want);
    }
}

/// VEX instructions need CR4.OSXSAVE and XCR0's SSE and AVX; TS makes them #NM after that (SDM volume 2, 2.4).
fn avx_enables(t: &mut T) {
    let code = code!("vaddps ymm0, ymm0, ymm0");
    if !Feature::AVX.present() {
        return t.faults("without the feature", code, UD);
    }
    t.runs("enabled", &code.kernel());
    xsetbv(3);
    t.faults("XCR0.AVX clear", code, UD);
    xsetbv(7);
    write_cr4(read_cr4() & !cr4::OSXSAVE);
    t.faults("OSXSAVE clear", code, UD);
    write_cr4(read_cr4() | cr4::OSXSAVE);
    let code = code!("mov cr0, rax"; "vaddps ymm0, ymm0, ymm0");
    t.event("TS", &with_cr0(code, cr0::TS, 0), NM);
    // EM and OSFXSR do not concern VEX (SDM volume 1, 14.5.1 speaks of XCR0 alone); XCR0 clear wins over TS.
    xsetbv(3);
    t.event("XCR0 before TS", &with_cr0(code, cr0::TS, 0), UD);
    xsetbv(7);
}

/// LOCK, 66, F2, F3 and REX before VEX are #UD; VEX in real and virtual-8086 mode is LES and LDS.
fn vex_prefixes(t: &mut T) {
    if !Feature::AVX.present() {
        return t.skip("no AVX");
    }
    for (what, code) in [
        ("lock", code!(".byte 0xF0, 0xC5, 0xFC, 0x58, 0xC0")),
        ("66", code!(".byte 0x66, 0xC5, 0xFC, 0x58, 0xC0")),
        ("f2", code!(".byte 0xF2, 0xC5, 0xFC, 0x58, 0xC0")),
        ("f3", code!(".byte 0xF3, 0xC5, 0xFC, 0x58, 0xC0")),
        ("rex", code!(".byte 0x48, 0xC5, 0xFC, 0x58, 0xC0")),
        ("vvvv used by a two-operand instruction", code!(".byte 0xC5, 0xF4, 0x28, 0xC1")),
        ("map 0", code!(".byte 0xC4, 0xE0, 0x7C, 0x58, 0xC0")),
    ] {
        t.faults(what, code, UD);
    }
}

/// Aligned moves and SSE memory operands are #GP(0) when misaligned; VEX arithmetic is not (SDM volume 1, 14.9).
fn alignment(t: &mut T) {
    let at = frame(0).as_ptr() as u64;
    for (what, code, aligned) in [
        ("movaps load", code!("movaps xmm0, [rbx]"), 16),
        ("movaps store", code!("movaps [rbx], xmm0"), 16),
        ("movdqa", code!("movdqa xmm0, [rbx]"), 16),
        ("movntps", code!("movntps [rbx], xmm0"), 16),
        ("addps", code!("addps xmm0, [rbx]"), 16),
        ("pxor", code!("pxor xmm0, [rbx]"), 16),
        ("pshufd", code!("pshufd xmm0, [rbx], 0"), 16),
        ("movups", code!("movups xmm0, [rbx]"), 1),
        ("addss", code!("addss xmm0, [rbx]"), 1),
        ("movlps", code!("movlps xmm0, [rbx]"), 1),
        ("lddqu", code!("lddqu xmm0, [rbx]"), 1),
        ("fxsave", code!("fxsave [rbx]"), 16),
        ("fxrstor", code!("fxrstor [rbx]"), 16),
    ] {
        if what == "fxrstor" {
            t.runs("fxsave", &code!("fxsave [rbx]").kernel().with(|r| r.rbx = at));
        }
        for offset in [1u64, 4, 8] {
            let exit = code.kernel().with(|r| r.rbx = at + offset).run();
            t.event(format_args!("{what} + {offset}"), &exit, if aligned == 16 { gp(0) } else { DONE });
        }
        t.runs(what, &code.kernel().with(|r| r.rbx = at));
    }
    if Feature::AVX.present() {
        for (what, code, want) in [
            ("vaddps ymm", code!("vaddps ymm0, ymm0, [rbx + 1]"), DONE),
            ("vmovaps ymm, 16", code!("vmovaps ymm0, [rbx + 16]"), gp(0)),
            ("vmovaps xmm, 8", code!("vmovaps xmm0, [rbx + 8]"), gp(0)),
            ("vmovntdqa", code!("vmovntdqa xmm0, [rbx + 8]"), gp(0)),
            ("vmovups ymm", code!("vmovups ymm0, [rbx + 1]"), DONE),
        ] {
            t.event(what, &code.kernel().with(|r| r.rbx = at).run(), want);
        }
    }
}

/// An unmasked SIMD exception is #XM, or #UD with CR4.OSXMMEXCPT clear; the register keeps its value.
fn unmasked_exceptions(t: &mut T) {
    let code = code!("ldmxcsr [rbx]", "xorps xmm0, xmm0", "pcmpeqd xmm1, xmm1", "psrld xmm1, 25", "pslld xmm1, 23"; "divps xmm1, xmm0");
    frame(0)[..4].copy_from_slice(&0x1D80u32.to_le_bytes()); // divide-by-zero unmasked
    let at = frame(0).as_ptr() as u64;
    t.fault("#XM", code, &code.kernel().with(|r| r.rbx = at).run(), plain(v::XM));
    let read = code!("stmxcsr [rbx]");
    t.runs("stmxcsr", &read.kernel().with(|r| r.rbx = at));
    t.eq("ZE", u32::from_le_bytes(frame(0)[..4].try_into().unwrap()), 0x1D84);
    frame(0)[..4].copy_from_slice(&0x1D80u32.to_le_bytes());
    write_cr4(read_cr4() & !cr4::OSXMMEXCPT);
    t.fault("OSXMMEXCPT clear", code, &code.kernel().with(|r| r.rbx = at).run(), UD);
    write_cr4(read_cr4() | cr4::OSXMMEXCPT);
    // LDMXCSR with a flag set and unmasked raises nothing.
    frame(0)[..4].copy_from_slice(&0x1D84u32.to_le_bytes());
    t.runs("flag already set", &code!("ldmxcsr [rbx]", "xorps xmm0, xmm0").kernel().with(|r| r.rbx = at));
}

/// MXCSR's reserved bits are #GP(0) (SDM volume 1, 10.2.3).
fn mxcsr_reserved(t: &mut T) {
    let code = code!("ldmxcsr [rbx]");
    let at = frame(0).as_ptr() as u64;
    for bit in 16..32u32 {
        if bit == 17 {
            continue; // AMD's misaligned-SSE mode
        }
        frame(0)[..4].copy_from_slice(&(0x1F80u32 | 1 << bit).to_le_bytes());
        t.fault("reserved bit", code, &code.kernel().with(|r| r.rbx = at).run(), gp(0));
    }
    frame(0)[..4].copy_from_slice(&0xFFBFu32.to_le_bytes());
    t.runs("all others", &code.kernel().with(|r| r.rbx = at));
}

/// #MF waits for the next waiting instruction (SDM volume 1, 8.7).
fn x87_errors(t: &mut T) {
    // Divide-by-zero unmasked; 1 / 0.
    let code = code!("fninit", "push 0x37B", "fldcw [rsp]", "fldz", "fld1", "fdivrp", "nop"; "wait");
    t.fault("wait", code, &code.kernel().run(), plain(v::MF));
    let code = code!("fninit", "push 0x37B", "fldcw [rsp]", "fldz", "fld1", "fdivrp"; "fld1");
    t.fault("fld1", code, &code.kernel().run(), plain(v::MF));
    let code = code!("fninit", "push 0x37B", "fldcw [rsp]", "fldz", "fld1", "fdivrp", "fnstsw ax", "fnclex", "wait");
    let exit = t.runs("fnstsw, fnclex", &code.kernel());
    t.eq("ES, ZE, B", exit.regs.rax & 0x8084, 0x8084);
    t.runs("fninit", &code!("fninit").kernel());
    // Unmasking a pending flag.
    let code = code!("fninit", "fldz", "fld1", "fdivrp", "push 0x37B", "fldcw [rsp]"; "wait");
    t.fault("unmasked later", code, &code.kernel().run(), plain(v::MF));
    t.runs("fninit", &code!("fninit").kernel());
}

/// FXSAVE's layout: control words, abridged tag, MXCSR and its mask (SDM volume 1, 10.5.1).
fn fxsave_image(t: &mut T) {
    let at = frame(0).as_ptr() as u64;
    frame(0).fill(0xEE);
    t.runs("fxsave", &code!("fninit", "fld1", "movq xmm15, rbx", ".byte 0x48", "fxsave [rbx]").kernel().with(|r| r.rbx = at));
    let word = |o: usize| u16::from_le_bytes(frame(0)[o..o + 2].try_into().unwrap());
    t.eq("FCW", word(0), 0x37F);
    t.eq("FSW: TOP 7", word(2), 0x3800);
    t.eq("abridged FTW", frame(0)[4], 0x80);
    t.eq("MXCSR", word(24), 0x1F80);
    t.is("MXCSR_MASK", word(28) & 0xFFBF == 0xFFBF);
    t.eq("ST0's exponent", word(40), 0x3FFF);
    t.eq("XMM15", u64::from_le_bytes(frame(0)[400..408].try_into().unwrap()), at);
    t.eq("the last 48 bytes are software's", frame(0)[464], 0xEE);
    t.runs("fninit", &code!("fninit").kernel());
}

/// FXRSTOR with a reserved MXCSR bit is #GP(0).
fn fxrstor_checks(t: &mut T) {
    let at = frame(0).as_ptr() as u64;
    t.runs("fxsave", &code!("fxsave [rbx]").kernel().with(|r| r.rbx = at));
    frame(0)[26] = 4;
    let code = code!("fxrstor [rbx]");
    t.fault("MXCSR bit 18", code, &code.kernel().with(|r| r.rbx = at).run(), gp(0));
    frame(0)[26] = 0;
    t.runs("fxrstor", &code.kernel().with(|r| r.rbx = at));
}

/// Runs an XSAVE-family snippet on frame 0 plus `offset`, with requested features in EDX:EAX.
fn xsave_run(code: crate::run::Code, offset: u64, mask: u64) -> Exit {
    code.kernel().with(|r| (r.rbx, r.rax, r.rdx) = (frame(0).as_ptr() as u64 + offset, mask & 0xFFFF_FFFF, mask >> 32)).run()
}

/// The area must be aligned to 64 bytes.
fn xsave_alignment(t: &mut T) {
    if !Feature::XSAVE.present() {
        return t.skip("no XSAVE");
    }
    for (what, code) in [("xsave", code!("xsave [rbx]")), ("xrstor", code!("xrstor [rbx]"))] {
        for offset in [1, 8, 16, 32] {
            t.fault(what, code, &xsave_run(code, offset, 7), gp(0));
        }
    }
    frame(0).fill(0);
    t.done("xsave", &xsave_run(code!("xsave [rbx]"), 64, 7));
    t.done("xrstor", &xsave_run(code!("xrstor [rbx]"), 64, 7));
}

/// XRSTOR's header: XSTATE_BV within XCR0, the rest zero (SDM volume 1, 13.8.1).
fn xrstor_header(t: &mut T) {
    if !Feature::XSAVE.present() {
        return t.skip("no XSAVE");
    }
    let code = code!("xrstor [rbx]");
    for (what, byte, value) in [
        ("XSTATE_BV bit 9", 513usize, 2u8),
        ("XSTATE_BV bit 63", 519, 0x80),
        ("XCOMP_BV", 520, 1),
        ("reserved byte", 528, 1),
        ("reserved byte", 535, 1),
    ] {
        frame(0).fill(0);
        t.done("xsave", &xsave_run(code!("xsave [rbx]"), 0, 7));
        frame(0)[byte] = value;
        t.fault(what, code, &xsave_run(code, 0, 7), gp(0));
    }
    frame(0).fill(0);
    t.done("xsave", &xsave_run(code!("xsave [rbx]"), 0, 7));
    frame(0)[27] = 1;
    t.fault("reserved bit of MXCSR", code, &xsave_run(code, 0, 2), gp(0));
}

/// A component whose XSTATE_BV bit is clear goes to its initial state.
fn xsave_init(t: &mut T) {
    if !Feature::XSAVE.present() {
        return t.skip("no XSAVE");
    }
    frame(0).fill(0);
    frame(0)[24..28].copy_from_slice(&0x1F80u32.to_le_bytes());
    let code = code!("pcmpeqd xmm3, xmm3", "xrstor [rbx]", "movq r8, xmm3");
    t.eq("XMM3", xsave_run(code, 0, 7).regs.r8, 0);
    let keep = code!("pcmpeqd xmm3, xmm3", "xrstor [rbx]", "movq r8, xmm3");
    t.eq("not asked for", xsave_run(keep, 0, 1).regs.r8, u64::MAX);
    // XSAVE writes the components asked for and leaves others' XSTATE_BV bits as they were.
    frame(0).fill(0);
    frame(0)[512] = 4;
    t.done("xsave", &xsave_run(code!("fld1", "xsave [rbx]", "fninit"), 0, 1));
    t.eq("XSTATE_BV", frame(0)[512], 5);
}

/// Without CR4.OSXSAVE these are #UD; with CR0.TS #NM.
fn xsave_needs_osxsave(t: &mut T) {
    if !Feature::XSAVE.present() {
        return t.skip("no XSAVE");
    }
    write_cr4(read_cr4() & !cr4::OSXSAVE);
    t.event("xsave", &xsave_run(code!("xsave [rbx]"), 0, 7), UD);
    t.event("xrstor", &xsave_run(code!("xrstor [rbx]"), 0, 7), UD);
    write_cr4(read_cr4() | cr4::OSXSAVE);
    let code = code!("mov cr0, rax"; "xsave [rbx]");
    t.event("TS", &with_cr0(code, cr0::TS, 0), NM);
}
