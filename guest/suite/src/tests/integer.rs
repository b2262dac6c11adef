//! Corners of integer instructions: flags, counts, widths, atomics (SDM volume 2).

use crate::cpu::{flag, *};
use crate::paging::{TEST_VA, Window, frame, physical, pte};
use crate::run::Code;
use crate::tap::*;
use crate::{code, tests};

tests![
    shifts_of_zero, shift_flags, rotates, double_shifts, bit_scans, bit_tests, multiply, bcd, cmpxchg, cmpxchg8b, cmpxchg16b,
    xadd_and_xchg, strings, string_sizes, partial_registers, movbe, crc32, adx, bmi, enter_leave, flags_to_ah, loops, page_crossing_data,
];

const STATUS: u64 = flag::STATUS;

/// Runs with RAX, RCX, RDX and flags; returns RAX and the status flags.
fn op(code: Code, rax: u64, rcx: u64, rdx: u64, flags: u64) -> (u64, u64) {
    let exit = code.kernel().with(|r| (r.rax, r.rcx, r.rdx, r.rflags) = (rax, rcx, rdx, flags | flag::FIXED)).run();
    (exit.regs.rax, exit.regs.rflags & STATUS)
}

/// A masked count of zero changes no flag.
fn shifts_of_zero(t: &mut T) {
    for (what, code, count) in [
        ("shl al", code!("shl al, cl"), 32u64),
        ("shr ax", code!("shr ax, cl"), 0),
        ("sar eax", code!("sar eax, cl"), 64),
        ("rol eax", code!("rol eax, cl"), 32),
        ("ror rax", code!("ror rax, cl"), 64),
        ("rcl rax", code!("rcl rax, cl"), 128),
        ("shld eax", code!("shld eax, edx, cl"), 32),
        ("shrd rax", code!("shrd rax, rdx, cl"), 64),
    ] {
        for flags in [0, STATUS] {
            t.same(what, op(code, 0x7FFF_0001, count, 1, flags), (0x7FFF_0001, flags));
        }
    }
    // A 32-bit operation with a count of zero still clears the upper half.
    t.eq("shl eax, 0", op(code!("shl eax, cl"), u64::MAX, 0, 0, 0).0, 0xFFFF_FFFF);
}

/// Defined flags of shifts by one, and results of counts beyond the width of a byte.
fn shift_flags(t: &mut T) {
    let mask = flag::CF | flag::OF | flag::ZF | flag::SF | flag::PF;
    for (what, code, rax, rcx, want, flags) in [
        ("shl 0x80, 1", code!("shl al, 1"), 0x80u64, 0, 0u64, flag::CF | flag::OF | flag::ZF | flag::PF),
        ("shl 0x40, 1", code!("shl al, 1"), 0x40, 0, 0x80, flag::OF | flag::SF),
        ("shr 0x81, 1", code!("shr al, 1"), 0x81, 0, 0x40, flag::CF | flag::OF),
        ("sar 0x81, 1", code!("sar al, 1"), 0x81, 0, 0xC0, flag::CF | flag::SF | flag::PF),
    ] {
        let (result, got) = op(code, rax, rcx, 0, 0);
        t.eq(what, result, want);
        t.eq(what, got & mask, flags);
    }
    t.eq("shl al, 9", op(code!("shl al, cl"), 0xFF, 9, 0, 0).0, 0);
    t.eq("sar al, 31", op(code!("sar al, cl"), 0x80, 31, 0, 0).0, 0xFF);
    t.eq("shl rax, 63", op(code!("shl rax, cl"), 1, 63, 0, 0).0, 1 << 63);
    t.eq("shr eax, 33 is 1", op(code!("shr eax, cl"), 4, 33, 0, 0).0, 2);
}

