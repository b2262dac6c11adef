//! Single-stepping, breakpoints, debug registers, interrupt shadows (SDM volume 3, chapter 17; 6.8.3).

use crate::apic;
use crate::cpu::{vector as v, *};
use crate::paging::{self, TEST_VA, Window, frame, physical, pte};
use crate::run::{Code, Exit, Regs, USER_ALIAS};
use crate::tables::*;
use crate::tap::*;
use crate::{code, run, tests};

tests![
    single_step, step_over_string, step_and_faults, step_flags_instructions, step_after_mov_ss, step_syscall, step_sysret,
    step_interrupts, icebp, execute_breakpoint, execute_breakpoint_resume, execute_breakpoint_priority, data_breakpoint,
    data_breakpoint_lengths, data_breakpoint_string, data_breakpoint_of_fault, io_breakpoint, mov_ss_and_breakpoints,
    general_detect, dr6_bits, dr7_bits, dr4_dr5, mov_dr_checks, sti_shadow, mov_ss_shadow, popf_and_iret_have_none,
    sti_hlt, debugctl,
];

/// DR6 as it reads with nothing reported.
const DR6_CLEAR: u64 = 0xFFFF_0FF0;
/// Single step.
const BS: u64 = 1 << 14;
/// Debug register accessed.
const BD: u64 = 1 << 13;
/// DR7 with nothing enabled.
const DR7_CLEAR: u64 = 0x400;

/// Enables breakpoint `n` in DR7 (globally) with R/W and LEN.
fn dr7(n: u32, rw: u64, len: u64) -> u64 {
    DR7_CLEAR | 2 << (2 * n) | rw << (16 + 4 * n) | len << (18 + 4 * n)
}

/// Runs with TF set and checks the RIPs of each #DB until the snippet ends, relative to its start.
fn steps(t: &mut T, what: &str, code: Code, regs: Regs, want: &[u64]) -> Exit {
    let mut regs = regs.with(|r| r.rflags |= flag::TF);
    let mut count = 0;
    loop {
        write_dr6(DR6_CLEAR);
        let exit = regs.run();
        if exit.vector != v::DB || count > want.len() + 4 {
            t.eq(format_args!("{what}: number of steps"), count, want.len());
            return exit;
        }
        let rip = if exit.regs.rip >= USER_ALIAS { exit.regs.rip - USER_ALIAS } else { exit.regs.rip };
        let offset = rip.wrapping_sub(code.start);
        match want.get(count) {
            Some(&want) => t.eq(format_args!("{what}: step {count}"), offset, want),
            None => t.check(false, || crate::println!("#   {what}: extra step at {offset:#x}")),
        }
        t.eq(format_args!("{what}: DR6"), read_dr6(), DR6_CLEAR | BS);
        count += 1;
        regs = exit.regs;
    }
}

/// TF traps after each instruction, at both privilege levels. INT clears TF and is not followed by a trap.
fn single_step(t: &mut T) {
    let code = code!("nop", "xor eax, eax", "mov rbx, rsp", "jmp 2f", "nop", "2: nop");
    for regs in [code.kernel(), code.user()] {
        let exit = steps(t, "straight line", code, regs, &[1, 3, 6, 9, 10]);
        t.done("straight line", &exit);
    }
    let code = code!(32: "nop", "mov eax, 5", "push eax", "pop ebx");
    steps(t, "compatibility mode", code, code.user32(), &[1, 6, 7, 8]);
}

/// A repeated string instruction traps after each iteration, with RIP still at it until the last (SDM 17.3.1.4).
fn step_over_string(t: &mut T) {
    let code = code!("mov ecx, 3", "rep movsb", "nop");
    let data = frame(0).as_ptr() as u64;
    let regs = code.kernel().with(|r| (r.rsi, r.rdi) = (data, data + 64));
    let exit = steps(t, "rep movsb, 3", code, regs, &[5, 5, 5, 7, 8]);
    t.eq("RCX", exit.regs.rcx, 0);
    let code = code!("xor ecx, ecx", "rep stosb", "nop");
    steps(t, "rep stosb, 0", code, code.kernel().with(|r| r.rdi = data), &[2, 4, 5]);
    frame(0)[..8].copy_from_slice(b"aaab\0\0\0\0");
    let code = code!("mov ecx, 8", "mov al, 0x61", "repe scasb", "nop");
    let exit = steps(t, "repe scasb", code, code.kernel().with(|r| r.rdi = data), &[5, 7, 7, 7, 7, 9, 10]);
    t.eq("RCX", exit.regs.rcx, 4);
}

