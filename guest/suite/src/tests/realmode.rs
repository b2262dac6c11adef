//! Real mode (SDM volume 3, chapter 20): segments, limits, interrupts, 16-bit forms of instructions.

use crate::cpu::flag;
use crate::legacy::{CODE_SEGMENT, DATA_SEGMENT, Legacy, STACK_SEGMENT, low, prepare};
use crate::run::Code;
use crate::tap::*;
use crate::{code, tests};

tests![
    returns, segment_bases, limits, stack_limits, interrupts, exceptions, not_recognised, far_transfers, near_transfers, pushes, enter_leave,
    strings, string_wrap, bcd, multiply_divide, shifts, prefixes, control_registers, flags, loops, single_step,
];

const DONE_VECTOR: u32 = 0xF0;

/// Runs and checks that the snippet reached its end.
fn done(t: &mut T, what: &str, state: &Legacy) -> Legacy {
    let exit = state.run();
    t.check(exit.vector == DONE_VECTOR, || {
        crate::println!("#   {what}: got vector {:#x} at {:x}:{:x}, want completion", exit.vector, exit.cs, exit.eip);
    });
    exit
}

/// Runs and checks vector and IP.
fn ends(t: &mut T, what: &str, state: &Legacy, vector: u32, ip: u32) -> Legacy {
    let exit = state.run();
    t.check(exit.vector == vector && exit.eip == ip, || {
        crate::println!("#   {what}: got vector {:#x} at {:x}:{:x}, want {vector:#x} at {ip:x}", exit.vector, exit.cs, exit.eip);
    });
    exit
}

/// The data segment's bytes.
fn data() -> &'static mut [u8] {
    low(u32::from(DATA_SEGMENT) << 4, 0x1_0000)
}

/// There and back, with every register.
fn returns(t: &mut T) {
    prepare();
    let exit = done(t, "nop", &code!(16: "nop").real().with(|r| (r.eax, r.ebx, r.edi) = (0x1234_5678, 2, 3)));
    t.same("registers", (exit.eax, exit.ebx, exit.edi), (0x1234_5678, 2, 3));
    t.same("segments", (exit.cs, exit.ss, exit.ds), (CODE_SEGMENT.into(), STACK_SEGMENT.into(), DATA_SEGMENT.into()));
    t.eq("SP", exit.esp, 0xF000);
    let exit = done(t, "smsw", &code!(16: "smsw ax").real());
    t.eq("PE", exit.eax & 1, 0);
}

/// A segment's base is sixteen times its value, beyond 1 MiB too with A20 on.
fn segment_bases(t: &mut T) {
    prepare();
    data()[0x10] = 0x77;
    let exit = done(t, "mov ds", &code!(16: "mov ax, 0x3001", "mov ds, ax", "mov bl, [0]").real());
    t.eq("BL", exit.ebx & 0xFF, 0x77);
    let exit = done(t, "lds, les", &code!(16: "mov word ptr [0], 0x20", "mov word ptr [2], 0x2FFF", "les di, [0]", "mov byte ptr es:[di], 0x66", "mov al, [0x10]").real());
    t.eq("AL", exit.eax & 0xFF, 0x66);
    let high = low(0x10_0000 - 0x10 + 0x20, 1)[0];
    let exit = done(t, "FFFF:0020", &code!(16: "mov ax, 0xFFFF", "mov es, ax", "mov bl, es:[0x20]").real());
    t.eq("above 1 MiB", exit.ebx & 0xFF, high.into());
    let exit = done(t, "bp uses ss", &code!(16: "mov word ptr ss:[0x100], 0x1357", "mov bp, 0x100", "mov ax, [bp]").real());
    t.eq("AX", exit.eax & 0xFFFF, 0x1357);
}

