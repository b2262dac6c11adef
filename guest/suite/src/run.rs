//! The one way a test runs an instruction: enter a snippet with a full set of registers, come back with the exception,
//! trap or interrupt that ended it and the registers it left.
//!
//! ```text
//!  Rust --run(&Regs)--> iretq --> snippet (any privilege level, any mode of IA-32e)
//!   ^                               | fault, trap, interrupt, or its closing `int 0xF0`
//!   +------ Exit <--- stub <--------+
//! ```
//!
//! Every gate of every processor leads to a stub of that processor, so the handler finds its state without trusting any
//! register. A 64-bit interrupt aligns the stack before it pushes (SDM 6.14.2): the alignment left over tells whether
//! the processor pushed an error code, and so that is recorded rather than assumed from the vector.

use crate::cpu::{MAX_CPUS, cr0, flag};
use crate::tables::{KERNEL_CODE, KERNEL_DATA, Stack, USER_CODE, USER_CODE32, USER_DATA};
use core::arch::global_asm;
use core::mem::offset_of;
use core::ptr::addr_of_mut;

/// Added to an address below 1 GiB: the same memory, mapped for users.
pub const USER_ALIAS: u64 = 0x8000_0000;

/// [`Exit::error`] where none was pushed.
pub const NO_ERROR: u64 = u64::MAX;

/// General registers, flags, and what IRETQ takes.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Regs {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rbp: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
}

/// Why a snippet ended, and with what registers.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Exit {
    pub regs: Regs,
    pub vector: u64,
    pub error: u64,
    pub cr2: u64,
    /// Stack pointer the frame was pushed at, before alignment padding: tells which stack the processor chose.
    pub frame: u64,
}

/// A processor's side of [`run`], at addresses the assembly below knows.
#[repr(C)]
struct State {
    exit: Exit,
    host_rsp: u64,
    stubs: u64,
}

// SAFETY: every field is a number, and zero is one.
const NO_STATE: State = State { exit: unsafe { core::mem::zeroed() }, host_rsp: 0, stubs: 0 };
static mut STATES: [State; MAX_CPUS] = [NO_STATE; MAX_CPUS];
static mut SNIPPET_STACKS: [Stack; MAX_CPUS] = [const { Stack::new() }; MAX_CPUS];

unsafe extern "C" {
    static interrupt_stubs: u8;
    static snippets_start: u8;
    static snippets_end: u8;
    fn enter_snippet(state: *mut State);
}

/// Address of a vector's entry point.
pub fn stub(cpu: usize, vector: usize) -> u64 {
    &raw const interrupt_stubs as u64 + (cpu * 256 + vector) as u64 * 8
}

global_asm!(
    r#"
    // One stub: its return address names the vector.
    .macro stubs cpu
    .rept 256
    .balign 8
    call common_\cpu
    .endr
    .endm

    .macro common cpu
common_\cpu:
    push rax
    lea rax, [rip + {states} + \cpu * {state_size}]
    jmp common
    .endm

    .text
    .balign 8
    .global interrupt_stubs
interrupt_stubs:
    stubs 0
    stubs 1
    stubs 2
    stubs 3
    common 0
    common 1
    common 2
    common 3

common:
    mov [rax + 8], rbx
    mov [rax + 16], rcx
    mov [rax + 24], rdx
    mov [rax + 32], rsi
    mov [rax + 40], rdi
    mov [rax + 48], rbp
    mov [rax + 56], r8
    mov [rax + 64], r9
    mov [rax + 72], r10
    mov [rax + 80], r11
    mov [rax + 88], r12
    mov [rax + 96], r13
    mov [rax + 104], r14
    mov [rax + 112], r15
    pop qword ptr [rax]
    pop rbx                                 // inside the stub
    sub rbx, [rax + {stubs}]
    shr rbx, 3
    mov [rax + {vector}], rbx
    mov rbx, -1
    test rsp, 8
    jnz 2f
    pop rbx
2:  mov [rax + {error}], rbx
    lea rbx, [rsp + 40]
    mov [rax + {frame}], rbx
    pop qword ptr [rax + 120]
    pop qword ptr [rax + 128]
    pop qword ptr [rax + 136]
    pop qword ptr [rax + 144]
    pop qword ptr [rax + 152]
    mov rbx, cr2
    mov [rax + {cr2}], rbx
    // Rust code uses SSE: what a snippet did to it ends here.
    mov rbx, cr0
    test bl, {em_ts}
    jz 5f
    and bl, ~{em_ts}
    mov cr0, rbx
5:  mov rbx, cr4
    bts rbx, 9
    jc 6f
    mov cr4, rbx
6:  mov rbx, [rax + {host_rsp}]
    test rbx, rbx
    jz 3f
    mov qword ptr [rax + {host_rsp}], 0
    // IRETQ, not RET: it ends the blocking of NMIs, and loads SS, which an interrupt from user mode left NULL.
    push {data}
    push rbx
    push 2
    push {code}
    lea rbx, [rip + 4f]
    push rbx
    iretq
4:  pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret
3:  cld
    and rsp, -16
    mov rdi, rax
    call {unexpected}

    .global enter_snippet
enter_snippet:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    mov rax, rdi
    mov [rax + {host_rsp}], rsp
    push qword ptr [rax + 152]
    push qword ptr [rax + 144]
    push qword ptr [rax + 136]
    push qword ptr [rax + 128]
    push qword ptr [rax + 120]
    mov rbx, [rax + 8]
    mov rcx, [rax + 16]
    mov rdx, [rax + 24]
    mov rsi, [rax + 32]
    mov rdi, [rax + 40]
    mov rbp, [rax + 48]
    mov r8, [rax + 56]
    mov r9, [rax + 64]
    mov r10, [rax + 72]
    mov r11, [rax + 80]
    mov r12, [rax + 88]
    mov r13, [rax + 96]
    mov r14, [rax + 104]
    mov r15, [rax + 112]
    mov rax, [rax]
    iretq
"#,
    states = sym STATES,
    state_size = const size_of::<State>(),
    stubs = const offset_of!(State, stubs),
    host_rsp = const offset_of!(State, host_rsp),
    vector = const offset_of!(Exit, vector),
    error = const offset_of!(Exit, error),
    cr2 = const offset_of!(Exit, cr2),
    frame = const offset_of!(Exit, frame),
    em_ts = const cr0::EM | cr0::TS,
    code = const KERNEL_CODE,
    data = const KERNEL_DATA,
    unexpected = sym unexpected,
);