/// A fault is delivered instead of the trap; the saved flags keep TF.
fn step_and_faults(t: &mut T) {
    let code = code!("nop"; "ud2"; "nop");
    let exit = steps(t, "ud2", code, code.kernel(), &[1]);
    t.fault("ud2", code, &exit, UD);
    t.eq("TF saved", exit.regs.rflags & flag::TF, flag::TF);
    t.eq("DR6", read_dr6(), DR6_CLEAR);
    let code = code!(""; "int 0x40"; "nop");
    let exit = steps(t, "int n", code, code.kernel(), &[]);
    t.trap("int n", code, &exit, plain(0x40));
    t.eq("TF saved", exit.regs.rflags & flag::TF, flag::TF);
}

/// POPF and IRET that change TF: it counts from the next instruction on; POPF that clears it is still followed by a trap.
fn step_flags_instructions(t: &mut T) {
    let code = code!("push 0x102", "popfq", "nop", "nop");
    // TF is set by the snippet itself: the first trap follows the first `nop`.
    let exit = code.kernel().run();
    t.event("popf sets TF", &exit, DB);
    t.eq("after one more instruction", exit.regs.rip - code.start, 7);
    let code = code!("push 2", "popfq", "nop", "nop");
    steps(t, "popf clears TF", code, code.kernel(), &[2, 3]);
    let code = code!("pushfq", "pop rax", "nop");
    let exit = steps(t, "pushf", code, code.kernel(), &[1, 2, 3]);
    t.eq("pushf pushes TF", exit.regs.rax & flag::TF, flag::TF);
    let code = code!(
        "mov rax, rsp", "push 0x10", "push rax", "push 0x102", "push 8", "lea rbx, [rip + 772f]", "push rbx", "iretq";
        "nop";
        "nop"
    );
    t.trap("iret sets TF: after one instruction at the target", code, &code.kernel().run(), DB);
}

/// MOV to SS holds the trap back until after the next instruction (SDM 6.8.3).
fn step_after_mov_ss(t: &mut T) {
    let code = code!("mov eax, ss", "mov ss, eax", "nop", "nop");
    steps(t, "mov ss", code, code.kernel(), &[2, 5, 6]);
    let code = code!(32: ".byte 0x16, 0x17", "nop", "nop") ; // push ss; pop ss
    steps(t, "pop ss", code, code.user32(), &[1, 3, 4]);
}

/// SYSCALL with TF: FMASK decides whether the handler's entry is stepped (SDM volume 2, SYSCALL).
fn step_syscall(t: &mut T) {
    let handler = code!("nop", "nop");
    wrmsr(msr::LSTAR, handler.start);
    let code = code!("syscall");
    wrmsr(msr::FMASK, flag::TF);
    let exit = code.user().with(|r| r.rflags |= flag::TF).run();
    t.stopped_at("TF masked", &exit, DONE, handler.start + 4);
    t.eq("R11 keeps TF", exit.regs.r11 & flag::TF, flag::TF);
    wrmsr(msr::FMASK, 0);
    let exit = code.user().with(|r| r.rflags |= flag::TF).run();
    t.stopped_at("TF not masked", &exit, DB, handler.start);
    t.eq("at level 0", exit.regs.cs, KERNEL_CODE.into());
}

/// SYSRET that loads TF traps before the first user instruction.
fn step_sysret(t: &mut T) {
    let target = code!("nop", "nop");
    let code = code!("sysretq");
    let exit = code.kernel().with(|r| (r.rcx, r.r11) = (target.start + USER_ALIAS, flag::TF | flag::FIXED)).run();
    t.stopped_at("sysret sets TF", &exit, DB, target.start);
    t.eq("at level 3", exit.regs.cs, USER_CODE.into());
}