/// An access beyond offset FFFF is interrupt 13, without an error code.
fn limits(t: &mut T) {
    prepare();
    for (what, code) in [
        ("word at FFFF", code!(16: "mov bx, 0xFFFF"; "mov ax, [bx]")),
        ("doubleword at FFFD", code!(16: "mov bx, 0xFFFD"; "mov eax, [bx]")),
        ("write", code!(16: "mov bx, 0xFFFF"; "mov [bx], ax")),
        ("32-bit address", code!(16: "mov ebx, 0x10000"; "mov al, [ebx]")),
        ("locked", code!(16: "mov bx, 0xFFFF"; "lock inc word ptr [bx]")),
    ] {
        ends(t, what, &code.real(), 13, code.mark_offset());
    }
    done(t, "byte at FFFF", &code!(16: "mov bx, 0xFFFF", "mov al, [bx]").real());
    let exit = done(t, "offset wraps at 64 KiB", &code!(16: "mov byte ptr [1], 0x42", "mov bx, 0xFFFF", "mov al, [bx + 2]").real());
    t.eq("AL", exit.eax & 0xFF, 0x42);
}

/// A stack access across the limit is interrupt 12; SP wraps.
fn stack_limits(t: &mut T) {
    prepare();
    let code = code!(16: "mov bp, 0xFFFF"; "mov ax, [bp]");
    ends(t, "word at SS:FFFF", &code.real(), 12, code.mark_offset());
    let exit = done(t, "push at SP 0 wraps", &code!(16: "mov sp, 0", "push 0x55", "mov bx, sp", "pop ax").real());
    t.same("SP, AX", (exit.ebx & 0xFFFF, exit.eax & 0xFFFF), (0xFFFE, 0x55));
}

/// INT n through the IVT: FLAGS, CS, IP pushed, IF and TF cleared; IRET.
fn interrupts(t: &mut T) {
    prepare();
    let code = code!(16: ""; "int 0x40"; "nop");
    let exit = ends(t, "int n", &code.real().with(|r| r.eflags |= 0x201), 0x40, code.next_offset());
    t.eq("flags pushed", exit.eflags & 0x201, 0x201);
    t.eq("SP", exit.esp & 0xFFFF, 0xF000);
    // A handler of the snippet's own.
    let code = code!(16: "jmp 3f", "2: mov bp, sp", "mov bx, [bp]", "mov cx, [bp + 2]", "mov dx, [bp + 4]", "pushf", "pop si", "iret",
        "3: push ds", "xor ax, ax", "mov ds, ax", "mov word ptr [0x104], 2", "mov word ptr [0x106], cs", "pop ds", "stc", "sti"; "int 0x41"; "cli");
    let exit = done(t, "own handler", &code.real());
    t.eq("IP", exit.ebx & 0xFFFF, code.next_offset());
    t.eq("CS", exit.ecx & 0xFFFF, CODE_SEGMENT.into());
    t.eq("FLAGS", exit.edx & 0x301, 0x201);
    t.eq("IF clear in the handler", exit.esi & 0x300, 0);
    let int3 = code!(16: ""; "int3"; "nop");
    ends(t, "int3", &int3.real(), 3, int3.next_offset());
    let into = code!(16: "mov al, 0x7F", "inc al"; "into"; "nop");
    ends(t, "into", &into.real(), 4, into.next_offset());
    done(t, "into without OF", &code!(16: "xor ax, ax", "into").real());
}

/// Faults push the address of the instruction.
fn exceptions(t: &mut T) {
    prepare();
    data()[..4].copy_from_slice(&[5, 0, 9, 0]);
    for (what, code, vector) in [
        ("div by zero", code!(16: "xor cx, cx"; "div cx"), 0),
        ("aam 0", code!(16: ""; ".byte 0xD4, 0"), 0),
        ("idiv overflow", code!(16: "mov ax, 0x8000", "mov cl, 0xFF"; "idiv cl"), 0),
        ("bound", code!(16: "mov ax, 10"; ".byte 0x62, 0x06, 0, 0"), 5),
        ("ud2", code!(16: ""; "ud2"), 6),
        ("lock nop", code!(16: ""; ".byte 0xF0, 0x90"), 6),
        ("mov cs, ax", code!(16: ""; ".byte 0x8E, 0xC8"), 6),
        ("16 bytes", code!(16: ""; ".fill 15, 1, 0x66", "nop"), 13),
    ] {
        ends(t, what, &code.real(), vector, code.mark_offset());
    }
    done(t, "bound, inside", &code!(16: "mov ax, 9", ".byte 0x62, 0x06, 0, 0").real());
}