/// An exception in Rust code: the test that caused it fails and the next one runs.
extern "C" fn unexpected(state: &State) -> ! {
    let Exit { vector, error, cr2, regs, .. } = &state.exit;
    crate::println!(
        "# unexpected vector {vector} error {error:#x} at {:#x} rsp {:#x} cr2 {cr2:#x}",
        regs.rip,
        regs.rsp
    );
    crate::tap::abandon_test()
}

/// Prepares a processor's state.
pub fn init(cpu: usize) {
    // SAFETY: a processor's state is its own, and it runs no snippet while it is prepared.
    let state = unsafe { &mut (*addr_of_mut!(STATES))[cpu] };
    state.host_rsp = 0;
    state.stubs = stub(cpu, 0);
}

/// Runs on the first processor until something ends it.
pub fn run(regs: &Regs) -> Exit {
    run_on(0, regs)
}

/// Runs on processor `cpu`, which must be the one executing.
pub fn run_on(cpu: usize, regs: &Regs) -> Exit {
    // SAFETY: as in `init`; the snippet comes back through the stubs, which restore what Rust relies on.
    unsafe {
        let state = &raw mut STATES[cpu];
        (*state).exit.regs = *regs;
        enter_snippet(state);
        let mut exit = (*state).exit;
        if cfg!(integer_only) {
            recognise_closing(&mut exit);
        }
        exit
    }
}

/// In images for integers only, a 64-bit snippet ends with UD2 and this behind it, which stands for `int 0xF0`.
const CLOSING: u16 = 0xF0F0;

/// Turns the closing #UD into what `int 0xF0` leaves.
fn recognise_closing(exit: &mut Exit) {
    let address = exit.regs.rip;
    let address = if address & !0x3FFF_FFFF == USER_ALIAS { address - USER_ALIAS } else { address };
    let snippets = (&raw const snippets_start as u64)..=(&raw const snippets_end as u64 - 4);
    if exit.vector == crate::cpu::vector::UD && snippets.contains(&address) {
        // SAFETY: within the snippets, which are mapped one to one, and four bytes from their end at the latest.
        let code = unsafe { (address as *const [u16; 2]).read_unaligned() };
        if code == [u16::from_le_bytes([0x0F, 0x0B]), CLOSING] {
            exit.vector = crate::cpu::vector::DONE;
            exit.regs.rflags &= !flag::RF; // faults set it in what they save, INT does not
        }
    }
}

/// Top of the stack snippets get, as the supervisor sees it.
pub fn snippet_stack(cpu: usize) -> u64 {
    // SAFETY: only an address is taken.
    unsafe { (*addr_of_mut!(SNIPPET_STACKS))[cpu].top() - 4096 }
}

/// A piece of machine code: where it begins, the instruction in question, and the one after it.
#[derive(Clone, Copy)]
pub struct Code {
    pub start: u64,
    pub mark: u64,
    pub next: u64,
}