/// With an interrupt pending, the trap of the instruction before is delivered first (SDM table 6-2).
fn step_interrupts(t: &mut T) {
    apic::enable();
    apic::send_self(0x41);
    let code = code!("sti", "nop", "nop");
    let exit = code.kernel().with(|r| r.rflags |= flag::TF).run();
    t.event("after sti", &exit, DB);
    t.eq("RIP", exit.regs.rip - code.start, 1);
    let exit = exit.regs.with(|r| r.rflags |= flag::TF).run();
    t.is("then the interrupt or the next step", exit.vector == 0x41 || exit.vector == v::DB);
    apic::drain();
}

/// INT1 is a trap, sets no bit of DR6, and does not depend on DR7.
fn icebp(t: &mut T) {
    let code = code!(""; ".byte 0xF1"; "nop");
    write_dr6(DR6_CLEAR);
    t.trap("kernel", code, &code.kernel().run(), DB);
    t.trap("user", code, &code.user().run(), DB);
    t.eq("DR6", read_dr6(), DR6_CLEAR);
}

/// An execution breakpoint is a fault: RIP is the instruction, which has not run; B0-B3 name the register.
fn execute_breakpoint(t: &mut T) {
    let code = code!("nop"; "inc rax"; "nop");
    let writes: [fn(u64); 4] = [write_dr0, write_dr1, write_dr2, write_dr3];
    for (n, write) in writes.into_iter().enumerate() {
        write(code.mark);
        for enable in [1u64, 2, 3] {
            write_dr7(DR7_CLEAR | enable << (2 * n));
            write_dr6(DR6_CLEAR);
            let exit = code.kernel().run();
            write_dr7(DR7_CLEAR);
            t.fault("DR", code, &exit, DB);
            t.eq("not executed", exit.regs.rax, 0);
            t.eq("DR6", read_dr6(), DR6_CLEAR | 1 << n);
            t.eq("RF is not set in the saved flags", exit.regs.rflags & flag::RF, 0);
        }
        t.runs("disabled", &code.kernel());
        write(0); // a disabled breakpoint may set its bit of DR6 too
    }
    // The address must be that of the first byte.
    write_dr0(code.mark + 1);
    write_dr7(dr7(0, 0, 0));
    t.runs("second byte", &code.kernel());
    write_dr0(code.mark + USER_ALIAS);
    t.runs("another linear address", &code.kernel());
    let exit = code.user().run();
    write_dr7(DR7_CLEAR);
    t.fault("user", code, &exit, DB);
}

/// RF suppresses execution breakpoints for one instruction (SDM 17.3.1.1).
fn execute_breakpoint_resume(t: &mut T) {
    let code = code!("nop"; "inc rax"; "nop");
    write_dr0(code.mark);
    write_dr7(dr7(0, 0, 0));
    let first = code.kernel().run();
    let exit = first.regs.with(|r| r.rflags |= flag::RF).run();
    t.done("resumed with RF", &exit);
    t.eq("executed once", exit.regs.rax, 1);
    let loop_twice = code!("mov ecx, 2", "2: nop"; "inc rax"; "dec ecx", "jnz 2b");
    write_dr0(loop_twice.mark);
    let first = loop_twice.kernel().run();
    let second = first.regs.with(|r| r.rflags |= flag::RF).run();
    t.fault("RF lasts one instruction", loop_twice, &second, DB);
    t.eq("executed once", second.regs.rax, 1);
    // A repeated string instruction is one instruction: it faults once, before the first iteration.
    let string = code!("mov ecx, 4"; "rep stosb"; "nop");
    write_dr0(string.mark);
    let first = string.kernel().with(|r| r.rdi = frame(0).as_ptr() as u64).run();
    t.fault("rep stosb", string, &first, DB);
    t.eq("RCX", first.regs.rcx, 4);
    let exit = first.regs.with(|r| r.rflags |= flag::RF).run();
    t.done("resumed with RF", &exit);
    // RF lasts until the last iteration is done, also where each is stepped: it is in the flags that the step pushes.
    let mut regs = first.regs.with(|r| r.rflags |= flag::RF | flag::TF);
    for left in (0..4).rev() {
        write_dr6(DR6_CLEAR);
        let exit = regs.run();
        t.event(format_args!("step, {left} left"), &exit, DB);
        t.eq("DR6", read_dr6(), DR6_CLEAR | BS);
        t.eq("RCX", exit.regs.rcx, left);
        t.eq("RF", exit.regs.rflags & flag::RF, if left == 0 { 0 } else { flag::RF });
        regs = exit.regs;
    }
    write_dr7(DR7_CLEAR);
}

