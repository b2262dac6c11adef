//! The processor's side: a child process that runs cases and catches what they raise.
//!
//! ```text
//!   parent ─ byte ─> pipe ─> child: for each case in the mailbox { fill code and arena, load registers, jump }
//!     ▲                        │ INT3 after the instruction, or its fault: a signal
//!     └─ byte <── pipe ────────┴─ handler: registers into the mailbox, return to the loop
//! ```
//!
//! The child is forked from a threaded process: it allocates nothing and takes no lock.

use std::arch::naked_asm;
use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicU32, Ordering};

use super::case::{
    ARENA, ARENA_BYTES, CODE, CODE_BYTES, Case, Code, DATA_BASE_16, DATA_LIMIT_16, NO_VECTOR, Outcome, READ_ONLY,
    XSAVE_BYTES,
};

/// Cases a turn.
pub(super) const BATCH: usize = 64;
/// A turn that takes longer hangs.
const PATIENCE_MS: c_int = 20_000;

#[repr(C, align(64))]
pub(super) struct Slot {
    pub case: Case,
    pub outcome: Outcome,
}

#[repr(C, align(64))]
struct Mailbox {
    slots: [Slot; BATCH],
    count: AtomicU32,
    /// The case that runs.
    current: AtomicU32,
}

/// The child, and the memory shared with it.
pub(super) struct Native {
    child: libc::pid_t,
    mailbox: *mut Mailbox,
    to_child: c_int,
    from_child: c_int,
}

impl Native {
    pub(super) fn start() -> Self {
        let (mut down, mut up) = ([0; 2], [0; 2]);
        // SAFETY: plain system calls; the fork's child side keeps to system calls and memory that is its own or shared.
        unsafe {
            let mailbox = map(0, size_of::<Mailbox>(), libc::PROT_READ | libc::PROT_WRITE, libc::MAP_ANONYMOUS, -1);
            let arena = libc::memfd_create(c"oracle".as_ptr(), libc::MFD_CLOEXEC);
            assert!(arena >= 0 && libc::ftruncate(arena, ARENA_BYTES as i64) == 0);
            assert!(libc::pipe2(down.as_mut_ptr(), libc::O_CLOEXEC) == 0);
            assert!(libc::pipe2(up.as_mut_ptr(), libc::O_CLOEXEC) == 0);
            for index in 0..BATCH {
                (&raw mut (*mailbox.cast::<Mailbox>()).slots[index].case.code).write(Code::Bits64);
            }
            let child = libc::fork();
            assert!(child >= 0, "fork");
            if child == 0 {
                libc::close(down[1]);
                serve(mailbox.cast(), arena, down[0], up[1]);
            }
            libc::close(arena);
            libc::close(down[0]);
            libc::close(up[1]);
            Self { child, mailbox: mailbox.cast(), to_child: down[1], from_child: up[0] }
        }
    }

    /// The mailbox; the child touches it during [`Native::run`] only.
    pub(super) fn slots(&mut self) -> &mut [Slot; BATCH] {
        // SAFETY: mapped and large enough; all but `code`, which `start` set, may be zero.
        unsafe { &mut (*self.mailbox).slots }
    }

    /// Runs the first `count` cases. An error is the number of the case that killed or hung the child.
    pub(super) fn run(&mut self, count: usize) -> Result<(), usize> {
        let mut ready = libc::pollfd { fd: self.from_child, events: libc::POLLIN, revents: 0 };
        let mut byte = [1_u8];
        // SAFETY: buffers are local; the mailbox is mapped.
        unsafe {
            (*self.mailbox).count.store(count as u32, Ordering::SeqCst);
            assert_eq!(libc::write(self.to_child, byte.as_ptr().cast(), 1), 1);
            let polled = libc::poll(&raw mut ready, 1, PATIENCE_MS);
            if polled == 1 && libc::read(self.from_child, byte.as_mut_ptr().cast(), 1) == 1 {
                return Ok(());
            }
            Err((*self.mailbox).current.load(Ordering::SeqCst) as usize)
        }
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        // SAFETY: the child, the pipes and the mapping are this value's own.
        unsafe {
            libc::kill(self.child, libc::SIGKILL);
            libc::waitpid(self.child, std::ptr::null_mut(), 0);
            libc::close(self.to_child);
            libc::close(self.from_child);
            libc::munmap(self.mailbox.cast(), size_of::<Mailbox>());
        }
    }
}