/// Rotates touch CF and OF only; RCL and RCR of bytes and words go round modulo 9 and 17.
fn rotates(t: &mut T) {
    let others = flag::ZF | flag::SF | flag::PF | flag::AF;
    for (what, code, rax, rcx, flags, want, cf) in [
        ("rol al, 8", code!("rol al, cl"), 0x81u64, 8u64, 0, 0x81u64, 1u64),
        ("ror al, 8", code!("ror al, cl"), 0x81, 8, 0, 0x81, 1),
        ("rcl al, 9", code!("rcl al, cl"), 0x55, 9, 1, 0x55, 1),
        ("rcr ax, 17", code!("rcr ax, cl"), 0x5555, 17, 0, 0x5555, 0),
        ("rcl al, 10", code!("rcl al, cl"), 0x80, 10, 1, 0x01, 1),
        ("rcr eax, 1", code!("rcr eax, 1"), 0, 0, 1, 0x8000_0000, 0),
    ] {
        let (result, got) = op(code, rax, rcx, 0, flags | others);
        t.eq(what, result, want);
        t.eq(what, got & flag::CF, cf);
        t.eq(what, got & others, others);
    }
}

/// SHLD and SHRD.
fn double_shifts(t: &mut T) {
    for (what, code, rax, rcx, rdx, want) in [
        ("shld eax, 8", code!("shld eax, edx, 8"), 0x1234_5678u64, 0, 0xABCD_EF01u64, 0x3456_78ABu64),
        ("shrd eax, 8", code!("shrd eax, edx, 8"), 0x1234_5678, 0, 0xABCD_EF01, 0x0112_3456),
        ("shld rax, cl", code!("shld rax, rdx, cl"), 1, 4, 0xF << 60, 0x1F),
        ("shrd rax, cl", code!("shrd rax, rdx, cl"), 0x10, 4, 0xF, 0xF << 60 | 1),
    ] {
        t.eq(what, op(code, rax, rcx, rdx, 0).0, want);
    }
    t.eq("CF is the last bit out", op(code!("shld eax, edx, 1"), 0x8000_0000, 0, 0, 0).1 & flag::CF, flag::CF);
}

/// BSF and BSR of zero set ZF; the destination is unchanged on every processor there is (APM says so).
fn bit_scans(t: &mut T) {
    for (what, code, source, want, zf) in [
        ("bsf", code!("bsf rax, rcx"), 0x100u64, 8u64, 0u64),
        ("bsr", code!("bsr rax, rcx"), 0x100, 8, 0),
        ("bsf, zero", code!("bsf rax, rcx"), 0, 0x55, flag::ZF),
        ("bsr, zero", code!("bsr rax, rcx"), 0, 0x55, flag::ZF),
    ] {
        let (result, flags) = op(code, 0x55, source, 0, 0);
        t.eq(what, result, want);
        t.eq(what, flags & flag::ZF, zf);
    }
    for (what, code, source, want) in [("tzcnt", code!("tzcnt rax, rcx"), 0u64, 64u64), ("popcnt", code!("popcnt rax, rcx"), u64::MAX, 64)] {
        t.eq(what, op(code, 1, source, 0, 0).0, want);
    }
}

/// BT with a register index on memory reaches any bit, negative ones too; with an immediate it is taken modulo the width.
fn bit_tests(t: &mut T) {
    let page = frame(0);
    page.fill(0);
    page[2047] = 0x80;
    page[2056] = 0x01;
    let at = page.as_ptr() as u64 + 2048;
    let cf = |code: Code, rax: u64| code.kernel().with(|r| (r.rbx, r.rax) = (at, rax)).run().regs.rflags & flag::CF;
    t.eq("bt [rbx], -1", cf(code!("bt qword ptr [rbx], rax"), u64::MAX), 1);
    t.eq("bt [rbx], 64", cf(code!("bt dword ptr [rbx], eax"), 64), 1);
    t.eq("bt word, -1", cf(code!("bt word ptr [rbx], ax"), 0xFFFF), 1);
    t.eq("bt imm 64 is 0", cf(code!("bt dword ptr [rbx + 8], 64"), 0), 1);
    t.eq("bts eax, 33 is 1", op(code!("bts eax, ecx"), 0, 33, 0, 0).0, 2);
    t.eq("btc rax, 65 is 1", op(code!("btc rax, rcx"), 2, 65, 0, 0).0, 0);
}