/// Protected-mode instructions are interrupt 6 here (SDM 20.1.4).
fn not_recognised(t: &mut T) {
    prepare();
    for (what, code) in [
        ("sldt", code!(16: ""; ".byte 0x0F, 0x00, 0xC0")),
        ("str", code!(16: ""; ".byte 0x0F, 0x00, 0xC8")),
        ("lldt", code!(16: ""; ".byte 0x0F, 0x00, 0xD0")),
        ("ltr", code!(16: ""; ".byte 0x0F, 0x00, 0xD8")),
        ("verr", code!(16: ""; ".byte 0x0F, 0x00, 0xE0")),
        ("lar", code!(16: ""; ".byte 0x0F, 0x02, 0xC0")),
        ("lsl", code!(16: ""; ".byte 0x0F, 0x03, 0xC0")),
        ("arpl", code!(16: ""; ".byte 0x63, 0xC0")),
        ("vex is lds with a register", code!(16: ""; ".byte 0xC5, 0xF8, 0x77")),
    ] {
        ends(t, what, &code.real(), 6, code.mark_offset());
    }
    let sysenter = code!(16: ""; "sysenter");
    if !crate::cpu::is_amd() {
        ends(t, "sysenter", &sysenter.real(), 13, sysenter.mark_offset());
    }
    done(t, "sgdt, sidt, smsw", &code!(16: "sgdt [0x100]", "sidt [0x110]", "smsw [0x120]").real());
}

/// Far CALL, RET, JMP.
fn far_transfers(t: &mut T) {
    prepare();
    let code = code!(16: "jmp 3f", "2: mov bp, sp", "mov bx, [bp]", "mov cx, [bp + 2]", ".byte 0xCB", // retf
        "3: push 0x1234"; ".byte 0x9A, 2, 0, 0, 0x10"; "mov dx, sp");
    let exit = done(t, "call far", &code.real());
    t.eq("IP", exit.ebx & 0xFFFF, code.next_offset());
    t.eq("CS", exit.ecx & 0xFFFF, CODE_SEGMENT.into());
    t.eq("SP", exit.edx & 0xFFFF, 0xEFFE);
    let exit = done(t, "retf 4", &code!(16: "push 1", "push 2", "push cs", "push 0x0D", ".byte 0xCA, 4, 0", "ud2", "nop", "nop", "nop", "mov ax, sp").real());
    t.eq("SP", exit.eax & 0xFFFF, 0xF000);
    done(t, "jmp far indirect", &code!(16: "mov word ptr [0], 0x14", "mov word ptr [2], 0x1000", ".byte 0xFF, 0x2E, 0, 0", "ud2", "ud2", "nop", "nop", "nop").real());
    // The same code under another segment.
    let exit = done(t, "jmp to an alias", &code!(16: ".byte 0xEA, 0x15, 0, 0xFF, 0x0F", "mov ax, cs").real());
    t.eq("CS", exit.eax & 0xFFFF, 0x0FFF);
}

/// Near transfers keep to 16 bits; beyond the limit with a 32-bit operand is interrupt 13.
fn near_transfers(t: &mut T) {
    prepare();
    let exit = done(t, "call, ret 2", &code!(16: "jmp 3f", "2: ret 2", "3: push 7", "call 2b", "mov ax, sp").real());
    t.eq("SP", exit.eax & 0xFFFF, 0xF000);
    let code = code!(16: "mov eax, 0x10000"; ".byte 0x66, 0xFF, 0xE0"); // jmp eax
    if !crate::cpu::is_tcg() {
        // QEMU's translator checks no limit and runs away.
        ends(t, "jmp eax", &code.real(), 13, code.mark_offset());
    }
    let exit = done(t, "jcc", &code!(16: "xor ax, ax", "jz 2f", "ud2", "2: jnz 3f", "inc ax", "3: jcxz 4f", "inc ax", "4: nop").real());
    t.eq("AX", exit.eax & 0xFFFF, 1);
}