/// # Safety
/// A fixed address must be one that nobody uses.
unsafe fn map(at: u64, bytes: usize, protection: c_int, kind: c_int, fd: c_int) -> *mut u8 {
    let fixed = if at == 0 { 0 } else { libc::MAP_FIXED_NOREPLACE };
    // SAFETY: by the caller's promise.
    let mapped = unsafe { libc::mmap(at as *mut c_void, bytes, protection, libc::MAP_SHARED | kind | fixed, fd, 0) };
    if mapped == libc::MAP_FAILED {
        // SAFETY: ends this process, parent or child; neither can go on.
        unsafe { libc::_exit(90) };
    }
    mapped.cast()
}

/// The child's loop.
///
/// # Safety
/// To be called once, in a forked child, with the mailbox mapped.
unsafe fn serve(mailbox: *mut Mailbox, arena: c_int, from_parent: c_int, to_parent: c_int) -> ! {
    const ALL: c_int = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
    const READ_WRITE: c_int = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the fixed addresses are in the low 4 GiB, where a position-independent program has nothing.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        let code = map(CODE, CODE_BYTES, ALL, libc::MAP_ANONYMOUS, -1);
        let view = map(0, ARENA_BYTES, READ_WRITE, 0, arena);
        // All pages present: a page that is not yet there shows in error codes.
        map(ARENA, ARENA_BYTES, READ_WRITE, libc::MAP_POPULATE, arena);
        libc::mprotect(READ_ONLY as *mut c_void, 0x1000, libc::PROT_READ);
        set_ldt();
        catch_signals();
        loop {
            let mut byte = 0_u8;
            if libc::read(from_parent, (&raw mut byte).cast(), 1) != 1 {
                libc::_exit(0);
            }
            for index in 0..(*mailbox).count.load(Ordering::SeqCst) {
                (*mailbox).current.store(index, Ordering::SeqCst);
                one(&raw mut (*mailbox).slots[index as usize], code, view);
            }
            libc::write(to_parent, (&raw const byte).cast(), 1);
        }
    }
}

/// Runs one case.
///
/// # Safety
/// As for [`serve`].
unsafe fn one(slot: *mut Slot, code: *mut u8, view: *mut u8) {
    // SAFETY: the mailbox is mapped and quiet; `enter` returns when a signal has come.
    unsafe {
        let case = &(*slot).case;
        code.write_bytes(0xcc, CODE_BYTES);
        code.add(case.place()).copy_from_nonoverlapping(case.bytes.as_ptr(), case.length);
        view.copy_from_nonoverlapping(case.memory.as_ptr(), ARENA_BYTES);
        CURRENT = slot;
        TARGET = case.rip | u64::from(case.code.code_selector()) << 32;
        DATA = case.code.data_selector().into();
        if case.vector {
            xrstor(&raw const case.xsave);
        }
        enter(case.gpr.as_ptr());
        if case.vector {
            xrstor(&raw const CLEAN);
        }
        (*slot).outcome.memory.as_mut_ptr().copy_from_nonoverlapping(view, ARENA_BYTES);
    }
}

static CLEAN: super::case::Xsave = super::case::Xsave::reset();

/// # Safety
/// The host must have XSAVE.
unsafe fn xrstor(area: *const super::case::Xsave) {
    // SAFETY: the area is aligned and well-formed.
    unsafe { std::arch::asm!("xrstor64 [{}]", in(reg) area, in("eax") 7, in("edx") 0, options(nostack)) };
}

static mut CURRENT: *mut Slot = std::ptr::null_mut();
static mut HOST_RSP: u64 = 0;
/// A far pointer: a 32-bit offset and a selector.
static mut TARGET: u64 = 0;
/// The selector for DS, ES and SS.
static mut DATA: u64 = 0;

/// Loads 16 registers and RFLAGS from `registers`, and jumps to [`TARGET`]. Comes back through [`leave`].
#[unsafe(naked)]
unsafe extern "C" fn enter(registers: *const u64) {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "mov [rip + {host_rsp}], rsp",
        "mov eax, [rip + {data}]",
        "mov ds, eax",
        "mov es, eax",
        "mov ss, eax",
        "push qword ptr [rdi + 16 * 8]",
        "popfq",
        "mov rax, [rdi]",
        "mov rcx, [rdi + 8]",
        "mov rdx, [rdi + 16]",
        "mov rbx, [rdi + 24]",
        "mov rbp, [rdi + 40]",
        "mov rsi, [rdi + 48]",
        "mov r8, [rdi + 64]",
        "mov r9, [rdi + 72]",
        "mov r10, [rdi + 80]",
        "mov r11, [rdi + 88]",
        "mov r12, [rdi + 96]",
        "mov r13, [rdi + 104]",
        "mov r14, [rdi + 112]",
        "mov r15, [rdi + 120]",
        "mov rsp, [rdi + 32]",
        "mov rdi, [rdi + 56]",
        "jmp fword ptr [rip + {target}]",
        host_rsp = sym HOST_RSP,
        target = sym TARGET,
        data = sym DATA,
    )
}