/// An execution breakpoint comes before any fault of fetching or decoding (SDM table 6-2).
fn execute_breakpoint_priority(t: &mut T) {
    let ud = code!("ud2");
    write_dr0(ud.mark);
    write_dr7(dr7(0, 0, 0));
    t.faults("before #UD", ud, DB);
    let gp0 = code!(".fill 20, 1, 0x66", "nop");
    write_dr0(gp0.mark);
    t.faults("before #GP of length", gp0, DB);
    // RW = 0 wants LEN = 0; a trap already pending goes first.
    let code = code!("inc rax"; "inc rax"; "nop");
    write_dr0(code.mark);
    write_dr6(DR6_CLEAR);
    let exit = code.kernel().with(|r| r.rflags |= flag::TF).run();
    t.event("step onto a breakpoint", &exit, DB);
    t.eq("RIP", exit.regs.rip, code.mark);
    t.eq("BS", read_dr6() & BS, BS);
    write_dr7(DR7_CLEAR);
}

/// Data breakpoints are traps: the access has happened, RIP is the next instruction.
fn data_breakpoint(t: &mut T) {
    let data = frame(0).as_ptr() as u64;
    let read = code!(""; "mov eax, [rbx]"; "nop");
    let write = code!(""; "mov [rbx], eax"; "nop");
    let both = code!(""; "lock add [rbx], eax"; "nop");
    let write_rw = 1;
    let access_rw = 3;
    for (what, code, rw, hit) in [
        ("read, on write", read, write_rw, false),
        ("write, on write", write, write_rw, true),
        ("add, on write", both, write_rw, true),
        ("read, on access", read, access_rw, true),
        ("write, on access", write, access_rw, true),
    ] {
        write_dr1(data);
        write_dr7(dr7(1, rw, 3));
        write_dr6(DR6_CLEAR);
        let exit = code.kernel().with(|r| (r.rbx, r.rax) = (data, 0x1234_5678)).run();
        write_dr7(DR7_CLEAR);
        if hit {
            t.trap(what, code, &exit, DB);
            t.eq(what, read_dr6(), DR6_CLEAR | 2);
        } else {
            t.done(what, &exit);
        }
    }
    // Fetching an instruction is not a data access.
    write_dr0(read.mark);
    write_dr7(dr7(0, 3, 0));
    t.runs("fetch", &read.kernel().with(|r| r.rbx = data));
    // Pushes and the stack count as data.
    let push = code!(""; "push rax"; "nop");
    write_dr0(run::snippet_stack(0) - 8);
    write_dr7(dr7(0, 1, 2));
    t.trap("push", push, &push.kernel().run(), DB);
    // Conditions are noted in DR6 for enabled breakpoints; more than one at a time.
    write_dr0(data);
    write_dr1(data + 1);
    write_dr7(dr7(0, 1, 0) | dr7(1, 3, 0));
    write_dr6(DR6_CLEAR);
    let exit = write.kernel().with(|r| r.rbx = data).run();
    write_dr7(DR7_CLEAR);
    t.trap("two at once", write, &exit, DB);
    t.eq("DR6", read_dr6(), DR6_CLEAR | 3);
}

/// LEN 0, 1, 2, 3 are 1, 2, 8, 4 bytes; the address is aligned down to the length (SDM 17.2.5).
fn data_breakpoint_lengths(t: &mut T) {
    let data = frame(0).as_ptr() as u64;
    let write = code!("mov byte ptr [rbx], 1");
    for (len, bytes) in [(0u64, 1u64), (1, 2), (2, 8), (3, 4)] {
        write_dr0(data + 16);
        write_dr7(dr7(0, 1, len));
        for offset in 8..32 {
            let exit = write.kernel().with(|r| r.rbx = data + offset).run();
            let inside = (16..16 + bytes).contains(&offset);
            t.event(format_args!("LEN {len}, byte {offset}"), &exit, if inside { DB } else { DONE });
        }
        // An access that overlaps the range at either end counts.
        let wide = code!("mov [rbx], rax").kernel();
        t.event("overlap below", &wide.with(|r| r.rbx = data + 9).run(), DB);
        t.event("ends just below", &wide.with(|r| r.rbx = data + 8).run(), DONE);
    }
    write_dr7(DR7_CLEAR);
}