/// PUSH and POP in both sizes.
fn pushes(t: &mut T) {
    prepare();
    let exit = done(t, "pusha, popa", &code!(16: ".byte 0x60", "mov bp, sp", "mov si, [bp + 6]", "mov di, [bp + 14]", ".byte 0x61").real().with(|r| r.eax = 0xABCD));
    t.eq("AX", exit.eax & 0xFFFF, 0xABCD);
    let exit = done(t, "push sp pushes the old value", &code!(16: "push sp", "pop ax").real());
    t.eq("AX", exit.eax & 0xFFFF, 0xF000);
    let exit = done(t, "push imm8 is sign-extended", &code!(16: "push -2", "pop ax", ".byte 0x66, 0x6A, 0xFE", "pop ebx").real());
    t.same("AX, EBX", (exit.eax & 0xFFFF, exit.ebx), (0xFFFE, 0xFFFF_FFFE));
    let exit = done(t, "push fs, pop gs", &code!(16: "mov ax, 0x4321", "mov fs, ax", "push fs", "pop gs", "mov bx, gs").real());
    t.eq("GS", exit.ebx & 0xFFFF, 0x4321);
    let exit = done(t, "pop word ptr [bx]", &code!(16: "push 0x5A5A", "mov bx, 8", "pop word ptr [bx]", "mov ax, [8]").real());
    t.eq("AX", exit.eax & 0xFFFF, 0x5A5A);
    let exit = done(t, "pushfd", &code!(16: ".byte 0x66, 0x9C", "pop eax").real());
    t.eq("upper half: no VM, no RF", exit.eax >> 16 & 3, 0);
}

/// ENTER and LEAVE.
fn enter_leave(t: &mut T) {
    prepare();
    let exit = done(t, "enter 8, 0", &code!(16: "mov bp, 0x77", "enter 8, 0", "mov ax, sp", "mov bx, bp", "leave").real());
    t.same("SP, BP in the frame", (exit.eax & 0xFFFF, exit.ebx & 0xFFFF), (0xEFF6, 0xEFFE));
    t.eq("BP", exit.ebp & 0xFFFF, 0x77);
    let exit = done(t, "enter 0, 3", &code!(16: "mov bp, sp", "enter 0, 3", "mov ax, sp", "leave").real());
    t.eq("four words", exit.eax & 0xFFFF, 0xF000 - 8);
}

/// String instructions: sizes, direction, overrides.
fn strings(t: &mut T) {
    prepare();
    data()[..8].copy_from_slice(b"abcdefgh");
    let exit = done(t, "rep movsb", &code!(16: "xor si, si", "mov di, 0x100", "mov cx, 8", "cld", "rep movsb").real());
    t.same("SI, DI, CX", (exit.esi & 0xFFFF, exit.edi & 0xFFFF, exit.ecx & 0xFFFF), (8, 0x108, 0));
    t.is("copied", &data()[0x100..0x108] == b"abcdefgh");
    let exit = done(t, "std; lodsw", &code!(16: "mov si, 2", "std", "lodsw", "cld").real());
    t.same("AX, SI", (exit.eax & 0xFFFF, exit.esi & 0xFFFF), (0x6463, 0));
    let exit = done(t, "repne scasb", &code!(16: "xor di, di", "mov cx, 8", "mov al, 0x65", "repne scasb").real());
    t.same("DI, CX", (exit.edi & 0xFFFF, exit.ecx & 0xFFFF), (5, 3));
    let exit = done(t, "repe cmpsd", &code!(16: "xor si, si", "mov di, 0x100", "mov cx, 2", "repe cmpsd").real());
    t.same("CX, ZF", (exit.ecx & 0xFFFF, exit.eflags & flag::ZF as u32), (0, flag::ZF as u32));
    let exit = done(t, "stosd", &code!(16: "mov di, 0x200", "mov eax, 0x11223344", "stosd", "mov ebx, [0x200]").real());
    t.eq("stored", exit.ebx, 0x1122_3344);
    let exit = done(t, "cs lodsb", &code!(16: "xor si, si", ".byte 0x2E, 0xAC").real());
    t.eq("from CS", exit.eax & 0xFF, low(u32::from(CODE_SEGMENT) << 4, 1)[0].into());
}