/// Where the signal handler returns to: the end of [`enter`].
#[unsafe(naked)]
unsafe extern "C" fn leave() {
    naked_asm!(
        "mov rsp, [rip + {host_rsp}]",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
        host_rsp = sym HOST_RSP,
    )
}

/// The handler's first steps: RFLAGS.AC may be on, which compiled code does not expect.
#[unsafe(naked)]
unsafe extern "C" fn on_signal(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    naked_asm!(
        "pushfq",
        "and qword ptr [rsp], ~0x40000",
        "popfq",
        "jmp {caught}",
        caught = sym caught,
    )
}

/// The order of [`Case::gpr`] in a signal frame.
const ORDER: [c_int; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

const VECTOR_BP: u64 = 3;
const VECTOR_PF: u64 = 14;

/// Writes down what the case came to, and makes the signal return to [`leave`].
unsafe extern "C" fn caught(_signal: c_int, _info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel hands over a valid frame; CURRENT was set before the case began.
    unsafe {
        let frame = &mut *context.cast::<libc::ucontext_t>();
        let registers = &mut frame.uc_mcontext.gregs;
        let case = &(*CURRENT).case;
        let outcome = &mut (*CURRENT).outcome;
        for (to, from) in outcome.gpr.iter_mut().zip(ORDER) {
            *to = registers[from as usize] as u64;
        }
        outcome.rip = registers[libc::REG_RIP as usize] as u64;
        outcome.rflags = registers[libc::REG_EFL as usize] as u64;
        outcome.fault = registers[libc::REG_TRAPNO as usize] as u64;
        outcome.error = registers[libc::REG_ERR as usize] as u64;
        outcome.address = if outcome.fault == VECTOR_PF { registers[libc::REG_CR2 as usize] as u64 } else { 0 };
        if outcome.fault == VECTOR_BP {
            outcome.rip -= 1;
            outcome.fault = NO_VECTOR;
        } else if outcome.rip != case.rip {
            // The instruction is done; where it led, there is nothing to fetch.
            outcome.fault = NO_VECTOR;
        }
        if case.vector {
            let saved = frame.uc_mcontext.fpregs.cast::<u8>();
            outcome.xsave.0.as_mut_ptr().copy_from_nonoverlapping(saved, XSAVE_BYTES);
        }
        registers[libc::REG_RIP as usize] = leave as *const () as i64;
        registers[libc::REG_EFL as usize] = 0x202;
        // CS in the low word, SS in the high one.
        let selectors = (0x2b << 48) | 0x33;
        registers[libc::REG_CSGSFS as usize] = registers[libc::REG_CSGSFS as usize] & 0xffff_ffff_0000 | selectors;
    }
}

/// The kernel's `struct user_desc` (arch/x86/include/uapi/asm/ldt.h).
#[repr(C)]
struct UserDescriptor {
    entry_number: u32,
    base: u32,
    limit: u32,
    /// seg_32bit 0, contents 2:1 (0 data, 2 code), read_exec_only 3, limit_in_pages 4, seg_not_present 5, useable 6.
    flags: u32,
}

const CONTENTS_CODE: u32 = 2 << 1;
const USEABLE: u32 = 1 << 6;

/// The 16-bit segments of [`Code::Bits16`]. Where the kernel has no LDTs, loading their selectors kills the child, which
/// says enough.
///
/// # Safety
/// In the child only.
unsafe fn set_ldt() {
    const WRITE: c_int = 1;
    let code = UserDescriptor {
        entry_number: 0,
        base: CODE as u32,
        limit: CODE_BYTES as u32 - 1,
        flags: CONTENTS_CODE | USEABLE,
    };
    let data = UserDescriptor { entry_number: 1, base: DATA_BASE_16 as u32, limit: DATA_LIMIT_16, flags: USEABLE };
    for descriptor in [code, data] {
        // SAFETY: the system call reads the structure and changes this process's LDT.
        unsafe {
            libc::syscall(libc::SYS_modify_ldt, WRITE, &raw const descriptor, size_of::<UserDescriptor>());
        }
    }
}

/// # Safety
/// In the child only.
unsafe fn catch_signals() {
    const STACK: usize = 256 * 1024;
    // SAFETY: the stack is fresh memory, the handler has the three-argument form.
    unsafe {
        let stack = map(0, STACK, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_ANONYMOUS, -1);
        let place = libc::stack_t { ss_sp: stack.cast(), ss_flags: 0, ss_size: STACK };
        libc::sigaltstack(&raw const place, std::ptr::null_mut());
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_signal as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        for signal in [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP] {
            libc::sigaction(signal, &raw const action, std::ptr::null_mut());
        }
    }
}