/// In a repeated string instruction a data breakpoint is delivered after the iteration that met it.
fn data_breakpoint_string(t: &mut T) {
    let data = frame(0).as_ptr() as u64;
    let code = code!("mov ecx, 8"; "rep stosb"; "nop");
    write_dr0(data + 3);
    write_dr7(dr7(0, 1, 0));
    write_dr6(DR6_CLEAR);
    let exit = code.kernel().with(|r| r.rdi = data).run();
    t.event("rep stosb", &exit, DB);
    t.eq("DR6", read_dr6(), DR6_CLEAR | 1);
    // The processor may finish a group of iterations first (SDM 17.2.4 allows it for fast strings): at least four are done.
    t.is("four iterations", exit.regs.rcx <= 4);
    let exit = exit.regs.run();
    t.done("the rest", &exit);
    write_dr7(DR7_CLEAR);
}

/// An instruction that faults has not made its accesses: no breakpoint is reported.
fn data_breakpoint_of_fault(t: &mut T) {
    let window = Window::new();
    window.set_page(0, physical(frame(0)) | pte::P);
    let code = code!("mov [rbx], eax");
    write_dr0(TEST_VA);
    write_dr7(dr7(0, 3, 3));
    write_dr6(DR6_CLEAR);
    let exit = code.kernel().with(|r| r.rbx = TEST_VA).run();
    write_dr7(DR7_CLEAR);
    t.fault("write to a read-only page", code, &exit, pf(paging::pfec::P | paging::pfec::W));
    t.eq("DR6", read_dr6(), DR6_CLEAR);
}

/// I/O breakpoints need CR4.DE and are traps.
fn io_breakpoint(t: &mut T) {
    let code = code!(""; "in al, 0x80"; "nop");
    write_dr2(0x80);
    write_cr4(read_cr4() | cr4::DE);
    write_dr7(dr7(2, 2, 0));
    write_dr6(DR6_CLEAR);
    t.trap("in", code, &code.kernel().run(), DB);
    t.eq("DR6", read_dr6(), DR6_CLEAR | 4);
    let code = code!(""; "out dx, al"; "nop");
    t.trap("out", code, &code.kernel().with(|r| r.rdx = 0x80).run(), DB);
    t.runs("another port", &code.kernel().with(|r| r.rdx = 0x81));
    t.runs("memory", &code!("mov al, [rbx]").kernel().with(|r| r.rbx = 0x80));
    write_dr7(DR7_CLEAR);
    write_cr4(read_cr4() & !cr4::DE);
}

/// After MOV to SS no instruction breakpoint is met, and a data breakpoint waits for the next instruction's end (SDM 6.8.3).
fn mov_ss_and_breakpoints(t: &mut T) {
    let code = code!("mov eax, ss", "mov ss, eax"; "nop"; "nop");
    write_dr0(code.mark);
    write_dr7(dr7(0, 0, 0));
    t.runs("execution breakpoint after mov ss", &code.kernel());
    let data = frame(0).as_ptr() as u64;
    frame(0)[..8].copy_from_slice(&u64::from(KERNEL_DATA).to_le_bytes());
    let code = code!("mov ss, [rbx]"; "nop"; "nop");
    write_dr0(data);
    write_dr7(dr7(0, 3, 1));
    let exit = code.kernel().with(|r| r.rbx = data).run();
    write_dr7(DR7_CLEAR);
    t.trap("data breakpoint of mov ss", code, &exit, DB);
}

/// DR7.GD makes any MOV of a debug register a #DB fault with BD, and delivery clears GD (SDM 17.2.4).
fn general_detect(t: &mut T) {
    for (what, code) in [("read", code!("mov rax, dr0")), ("write", code!("mov dr7, rax")), ("dr6", code!("mov rax, dr6"))] {
        write_dr6(DR6_CLEAR);
        write_dr7(DR7_CLEAR | 1 << 13);
        let exit = code.kernel().run();
        t.fault(what, code, &exit, DB);
        t.eq("GD cleared", read_dr7(), DR7_CLEAR);
        t.eq("DR6", read_dr6(), DR6_CLEAR | BD);
    }
    write_dr7(DR7_CLEAR | 1 << 13);
    let user = code!("mov rax, dr0");
    t.user_faults("privilege before GD", user, gp(0));
    let clear = code!("mov dr7, rax");
    clear.kernel().with(|r| r.rax = DR7_CLEAR).run();
    write_dr7(DR7_CLEAR);
}