impl Code {
    fn regs(self, rip: u64, cs: u16, rsp: u64, ss: u16) -> Regs {
        Regs { rip, cs: cs.into(), rflags: flag::FIXED, rsp, ss: ss.into(), ..Regs::default() }
    }

    /// To run at privilege level 0 on processor `cpu`.
    pub fn kernel_on(self, cpu: usize) -> Regs {
        self.regs(self.start, KERNEL_CODE, snippet_stack(cpu), KERNEL_DATA)
    }

    /// To run at privilege level 0.
    pub fn kernel(self) -> Regs {
        self.regs(self.start, KERNEL_CODE, snippet_stack(0), KERNEL_DATA)
    }

    /// To run at privilege level 3.
    pub fn user(self) -> Regs {
        self.regs(self.start + USER_ALIAS, USER_CODE, snippet_stack(0) + USER_ALIAS, USER_DATA)
    }

    /// To run at privilege level 3 in compatibility mode, 32-bit operands and addresses.
    pub fn user32(self) -> Regs {
        self.regs(self.start + USER_ALIAS, USER_CODE32, snippet_stack(0) + USER_ALIAS, USER_DATA)
    }

    /// To run at privilege level 0 in compatibility mode.
    pub fn kernel32(self) -> Regs {
        self.regs(self.start, crate::tables::KERNEL_CODE32, snippet_stack(0), KERNEL_DATA)
    }
}

impl Regs {
    /// The same with some registers changed.
    pub fn with(mut self, change: impl FnOnce(&mut Regs)) -> Regs {
        change(&mut self);
        self
    }

    /// Runs on the first processor.
    pub fn run(&self) -> Exit {
        run(self)
    }
}

/// What ends a snippet of so many bits. Built for integers only (`--cfg integer_only`), 64-bit ones end with #UD: KVM's
/// instruction emulator does not know INT in protected mode.
#[cfg(not(integer_only))]
#[macro_export]
macro_rules! closing {
    ($bits:tt) => {
        "int 0xF0"
    };
}
#[cfg(integer_only)]
#[macro_export]
macro_rules! closing {
    ("64") => {
        "ud2\n.short 0xF0F0"
    };
    ($bits:tt) => {
        "int 0xF0"
    };
}

/// Assembles a snippet: `code!("before" ; "in question" ; "after")`. One part alone is the instruction in question.
/// A closing `int 0xF0` is added. `code!(32: ...)` and `code!(16: ...)` assemble for the smaller code segments.
#[macro_export]
macro_rules! code {
    (@ $bits:tt [$($before:literal)*] [$($mark:literal)*] [$($after:literal)*]) => {{
        let (start, mark, next): (u64, u64, u64);
        // SAFETY: this only defines code and takes its addresses.
        unsafe {
            core::arch::asm!(
                ".pushsection .snippets, \"ax\"",
                concat!(".code", $bits),
                "771:",
                $($before,)*
                "772:",
                $($mark,)*
                "773:",
                $($after,)*
                $crate::closing!($bits),
                ".code64",
                ".popsection",
                "lea {}, [rip + 771b]", "lea {}, [rip + 772b]", "lea {}, [rip + 773b]",
                out(reg) start, out(reg) mark, out(reg) next,
                options(nomem, nostack, preserves_flags),
            );
        }
        $crate::run::Code { start, mark, next }
    }};
    (32: $($a:literal),+) => { $crate::code!(@ "32" [] [$($a)*] []) };
    (32: $($a:literal),* ; $($b:literal),*) => { $crate::code!(@ "32" [$($a)*] [$($b)*] []) };
    (32: $($a:literal),* ; $($b:literal),* ; $($c:literal),*) => { $crate::code!(@ "32" [$($a)*] [$($b)*] [$($c)*]) };
    (16: $($a:literal),+) => { $crate::code!(@ "16" [] [$($a)*] []) };
    (16: $($a:literal),* ; $($b:literal),*) => { $crate::code!(@ "16" [$($a)*] [$($b)*] []) };
    (16: $($a:literal),* ; $($b:literal),* ; $($c:literal),*) => { $crate::code!(@ "16" [$($a)*] [$($b)*] [$($c)*]) };
    ($($a:literal),+) => { $crate::code!(@ "64" [] [$($a)*] []) };
    ($($a:literal),* ; $($b:literal),*) => { $crate::code!(@ "64" [$($a)*] [$($b)*] []) };
    ($($a:literal),* ; $($b:literal),* ; $($c:literal),*) => { $crate::code!(@ "64" [$($a)*] [$($b)*] [$($c)*]) };
}
