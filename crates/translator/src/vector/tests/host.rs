//! The oracle: the same bytes on the host's processor, in this process.
//!
//! A trampoline loads all registers, runs the instruction and stores all registers. What the instruction raises on the
//! host arrives as a signal; its handler goes on after the instruction.

use std::mem::offset_of;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use iced_x86::Register;
use iced_x86::code_asm::{
    AsmRegister64, CodeAssembler, dword_ptr, eax, edx, get_gpr64, qword_ptr, r12, r13, r14, r15, rbp, rbx, rdi, rsp,
};

use crate::arena::Arena;

/// Registers before and after.
#[repr(C, align(64))]
#[derive(Clone)]
pub(super) struct State {
    pub area: [u8; 2688],
    pub gpr: [u64; 16],
    pub flags: u64,
    host_mxcsr: u64,
    host_flags: u64,
}

impl State {
    pub(super) fn new() -> Self {
        Self { area: [0; 2688], gpr: [0; 16], flags: 2, host_mxcsr: 0x1f80, host_flags: 0x202 }
    }
}

/// Where the memory operands of both sides lie.
pub(super) struct Window {
    pub at: u64,
    pub bytes: usize,
}

/// Room for some thousands of trampolines.
const ARENA_BYTES: usize = 4 << 20;

/// Where a signal handler goes on; the signal it got.
static RECOVER: AtomicU64 = AtomicU64::new(0);
static SIGNAL: AtomicU64 = AtomicU64::new(0);

extern "C" fn on_signal(signal: i32, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    SIGNAL.store(signal as u64, Ordering::SeqCst);
    // SAFETY: the kernel passes a ucontext to handlers installed with SA_SIGINFO.
    let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
    context.uc_mcontext.gregs[libc::REG_RIP as usize] = RECOVER.load(Ordering::SeqCst) as i64;
}

/// The host as oracle; one at a time.
pub(super) struct Host {
    arena: Arena,
    _one: MutexGuard<'static, ()>,
}

impl Host {
    /// Maps `window` at its own address, so that addresses mean the same on both sides.
    pub(super) fn new(window: &Window) -> Self {
        static ONE: Mutex<()> = Mutex::new(());
        let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: NOREPLACE keeps the mapping off anything that is there.
        let at = unsafe {
            libc::mmap(
                window.at as *mut libc::c_void,
                window.bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
                -1,
                0,
            )
        };
        assert!(at as u64 == window.at || at == libc::MAP_FAILED, "mapped elsewhere");
        for signal in [libc::SIGFPE, libc::SIGILL] {
            // SAFETY: a handler with the signature that SA_SIGINFO asks for; it only touches atomics and its context.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = on_signal as extern "C" fn(_, _, _) as usize;
                action.sa_flags = libc::SA_SIGINFO;
                assert_eq!(libc::sigaction(signal, &action, std::ptr::null_mut()), 0);
            }
        }
        Self { arena: Arena::new(ARENA_BYTES, 0).unwrap(), _one: one }
    }

    /// Runs `bytes`; returns the signal raised, 0 for none.
    pub(super) fn run(&mut self, bytes: &[u8], state: &mut State) -> u64 {
        let (head, tail) = (prologue(bytes), epilogue());
        let code = [&head[..], &tail[..]].concat();
        let at = self.arena.add(&code).unwrap_or_else(|| {
            self.arena = Arena::new(ARENA_BYTES, 0).unwrap(); // nobody runs what was in the old one
            self.arena.add(&code).expect("an empty arena has room")
        });
        RECOVER.store(at.as_ptr() as u64 + head.len() as u64, Ordering::SeqCst);
        SIGNAL.store(0, Ordering::SeqCst);
        // SAFETY: the trampoline keeps the calling convention and touches `state` and the window only.
        unsafe {
            let function: extern "sysv64" fn(*mut State) = std::mem::transmute(at);
            function(state);
        }
        SIGNAL.load(Ordering::SeqCst)
    }
}

fn register(number: usize) -> AsmRegister64 {
    get_gpr64(Register::RAX + number as u32).expect("a register")
}

fn prologue(bytes: &[u8]) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    for saved in [rbx, rbp, r12, r13, r14, r15, rdi] {
        a.push(saved).unwrap();
    }
    a.mov(eax, 7).unwrap();
    a.xor(edx, edx).unwrap();
    a.xrstor64(rdi + 0).unwrap();
    a.push(qword_ptr(rdi + offset_of!(State, flags))).unwrap();
    a.popfq().unwrap();
    for number in (0..16).filter(|number| *number != 4 && *number != 7).chain([7]) {
        a.mov(register(number), qword_ptr(rdi + offset_of!(State, gpr) + number * 8)).unwrap();
    }
    a.db(bytes).unwrap();
    a.assemble(0).unwrap()
}

fn epilogue() -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    a.xchg(qword_ptr(rsp), rdi).unwrap();
    for number in (0..16).filter(|number| *number != 4 && *number != 7) {
        a.mov(qword_ptr(rdi + offset_of!(State, gpr) + number * 8), register(number)).unwrap();
    }
    a.pop(qword_ptr(rdi + offset_of!(State, gpr) + 7 * 8)).unwrap();
    a.pushfq().unwrap();
    a.pop(qword_ptr(rdi + offset_of!(State, flags))).unwrap();
    a.mov(eax, 7).unwrap();
    a.xor(edx, edx).unwrap();
    a.xsave64(rdi + 0).unwrap();
    a.fninit().unwrap();
    a.ldmxcsr(dword_ptr(rdi + offset_of!(State, host_mxcsr))).unwrap();
    a.vzeroupper().unwrap();
    a.push(qword_ptr(rdi + offset_of!(State, host_flags))).unwrap();
    a.popfq().unwrap();
    for saved in [r15, r14, r13, r12, rbp, rbx] {
        a.pop(saved).unwrap();
    }
    a.ret().unwrap();
    a.assemble(0).unwrap()
}