/// DR6: which bits are fixed, which stick (SDM 17.2.3).
fn dr6_bits(t: &mut T) {
    write_dr6(0);
    let ones = read_dr6();
    t.eq("fixed ones", ones & 0xFFFF_1FF0 & !0x1_0800, DR6_CLEAR & !0x1_0800);
    write_dr6(0xFFFF_FFFF);
    t.eq("bit 12 is zero", read_dr6() & 1 << 12, 0);
    t.eq("B0-B3, BD, BS, BT are writable", read_dr6() & 0xE00F, 0xE00F);
    // A new exception adds bits and clears none but B0-B3.
    write_dr6(DR6_CLEAR | BD);
    code!("nop").kernel().with(|r| r.rflags |= flag::TF).run();
    t.eq("BS joins BD", read_dr6(), DR6_CLEAR | BD | BS);
}

/// DR7: bit 10 is one, bits 12, 14, 15 and the upper half zero (SDM 17.2.4).
fn dr7_bits(t: &mut T) {
    let write = code!("mov dr7, rax");
    t.runs("all ones below but GD and the enables", &write.kernel().with(|r| r.rax = 0xFFFF_DF00));
    t.eq("reads", read_dr7() & 0xF400, 0x400);
    write_dr7(0);
    t.eq("zero", read_dr7(), 0x400);
    for value in [1 << 32, 1 << 63, 0xFFFF_FFFF_0000_0400] {
        t.event("upper half", &write.kernel().with(|r| r.rax = value).run(), gp(0));
        t.event("upper half of DR6", &code!("mov dr6, rax").kernel().with(|r| r.rax = value).run(), gp(0));
    }
    // DR0 to DR3 take any value, canonical or not.
    for value in [u64::MAX, 1 << 47, 0] {
        t.runs("DR0", &code!("mov dr0, rax", "mov rbx, dr0").kernel().with(|r| r.rax = value));
        t.eq("DR0", read_dr0(), value);
    }
}

/// DR4 and DR5 are DR6 and DR7 unless CR4.DE is set; then they do not exist (SDM 17.2.2).
fn dr4_dr5(t: &mut T) {
    let dr4 = code!(".byte 0x0F, 0x21, 0xE0"); // mov rax, dr4
    let dr5 = code!(".byte 0x0F, 0x21, 0xE8");
    write_dr6(DR6_CLEAR | BD);
    t.eq("DR4", t_rax(dr4), DR6_CLEAR | BD);
    t.eq("DR5", t_rax(dr5), DR7_CLEAR);
    write_cr4(read_cr4() | cr4::DE);
    t.faults("DR4 with DE", dr4, UD);
    t.faults("DR5 with DE", dr5, UD);
    t.faults("DR5 write with DE", code!(".byte 0x0F, 0x23, 0xE8"), UD);
    // Before the detection of GD.
    write_dr7(DR7_CLEAR | 1 << 13);
    let exit = dr4.kernel().run();
    t.event("#UD before GD", &exit, UD);
    code!("mov dr7, rax").kernel().with(|r| r.rax = DR7_CLEAR).run();
    write_dr7(DR7_CLEAR);
    write_cr4(read_cr4() & !cr4::DE);
}

/// RAX after a snippet.
fn t_rax(code: Code) -> u64 {
    code.kernel().run().regs.rax
}

/// The ModRM mode bits of MOV DR and MOV CR are ignored: always registers (SDM volume 2).
fn mov_dr_checks(t: &mut T) {
    write_dr0(0x1234);
    t.eq("mod 0", t_rax(code!(".byte 0x0F, 0x21, 0x00")), 0x1234);
    t.eq("mod 1", t_rax(code!(".byte 0x0F, 0x21, 0x40")), 0x1234);
    let cr3 = read_cr3();
    t.eq("mov rax, cr3, mod 0", t_rax(code!(".byte 0x0F, 0x20, 0x18")), cr3);
    // 64 bits whatever the operand-size prefix says.
    write_dr0(u64::MAX);
    t.eq("operand-size prefix", t_rax(code!(".byte 0x66, 0x0F, 0x21, 0xC0")), u64::MAX);
}