/// MUL and IMUL set CF and OF when the upper half matters.
fn multiply(t: &mut T) {
    let both = flag::CF | flag::OF;
    for (what, code, rax, rcx, want, flags) in [
        ("mul cl, 15 * 17", code!("mul cl"), 15u64, 17u64, 255u64, 0),
        ("mul cl, 16 * 16", code!("mul cl"), 16, 16, 256, both),
        ("imul cl, -1 * 1", code!("imul cl"), 0xFF, 1, 0xFFFF, 0),
        ("imul cl, -128 * -1", code!("imul cl"), 0x80, 0xFF, 0x80, both),
        ("imul ax, cx", code!("imul ax, cx"), 0x4000, 2, 0x8000, both),
        ("imul eax, ecx", code!("imul eax, ecx"), 0xFFFF_FFFF, 0xFFFF_FFFF, 1, 0),
        ("imul eax, ecx, -3", code!("imul eax, ecx, -3"), 0, 5, 0xFFFF_FFF1, 0),
    ] {
        let (result, got) = op(code, rax, rcx, 0, 0);
        t.eq(what, result, want);
        t.eq(what, got & both, flags);
    }
}

/// The decimal adjustments, in compatibility mode.
fn bcd(t: &mut T) {
    for (what, code, rax, flags, want, mask, want_flags) in [
        ("daa", code!(32: "daa"), 0x9Au64, 0u64, 0x00u64, flag::CF | flag::AF | flag::ZF, flag::CF | flag::AF | flag::ZF),
        ("daa, AF", code!(32: "daa"), 0x11, flag::AF, 0x17, flag::CF | flag::AF, flag::AF),
        ("das", code!(32: "das"), 0x00, flag::CF, 0xA0, flag::CF, flag::CF),
        ("das, AF", code!(32: "das"), 0x0F, flag::AF, 0x09, flag::CF | flag::AF, flag::AF),
        ("aaa", code!(32: "aaa"), 0x0B, 0, 0x0101, flag::CF | flag::AF, flag::CF | flag::AF),
        ("aaa, nothing to do", code!(32: "aaa"), 0x25, 0, 0x05, flag::CF | flag::AF, 0),
        ("aas", code!(32: "aas"), 0x020B, 0, 0x0105, flag::CF | flag::AF, flag::CF | flag::AF),
        ("aam", code!(32: "aam"), 0x3F, 0, 0x0603, flag::ZF | flag::SF, 0),
        ("aam 16", code!(32: ".byte 0xD4, 16"), 0x3F, 0, 0x030F, flag::ZF, 0),
        ("aad", code!(32: "aad"), 0x0603, 0, 0x3F, flag::ZF, 0),
    ] {
        let exit = code.user32().with(|r| (r.rax, r.rflags) = (rax, flags | flag::FIXED)).run();
        t.done(what, &exit);
        t.eq(what, exit.regs.rax & 0xFFFF, want);
        t.eq(what, exit.regs.rflags & mask, want_flags);
    }
}

/// CMPXCHG writes the destination back either way; a 32-bit one that fails loads EAX and clears RAX's upper half.
fn cmpxchg(t: &mut T) {
    let code = code!("cmpxchg edx, ecx", "mov r8, rdx");
    let run = |rax: u64, rdx: u64| code.kernel().with(|r| (r.rax, r.rcx, r.rdx) = (rax, 9, rdx)).run().regs;
    let equal = run(5, 5);
    t.eq("equal: destination", equal.r8, 9);
    t.eq("equal: ZF", equal.rflags & flag::ZF, flag::ZF);
    let unequal = run(0xFFFF_FFFF_0000_0004, 5);
    t.eq("unequal: destination", unequal.r8, 5);
    t.eq("unequal: RAX", unequal.rax, 5);
    t.eq("unequal: ZF", unequal.rflags & flag::ZF, 0);
}