/// SI and DI wrap at 64 KiB; an element across the limit is interrupt 13 with registers at that iteration.
fn string_wrap(t: &mut T) {
    prepare();
    let exit = done(t, "stosb at FFFF", &code!(16: "mov di, 0xFFFF", "mov cx, 2", "mov al, 0x99", "rep stosb").real());
    t.eq("DI", exit.edi & 0xFFFF, 1);
    t.same("wrapped", (data()[0xFFFF], data()[0]), (0x99, 0x99));
    let code = code!(16: "mov di, 0xFFFB", "mov cx, 4"; "rep stosw");
    let exit = ends(t, "rep stosw", &code.real(), 13, code.mark_offset());
    t.same("DI, CX", (exit.edi & 0xFFFF, exit.ecx & 0xFFFF), (0xFFFF, 2));
}

/// Decimal adjustments.
fn bcd(t: &mut T) {
    prepare();
    for (what, code, ax, want) in [
        ("daa", code!(16: "daa"), 0x3Cu32, 0x42u32),
        ("das", code!(16: "clc", "das"), 0x3C, 0x36),
        ("aaa", code!(16: "aaa"), 0x0F, 0x0105),
        ("aas", code!(16: "aas"), 0x0100 | 0x0B, 0x0005),
        ("aam", code!(16: "aam"), 63, 0x0603),
        ("aad", code!(16: "aad"), 0x0603, 63),
        ("salc", code!(16: "stc", ".byte 0xD6"), 0, 0xFF),
    ] {
        let exit = done(t, what, &code.real().with(|r| r.eax = ax));
        t.eq(what, exit.eax & 0xFFFF, want);
    }
}

/// MUL, DIV, IMUL, in both sizes; CBW and friends.
fn multiply_divide(t: &mut T) {
    prepare();
    let exit = done(t, "mul", &code!(16: "mov ax, 0x1234", "mov cx, 0x100", "mul cx").real());
    t.same("DX:AX", (exit.edx & 0xFFFF, exit.eax & 0xFFFF), (0x12, 0x3400));
    let exit = done(t, "div ecx", &code!(16: "mov edx, 1", "xor eax, eax", "mov ecx, 0x10000", "div ecx").real());
    t.eq("EAX", exit.eax, 0x10000);
    let exit = done(t, "idiv", &code!(16: "mov ax, -7", "cwd", "mov cx, 2", "idiv cx").real());
    t.same("quotient, remainder", (exit.eax & 0xFFFF, exit.edx & 0xFFFF), (0xFFFD, 0xFFFF));
    let exit = done(t, "cbw, cwde", &code!(16: "mov eax, 0x80", "cbw", "cwde").real());
    t.eq("EAX", exit.eax, 0xFFFF_FF80);
    let exit = done(t, "imul ax, bx, imm", &code!(16: "mov bx, 300", "imul ax, bx, -2").real());
    t.eq("AX", exit.eax & 0xFFFF, 0xFDA8);
}

/// SHLD and SHRD of words; masked counts.
fn shifts(t: &mut T) {
    prepare();
    let exit = done(t, "shld ax, dx, 4", &code!(16: "mov ax, 0x1234", "mov dx, 0xABCD", "shld ax, dx, 4").real());
    t.eq("AX", exit.eax & 0xFFFF, 0x234A);
    let exit = done(t, "shrd eax, edx, cl", &code!(16: "mov eax, 0x12345678", "mov edx, 0x9", "mov cl, 36", "shrd eax, edx, cl").real());
    t.eq("EAX", exit.eax, 0x9123_4567);
    let exit = done(t, "rcl ax, 1", &code!(16: "mov ax, 0x8000", "stc", "rcl ax, 1").real());
    t.same("AX, CF", (exit.eax & 0xFFFF, exit.eflags & 1), (1, 1));
}