/// Enters with a pending interrupt and says how far it got, relative to the start, or `None` if it was not taken.
fn interrupted_at(code: Code, change: impl FnOnce(&mut Regs)) -> Option<u64> {
    apic::enable();
    apic::send_self(0x41);
    let exit = code.kernel().with(change).run();
    let taken = exit.vector == 0x41;
    if !taken {
        // Take it now, so that it does not disturb what follows.
        code!("sti", "nop", "nop", "nop", "cli").kernel().run();
    }
    apic::drain();
    taken.then_some(exit.regs.rip.wrapping_sub(code.start))
}

/// STI that sets IF holds interrupts back for one instruction (SDM volume 2, STI).
fn sti_shadow(t: &mut T) {
    t.same("sti, nop, nop", interrupted_at(code!("sti", "nop", "nop"), |_| ()), Some(2));
    t.same("sti, cli", interrupted_at(code!("sti", "cli", "nop"), |_| ()), None);
    t.same("sti, sti: no second shadow", interrupted_at(code!("sti", "sti", "nop", "nop"), |_| ()), Some(2));
    t.same("nop, sti, mov", interrupted_at(code!("nop", "sti", "mov eax, 1", "nop"), |_| ()), Some(7));
    // Many in a row never open a window.
    let code = code!("mov ecx, 100", "2: sti", "cli", "dec ecx", "jnz 2b", "sti", "nop", "nop");
    let at = interrupted_at(code, |_| ());
    t.same("loop of sti, cli", at, Some(5 + 6 + 2));
    // IF already set: entered by IRETQ, the interrupt is taken at once.
    t.same("IF set on entry", interrupted_at(code!("nop"), |r| r.rflags |= flag::IF), Some(0));
    // A fault in the shadow is not held back.
    apic::enable();
    apic::send_self(0x41);
    let code = code!("sti"; "ud2");
    t.fault("sti, ud2", code, &code.kernel().run(), UD);
    code!("sti", "nop", "nop", "nop", "cli").kernel().run();
    apic::drain();
}

/// MOV to SS shields the next instruction too, but in a row of such instructions only the first must (SDM volume 2, MOV).
fn mov_ss_shadow(t: &mut T) {
    let code = code!("mov eax, ss", "sti", "mov ss, eax", "nop", "nop");
    t.is("sti, mov ss, nop", matches!(interrupted_at(code, |_| ()), Some(5 | 6)));
    let code = code!("mov eax, ds", "sti", "mov ds, eax", "nop", "nop");
    t.same("sti, mov ds", interrupted_at(code, |_| ()), Some(2 + 1 + 2));
}

/// POPF and IRET that set IF let a pending interrupt in at once.
fn popf_and_iret_have_none(t: &mut T) {
    let code = code!("push 0x202", "popfq"; "nop"; "nop");
    t.same("popf", interrupted_at(code, |_| ()), Some(code.mark - code.start));
    let code = code!("push 0x10", "push rsp", "push 0x202", "push 8", "lea rbx, [rip + 772f]", "push rbx", "iretq"; "nop"; "nop");
    t.same("iretq", interrupted_at(code, |_| ()), Some(code.mark - code.start));
}

/// STI; HLT with an interrupt pending: HLT runs in the shadow and is woken at once, RIP beyond it.
fn sti_hlt(t: &mut T) {
    t.same("sti, hlt", interrupted_at(code!("sti", "hlt", "nop"), |_| ()), Some(2));
}

/// DEBUGCTL: reserved bits, and BTF, which turns TF into a trap on branches (SDM 17.4.1, 17.4.3).
fn debugctl(t: &mut T) {
    let write = code!("wrmsr").kernel().with(|r| r.rcx = msr::DEBUGCTL.into());
    t.done("zero", &write.run());
    t.event("upper half", &write.with(|r| r.rdx = 1).run(), gp(0));
    t.event("bit 31", &write.with(|r| r.rax = 1 << 31).run(), gp(0));
}