/// CMPXCHG8B: ZF alone among the flags, EDX:EAX loaded when unequal.
fn cmpxchg8b(t: &mut T) {
    let page = frame(0);
    page[..8].copy_from_slice(&0x1111_1111_2222_2222u64.to_le_bytes());
    let code = code!("lock cmpxchg8b [rsi]");
    let regs = code.kernel().with(|r| (r.rsi, r.rax, r.rdx, r.rbx, r.rcx, r.rflags) = (physical(page), 1, 2, 3, 4, STATUS | flag::FIXED));
    let exit = t.runs("unequal", &regs);
    t.eq("EDX:EAX", exit.regs.rdx << 32 | exit.regs.rax, 0x1111_1111_2222_2222);
    t.eq("flags", exit.regs.rflags & STATUS, STATUS & !flag::ZF);
    let exit = t.runs("equal", &regs.with(|r| (r.rax, r.rdx, r.rflags) = (0x2222_2222, 0x1111_1111, flag::FIXED)));
    t.eq("flags", exit.regs.rflags & STATUS, flag::ZF);
    t.eq("memory", u64::from_le_bytes(frame(0)[..8].try_into().unwrap()), 0x0000_0004_0000_0003);
    t.runs("misaligned is fine", &regs.with(|r| r.rsi += 3));
}

/// CMPXCHG16B needs 16-byte alignment, #GP(0).
fn cmpxchg16b(t: &mut T) {
    let code = code!("lock cmpxchg16b [rsi]");
    if !Feature::CX16.present() {
        return t.faults("without the feature", code, UD);
    }
    let page = frame(0);
    page[..16].fill(0x11);
    let regs = code.kernel().with(|r| (r.rsi, r.rax, r.rdx, r.rbx, r.rcx) = (physical(page), 1, 2, 3, 4));
    let exit = t.runs("unequal", &regs);
    t.same("RDX:RAX", (exit.regs.rax, exit.regs.rdx), (0x1111_1111_1111_1111, 0x1111_1111_1111_1111));
    let exit = t.runs("equal", &exit.regs.with(|r| r.rip = code.start));
    t.eq("ZF", exit.regs.rflags & flag::ZF, flag::ZF);
    t.eq("memory", u64::from_le_bytes(frame(0)[8..16].try_into().unwrap()), 4);
    for offset in [1, 4, 8] {
        t.fault("misaligned", code, &regs.with(|r| r.rsi += offset).run(), gp(0));
    }
}

/// XADD and XCHG.
fn xadd_and_xchg(t: &mut T) {
    let exit = code!("xadd rax, rcx").kernel().with(|r| (r.rax, r.rcx) = (5, 7)).run();
    t.same("xadd", (exit.regs.rax, exit.regs.rcx), (12, 5));
    t.eq("xadd rax, rax", code!("xadd rax, rax").kernel().with(|r| r.rax = 5).run().regs.rax, 10);
    let exit = code!("xchg eax, ecx").kernel().with(|r| (r.rax, r.rcx) = (u64::MAX, 7)).run();
    t.same("xchg eax, ecx", (exit.regs.rax, exit.regs.rcx), (7, 0xFFFF_FFFF));
    // 90 is NOP, not XCHG EAX, EAX: it does not clear the upper half; 41 90 is XCHG R8D, EAX.
    t.eq("nop", code!(".byte 0x90").kernel().with(|r| r.rax = u64::MAX).run().regs.rax, u64::MAX);
    t.eq("xchg r8d, eax", code!(".byte 0x41, 0x90").kernel().with(|r| (r.rax, r.r8) = (1, 2)).run().regs.rax, 2);
}