/// Operand- and address-size prefixes, alone and together.
fn prefixes(t: &mut T) {
    prepare();
    data()[0x50..0x54].copy_from_slice(&0x1357_9BDFu32.to_le_bytes());
    for (what, code) in [
        ("66", code!(16: "mov bx, 0x50", ".byte 0x66, 0x8B, 0x07")),
        ("67", code!(16: "mov ebx, 0x50", ".byte 0x67, 0x66, 0x8B, 0x03")),
        ("scaled index", code!(16: "mov ebx, 0x40", "mov esi, 4", ".byte 0x66, 0x67, 0x8B, 0x04, 0xB3")),
    ] {
        let exit = done(t, what, &code.real());
        t.eq(what, exit.eax, 0x1357_9BDF);
    }
    let exit = done(t, "lea", &code!(16: "mov ebx, 0x12345678", ".byte 0x66, 0x67, 0x8D, 0x43, 0x01", ".byte 0x67, 0x8D, 0x4B, 0x01").real());
    t.eq("lea eax", exit.eax, 0x1234_5679);
    t.eq("lea cx", exit.ecx, 0x5679);
    let exit = done(t, "xlat", &code!(16: "mov bx, 0x50", "mov al, 1", "xlatb").real());
    t.eq("AL", exit.eax & 0xFF, 0x9B);
    done(t, "14 prefixes", &code!(16: ".fill 14, 1, 0x66", "nop").real());
}

/// Control registers can be read; CPUID and RDTSC work; CR0's PG without PE is interrupt 13.
fn control_registers(t: &mut T) {
    prepare();
    let exit = done(t, "mov eax, cr0", &code!(16: "mov eax, cr0").real());
    t.eq("PE, PG", exit.eax & 0x8000_0001, 0);
    let code = code!(16: "mov eax, 0x80000020"; "mov cr0, eax");
    if !crate::cpu::is_tcg() {
        ends(t, "PG without PE", &code.real(), 13, code.mark_offset());
    }
    let exit = done(t, "cpuid", &code!(16: "xor eax, eax", "cpuid").real());
    t.eq("vendor", exit.ebx, crate::cpu::cpuid(0, 0)[1]);
    done(t, "rdtsc, wbinvd, clts", &code!(16: "rdtsc", "wbinvd", "clts").real());
    done(t, "rdmsr", &code!(16: "mov ecx, 0xC0000080", "rdmsr").real());
}

/// POPF and SAHF; IOPL and NT can be written.
fn flags(t: &mut T) {
    prepare();
    let exit = done(t, "popf", &code!(16: "push 0x7CD5", "popf", "pushf", "pop ax", "push 2", "popf").real());
    t.eq("FLAGS", exit.eax & 0xFFFF, 0x7CD7);
    let exit = done(t, "cmc, cld", &code!(16: "stc", "cmc", "std", "cld", "lahf").real());
    t.eq("AH", exit.eax >> 8 & 1, 0);
}

/// LOOP counts in CX, or ECX with an address-size prefix.
fn loops(t: &mut T) {
    prepare();
    let exit = done(t, "loop", &code!(16: "mov ecx, 0x10003", "xor ax, ax", "2: inc ax", "loop 2b").real());
    t.same("AX, ECX", (exit.eax & 0xFFFF, exit.ecx), (3, 0x1_0000));
    let exit = done(t, "loopne", &code!(16: "mov cx, 5", "xor ax, ax", "2: inc ax", "cmp ax, 2", "loopne 2b").real());
    t.eq("AX", exit.eax & 0xFFFF, 2);
}

/// TF traps through vector 1.
fn single_step(t: &mut T) {
    prepare();
    let code: Code = code!(16: "nop"; "nop"; "nop");
    let exit = ends(t, "first", &code.real().with(|r| r.eflags |= 0x100), 1, code.mark_offset());
    t.eq("TF pushed", exit.eflags & 0x100, 0x100);
}
