//! Host faults of translated code, turned into exits.
//!
//! Translated code runs some instructions for the host's processor to refuse: a division by zero, an unmasked
//! floating-point exception, a non-canonical address, a misaligned vector operand, a kernel address in user mode. The signal
//! handler then points the thread at the thunk that leaves translated code; the interpreter runs the instruction once
//! more and raises what is due. A shadow stack that is full is emptied. All other faults go to whoever handled them before.

use std::cell::Cell;
use std::ops::Range;
use std::ptr::{null, null_mut};
use std::sync::OnceLock;

use crate::home::Hot;

/// What the handler needs to know of the vCPU a thread runs.
pub(super) struct Active {
    pub code: Range<u64>,
    pub thunk: u64,
    pub hot: *mut Hot,
    /// Guard areas of the shadow stacks, and where those begin.
    pub shadows: [(Range<u64>, u64); 2],
}

thread_local! {
    /// What runs on this thread, if anything.
    static ACTIVE: Cell<*const Active> = const { Cell::new(null()) };
}

const SIGNALS: [i32; 3] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE];

/// Who handled the signals before.
static BEFORE: OnceLock<[libc::sigaction; 3]> = OnceLock::new();

/// Makes sure that the process has the handler.
pub(super) fn install() {
    BEFORE.get_or_init(|| {
        SIGNALS.map(|signal| {
            // SAFETY: zero is a valid value of this C structure of integers and pointers.
            let mut before: libc::sigaction = unsafe { std::mem::zeroed() };
            // SAFETY: as above.
            let mut ours: libc::sigaction = unsafe { std::mem::zeroed() };
            ours.sa_sigaction = handler as *const () as usize;
            ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
            // SAFETY: the structures live; the handler below is async-signal-safe. No sample is taken on top of it: the
            // alternate stack is small.
            unsafe {
                libc::sigaddset(&raw mut ours.sa_mask, host::SAMPLE_SIGNAL);
                libc::sigaction(signal, &raw const ours, &raw mut before);
            }
            before
        })
    });
}

/// Says what runs on this thread until [`leave`]; it must live as long.
pub(super) fn enter(active: *const Active) {
    ACTIVE.set(active);
}

/// Nothing runs on this thread any more.
pub(super) fn leave() {
    ACTIVE.set(null());
}

extern "C" fn handler(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let active = ACTIVE.get();
    // SAFETY: the kernel passes a valid context; `active` lives while it is set, and this thread is inside `enter`.
    let handled = unsafe {
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let rip = registers[libc::REG_RIP as usize] as u64;
        match active.as_ref() {
            Some(active) if active.code.contains(&rip) => {
                let address = (*info).si_addr() as u64;
                match active.shadows.iter().find(|(guard, _)| guard.contains(&address)) {
                    Some((_, begin)) => registers[libc::REG_RSP as usize] = *begin as i64,
                    None => {
                        (*active.hot).fault = rip;
                        registers[libc::REG_RIP as usize] = active.thunk as i64;
                    }
                }
                true
            }
            _ => false,
        }
    };
    if !handled {
        pass_on(signal, info, context);
    }
}

/// Does what would have happened without this handler.
fn pass_on(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let before = BEFORE.get().zip(SIGNALS.iter().position(|known| *known == signal)).map(|(all, at)| &all[at]);
    match before {
        Some(before) if before.sa_sigaction != libc::SIG_DFL && before.sa_sigaction != libc::SIG_IGN => {
            if before.sa_flags & libc::SA_SIGINFO != 0 {
                // SAFETY: with SA_SIGINFO the address is that of such a function.
                let handler = unsafe {
                    std::mem::transmute::<usize, extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void)>(
                        before.sa_sigaction,
                    )
                };
                handler(signal, info, context);
            } else {
                // SAFETY: without it, of such a one.
                let handler = unsafe { std::mem::transmute::<usize, extern "C" fn(i32)>(before.sa_sigaction) };
                handler(signal);
            }
        }
        // SAFETY: the default action, which the fault meets when it happens again.
        _ => unsafe {
            libc::signal(signal, libc::SIG_DFL);
        },
    }
}

/// Bytes of a shadow stack, and of the guard below it.
const SHADOW: usize = 256 << 10;
const GUARD: usize = 64 << 10;

/// The shadow return stack of one privilege: host return addresses, beside the guest's own.
pub(super) struct Shadow {
    at: *mut u8,
}

// SAFETY: the mapping belongs to this value alone.
unsafe impl Send for Shadow {}

impl Shadow {
    pub(super) fn new() -> std::io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address the kernel chooses.
        let at = unsafe { libc::mmap(null_mut(), GUARD + SHADOW, protection, flags, -1, 0) };
        if at == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        // SAFETY: the mapping just made.
        unsafe { libc::mprotect(at, GUARD, libc::PROT_NONE) };
        Ok(Self { at: at.cast() })
    }

    /// Where it begins: below this it grows downwards, and here lies what an empty stack returns to.
    pub(super) fn begin(&self) -> u64 {
        self.at as u64 + (GUARD + SHADOW) as u64 - 64
    }

    pub(super) fn guard(&self) -> Range<u64> {
        self.at as u64..self.at as u64 + GUARD as u64
    }

    /// Sets what an empty stack returns to.
    pub(super) fn set_bottom(&self, target: u64) {
        // SAFETY: inside the mapping, and aligned.
        unsafe { self.at.add(GUARD + SHADOW - 64).cast::<u64>().write(target) };
    }
}

impl Drop for Shadow {
    fn drop(&mut self) {
        // SAFETY: this value's own mapping.
        unsafe { libc::munmap(self.at.cast(), GUARD + SHADOW) };
    }
}