/// Direction, repetition, termination.
fn strings(t: &mut T) {
    let page = frame(0);
    for (i, byte) in page.iter_mut().enumerate() {
        *byte = i as u8;
    }
    let at = physical(page);
    let regs = |code: Code, count: u64| code.kernel().with(|r| (r.rsi, r.rdi, r.rcx) = (at + 16, at + 64, count));
    let exit = t.runs("rep movsq", &regs(code!("rep movsq"), 2));
    t.same("RSI, RDI, RCX", (exit.regs.rsi, exit.regs.rdi, exit.regs.rcx), (at + 32, at + 80, 0));
    t.eq("copied", frame(0)[79], 31);
    let exit = t.runs("std; movsw", &regs(code!("std", "movsw", "cld"), 1));
    t.same("RSI, RDI", (exit.regs.rsi, exit.regs.rdi), (at + 14, at + 62));
    let exit = t.runs("overlap", &code!("rep movsb").kernel().with(|r| (r.rsi, r.rdi, r.rcx) = (at, at + 1, 8)));
    t.eq("propagates the first byte", frame(0)[8], 0);
    t.eq("RCX", exit.regs.rcx, 0);
    let exit = t.runs("repne scasb", &code!("repne scasb").kernel().with(|r| (r.rdi, r.rcx, r.rax) = (at + 200, 100, 205)));
    t.same("found", (exit.regs.rdi, exit.regs.rcx, exit.regs.rflags & flag::ZF), (at + 206, 94, flag::ZF));
    let exit = t.runs("repe cmpsb", &code!("repe cmpsb").kernel().with(|r| (r.rsi, r.rdi, r.rcx) = (at + 20, at + 21, 50)));
    t.same("differs at once", (exit.regs.rcx, exit.regs.rflags & flag::ZF), (49, 0));
    let exit = t.runs("rep lodsb", &regs(code!("rep lodsb"), 4));
    t.eq("AL", exit.regs.rax & 0xFF, 19);
    // Flags of a comparison that does not happen stay.
    let exit = t.runs("repe cmpsb, count 0", &regs(code!("repe cmpsb"), 0).with(|r| r.rflags |= STATUS));
    t.eq("flags", exit.regs.rflags & STATUS, STATUS);
    // With 67 the count is ECX and the pointers ESI and EDI.
    let exit = t.runs("addr32 rep stosb", &code!(".byte 0x67", "rep stosb").kernel().with(|r| (r.rdi, r.rcx) = (at | 5 << 32, 2 | 7 << 32)));
    t.same("RDI, RCX", (exit.regs.rdi, exit.regs.rcx), (at + 2, 0));
}

/// A string instruction that faults midway leaves its registers at the iteration that faulted.
fn string_sizes(t: &mut T) {
    let window = Window::new();
    window.set_page(1, 0);
    let code = code!("rep stosq");
    let exit = code.kernel().with(|r| (r.rdi, r.rcx, r.rax) = (TEST_VA + 4096 - 24, 10, u64::MAX)).run();
    t.fault("rep stosq into a missing page", code, &exit, pf(2));
    t.same("RDI, RCX", (exit.regs.rdi, exit.regs.rcx), (TEST_VA + 4096, 7));
    window.set_page(1, physical(frame(1)) | pte::ALL);
    let exit = t.runs("resumed", &exit.regs);
    t.eq("RCX", exit.regs.rcx, 0);
    window.set_page(0, physical(frame(0)) | pte::P);
    let code = code!("rep movsb");
    let exit = code.kernel().with(|r| (r.rsi, r.rdi, r.rcx) = (TEST_VA, TEST_VA + 4090 + 6, 4)).run();
    t.done("copy out of a read-only page", &exit);
    let exit = code.kernel().with(|r| (r.rsi, r.rdi, r.rcx) = (TEST_VA + 4096, TEST_VA, 4)).run();
    t.fault("copy into a read-only page", code, &exit, pf(3));
    t.eq("RCX", exit.regs.rcx, 4);
}

/// 8- and 16-bit results keep the rest of the register, 32-bit ones clear it.
fn partial_registers(t: &mut T) {
    for (what, code, want) in [
        ("mov al", code!("mov al, 1"), 0xFFFF_FFFF_FFFF_FF01u64),
        ("mov ah", code!("mov ah, 1"), 0xFFFF_FFFF_FFFF_01FF),
        ("mov ax", code!("mov ax, 1"), 0xFFFF_FFFF_FFFF_0001),
        ("mov eax", code!("mov eax, 1"), 1),
        ("mov rax, sign-extended", code!("mov rax, -1"), u64::MAX),
        ("inc eax", code!("inc eax"), 0),
        ("cmovne, not taken", code!("cmp eax, eax", "cmovne eax, ecx"), 0xFFFF_FFFF),
        ("movsx eax", code!("movsx eax, al"), 0xFFFF_FFFF),
        ("cwde", code!("cwde"), 0xFFFF_FFFF),
        ("cbw", code!("cbw"), u64::MAX),
        ("bswap eax", code!("mov eax, 0x11223344", "bswap eax"), 0x4433_2211),
    ] {
        t.eq(what, op(code, u64::MAX, 0, 0, 0).0, want);
    }
}

/// MOVBE.
fn movbe(t: &mut T) {
    let code = code!("movbe rax, [rbx]");
    if !Feature::MOVBE.present() {
        return t.faults("without the feature", code, UD);
    }
    frame(0)[..8].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8]);
    let at = physical(frame(0));
    t.eq("64", code.kernel().with(|r| r.rbx = at).run().regs.rax, 0x0102_0304_0506_0708);
    t.eq("32", code!("movbe eax, [rbx]").kernel().with(|r| r.rbx = at).run().regs.rax, 0x0102_0304);
    t.eq("16", code!("movbe ax, [rbx]").kernel().with(|r| r.rbx = at).run().regs.rax, 0x0102);
    t.faults("register form", code!(".byte 0x0F, 0x38, 0xF0, 0xC0"), UD);
}

/// CRC32 is that of iSCSI: the check value of "123456789" is E3069283 (RFC 3720).
fn crc32(t: &mut T) {
    let code = code!("2: crc32 eax, byte ptr [rbx]", "inc rbx", "dec ecx", "jnz 2b", "not eax");
    if !Feature::SSE42.present() {
        return t.skip("no SSE4.2");
    }
    frame(0)[..9].copy_from_slice(b"123456789");
    let exit = code.kernel().with(|r| (r.rbx, r.rcx, r.rax) = (physical(frame(0)), 9, 0xFFFF_FFFF)).run();
    t.eq("check value", exit.regs.rax, 0xE306_9283);
}

/// ADCX uses and sets CF alone, ADOX OF alone.
fn adx(t: &mut T) {
    if !Feature::ADX.present() {
        return t.skip("no ADX");
    }
    t.same("adcx", op(code!("adcx rax, rcx"), u64::MAX, 0, 0, STATUS), (0, STATUS));
    t.same("adcx, no carry", op(code!("adcx rax, rcx"), 1, 1, 0, STATUS & !flag::CF), (2, STATUS & !flag::CF));
    t.same("adox", op(code!("adox rax, rcx"), u64::MAX, 1, 0, 0), (0, flag::OF));
}

/// BMI by known answers.
fn bmi(t: &mut T) {
    if !Feature::BMI1.present() || !Feature::BMI2.present() {
        return t.skip("no BMI");
    }
    for (what, code, rax, rcx, rdx, want) in [
        ("andn", code!("andn rax, rcx, rdx"), 0u64, 0xF0u64, 0xFFu64, 0x0Fu64),
        ("bextr", code!("bextr rax, rcx, rdx"), 0, 0xABCD, 0x0804, 0xBC),
        ("blsi", code!("blsi rax, rcx"), 0, 0x68, 0, 0x08),
        ("blsr", code!("blsr rax, rcx"), 0, 0x68, 0, 0x60),
        ("blsmsk", code!("blsmsk rax, rcx"), 0, 0x68, 0, 0x0F),
        ("bzhi", code!("bzhi rax, rcx, rdx"), 0, 0xFFFF, 4, 0xF),
        ("bzhi, large index", code!("bzhi rax, rcx, rdx"), 0, 0xFFFF, 64, 0xFFFF),
        ("pdep", code!("pdep rax, rcx, rdx"), 0, 0b101, 0xF0F0, 0b0101_0000),
        ("pext", code!("pext rax, rcx, rdx"), 0, 0xABCD, 0xF0F0, 0xAC),
        ("rorx", code!("rorx rax, rcx, 4"), 0, 0xF, 0, 0xF << 60),
        ("sarx", code!("sarx rax, rcx, rdx"), 0, 1 << 63, 63, u64::MAX),
        ("shlx, count 64", code!("shlx rax, rcx, rdx"), 0, 1, 64, 1),
    ] {
        t.eq(what, op(code, rax, rcx, rdx, 0).0, want);
    }
    let exit = code!("mulx rbx, rax, rcx").kernel().with(|r| (r.rdx, r.rcx, r.rflags) = (u64::MAX, u64::MAX, STATUS | flag::FIXED)).run();
    t.same("mulx", (exit.regs.rbx, exit.regs.rax, exit.regs.rflags & STATUS), (u64::MAX - 1, 1, STATUS));
}

/// ENTER with nesting copies frame pointers; LEAVE undoes it.
fn enter_leave(t: &mut T) {
    let exit = t.runs("enter 16, 0", &code!("mov rbx, rsp", "enter 16, 0", "mov rcx, rsp", "mov rdx, rbp", "leave").kernel().with(|r| r.rbp = 0x77));
    t.eq("RBP in the frame", exit.regs.rbx - exit.regs.rdx, 8);
    t.eq("space", exit.regs.rdx - exit.regs.rcx, 16);
    t.eq("RBP restored", exit.regs.rbp, 0x77);
    let exit = t.runs("enter 0, 2", &code!("mov rbp, rsp", "mov rbx, rsp", "enter 0, 2", "mov rcx, rsp", "leave").kernel());
    t.eq("three quadwords", exit.regs.rbx - exit.regs.rcx, 24);
}

/// LAHF and SAHF.
fn flags_to_ah(t: &mut T) {
    let exit = t.runs("lahf", &code!("lahf").kernel().with(|r| r.rflags |= STATUS));
    t.eq("AH", exit.regs.rax >> 8 & 0xFF, 0xD7);
    let exit = t.runs("sahf", &code!("sahf").kernel().with(|r| r.rax = 0xFF00));
    t.eq("flags", exit.regs.rflags & STATUS, STATUS & !flag::OF);
}

/// LOOP and JRCXZ in both address sizes.
fn loops(t: &mut T) {
    let exit = t.runs("loop", &code!("2: inc rax", "loop 2b").kernel().with(|r| r.rcx = 3));
    t.same("RAX, RCX", (exit.regs.rax, exit.regs.rcx), (3, 0));
    let exit = t.runs("addr32 loop", &code!("2: inc rax", ".byte 0x67", "loop 2b").kernel().with(|r| r.rcx = 2 | 9 << 32));
    t.eq("ECX alone counts", exit.regs.rax, 2);
    let exit = t.runs("jecxz", &code!(".byte 0x67, 0xE3, 3", "mov al, 1", "nop").kernel().with(|r| r.rcx = 9 << 32));
    t.eq("taken", exit.regs.rax, 0);
}

/// Data that crosses pages mapped to frames in the opposite order.
fn page_crossing_data(t: &mut T) {
    let window = Window::new();
    window.set_page(0, physical(frame(1)) | pte::ALL);
    window.set_page(1, physical(frame(0)) | pte::ALL);
    let at = TEST_VA + 4096 - 3;
    let store = code!("mov [rbx], rax", "mov rcx, [rbx]", "lock add qword ptr [rbx], 1", "mov rdx, [rbx]");
    let exit = t.runs("store, load, locked add", &store.kernel().with(|r| (r.rbx, r.rax) = (at, 0x1122_3344_55FF_FFFF)));
    t.same("values", (exit.regs.rcx, exit.regs.rdx), (0x1122_3344_55FF_FFFF, 0x1122_3344_5600_0000));
    t.same("frames", (frame(1)[4093], frame(0)[0], frame(0)[4]), (0, 0x56, 0x11));
}
