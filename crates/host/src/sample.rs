//! Where a thread's processor time goes: a statistical sampler.
//!
//! ```text
//!   the thread's own CPU clock ──> timer ──SIGPROF──> handler ──> one sample more, of
//!                                                                  the code at the interrupted address, where that is declared;
//!                                                                  else of what the thread last said it does
//! ```
//!
//! A thread says what it does by a plain store, whether it is sampled or not. A thread that sleeps is not sampled, nor woken.
#![allow(unsafe_code)] // the fence: signals and timers are system calls

use std::cell::Cell;
use std::io;
use std::ops::Range;
use std::ptr::{null, null_mut};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

/// Kinds of samples there can be; a power of two.
pub const SAMPLE_KINDS: usize = 8;

/// The signal that takes samples. Handlers that run on the same alternate stack keep it out while they do.
pub const SAMPLE_SIGNAL: i32 = libc::SIGPROF;

/// Processor time between two samples. The host looks at such timers when its own timer ticks: where it does so less often
/// than this, there are fewer samples.
const INTERVAL_NS: i64 = 1_000_000;

/// How often a thread was found doing what. The thread itself writes, anyone may read.
#[derive(Debug, Default)]
pub struct Samples {
    doing: AtomicU8,
    counts: [AtomicU64; SAMPLE_KINDS],
    code: [Code; 2],
}

/// A piece of code whose kind needs not be said.
#[derive(Debug, Default)]
struct Code {
    start: AtomicU64,
    end: AtomicU64,
    kind: AtomicU8,
}

impl Samples {
    /// The thread does something of this kind from now on.
    #[inline]
    pub fn say(&self, kind: u8) {
        self.doing.store(kind, Ordering::Relaxed);
    }

    /// The same; returns what it did before.
    #[inline]
    pub fn change(&self, kind: u8) -> u8 {
        let before = self.doing.load(Ordering::Relaxed);
        self.say(kind);
        before
    }

    /// Declares two pieces of code, by where they run. Before the thread that runs them is sampled.
    pub fn declare(&self, pieces: [(Range<u64>, u8); 2]) {
        for (code, (range, kind)) in self.code.iter().zip(pieces) {
            code.start.store(range.start, Ordering::Relaxed);
            code.end.store(range.end, Ordering::Relaxed);
            code.kind.store(kind, Ordering::Relaxed);
        }
    }

    /// Samples of a kind.
    pub fn count(&self, kind: u8) -> u64 {
        self.counts[usize::from(kind) % SAMPLE_KINDS].load(Ordering::Relaxed)
    }

    /// Notes that the thread was found at `address`. Async-signal-safe: atomics of this value only.
    fn take(&self, address: u64) {
        let load = |cell: &AtomicU64| cell.load(Ordering::Relaxed);
        let known = self.code.iter().find(|code| (load(&code.start)..load(&code.end)).contains(&address));
        let kind = known.map_or(&self.doing, |code| &code.kind).load(Ordering::Relaxed);
        self.counts[usize::from(kind) % SAMPLE_KINDS].fetch_add(1, Ordering::Relaxed);
    }

    /// Samples this thread while `work` runs. An error says why there are no samples; the work is done all the same.
    pub fn during<R>(&self, work: impl FnOnce() -> R) -> (R, io::Result<()>) {
        let timer = Timer::start(self);
        let result = work();
        (result, timer.map(drop))
    }
}

thread_local! {
    /// Where samples of this thread go, if anywhere.
    static SAMPLED: Cell<*const Samples> = const { Cell::new(null()) };
}

/// Samples the thread that made it until it is dropped, there.
struct Timer {
    id: libc::timer_t,
}

impl Timer {
    fn start(samples: &Samples) -> io::Result<Self> {
        needs_stack()?;
        install()?;
        // SAFETY: zero is a valid value of this C structure.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = SAMPLE_SIGNAL;
        // SAFETY: takes nothing, always succeeds.
        event.sigev_notify_thread_id = unsafe { libc::gettid() };
        let mut id: libc::timer_t = null_mut();
        // SAFETY: both pointers are to values that live.
        done(unsafe { libc::timer_create(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut event, &raw mut id) })?;
        let timer = Self { id };
        SAMPLED.set(samples);
        let interval = libc::timespec { tv_sec: 0, tv_nsec: INTERVAL_NS };
        let times = libc::itimerspec { it_interval: interval, it_value: interval };
        // SAFETY: the timer just made; the structure lives.
        done(unsafe { libc::timer_settime(timer.id, 0, &raw const times, null_mut()) })?;
        Ok(timer)
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        // First: a signal may be under way.
        SAMPLED.set(null());
        // SAFETY: made by `start`, deleted once.
        unsafe { libc::timer_delete(self.id) };
    }
}

fn done(status: i32) -> io::Result<()> {
    if status == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Refuses a thread without an alternate signal stack: code that uses the stack pointer for something else may run on it.
/// Threads of the standard library have one.
fn needs_stack() -> io::Result<()> {
    // SAFETY: zero is a valid value of this C structure.
    let mut stack: libc::stack_t = unsafe { std::mem::zeroed() };
    // SAFETY: asks only; the structure lives.
    done(unsafe { libc::sigaltstack(null(), &raw mut stack) })?;
    let missing = stack.ss_flags & libc::SS_DISABLE != 0;
    if missing { Err(io::Error::other("the thread has no alternate signal stack")) } else { Ok(()) }
}

/// Makes sure that the process has the handler. It stays: a signal of a timer that is gone must not end the process.
fn install() -> io::Result<()> {
    static STATUS: OnceLock<i32> = OnceLock::new();
    let status = *STATUS.get_or_init(|| {
        // SAFETY: zero is a valid value of this C structure.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = handler as *const () as usize;
        // What it interrupts goes on.
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        // SAFETY: the structures live; the handler is async-signal-safe.
        unsafe {
            libc::sigfillset(&raw mut action.sa_mask);
            libc::sigaction(SAMPLE_SIGNAL, &raw const action, null_mut())
        }
    });
    if status == 0 { Ok(()) } else { Err(io::Error::other("no handler for SIGPROF")) }
}

extern "C" fn handler(_signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes valid pointers. Samples live while they are set: `Samples::during` borrows them, and the
    // timer that set them takes them back before it returns, on this thread.
    unsafe {
        if let Some(samples) = SAMPLED.get().as_ref()
            && (*info).si_code == libc::SI_TIMER
        {
            samples.take((*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs[libc::REG_RIP as usize] as u64);
        }
    }
}

/// Processor time a thread has used, nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ThreadTime {
    /// All of it.
    pub total_ns: u64,
    /// In the host's kernel: page faults, system calls.
    pub kernel_ns: u64,
}

impl ThreadTime {
    /// What this thread has used so far.
    pub fn now() -> Self {
        // SAFETY: zero is a valid value of this C structure.
        let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
        // SAFETY: the structure lives; for the calling thread the call cannot fail.
        unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) };
        let ns = |time: libc::timeval| time.tv_sec as u64 * 1_000_000_000 + time.tv_usec as u64 * 1000;
        let kernel_ns = ns(usage.ru_stime);
        Self { total_ns: ns(usage.ru_utime) + kernel_ns, kernel_ns }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAID: u8 = 3;

    #[test]
    fn declared_code_is_known_by_its_address_and_all_else_by_what_was_said() {
        let samples = Samples::default();
        samples.declare([(0x1000..0x2000, 1), (0x2000..0x5000, 2)]);
        samples.say(SAID);
        for (address, kind) in [(0xfff, SAID), (0x1000, 1), (0x1fff, 1), (0x2000, 2), (0x4fff, 2), (0x5000, SAID)] {
            let before = samples.count(kind);
            samples.take(address);
            assert_eq!(samples.count(kind), before + 1, "{address:#x}");
        }
        assert_eq!(samples.change(4), SAID);
        samples.take(0);
        assert_eq!((samples.count(4), samples.count(SAID)), (1, 2));
    }

    #[test]
    fn a_thread_that_works_is_sampled_until_it_is_done() {
        let samples = Samples::default();
        samples.say(SAID);
        let before = ThreadTime::now();
        let ((), status) = samples.during(|| {
            // However long that takes: the timer counts processor time, of which this is the only user.
            while samples.count(SAID) < 3 {
                std::hint::spin_loop();
            }
        });
        status.unwrap();
        let taken = samples.count(SAID);
        assert!(ThreadTime::now().total_ns > before.total_ns);
        while ThreadTime::now().total_ns < before.total_ns + 100_000_000 {}
        assert_eq!(samples.count(SAID), taken, "not sampled any more");
    }

    #[test]
    fn a_signal_that_no_timer_sent_counts_nothing() {
        let samples = Samples::default();
        let ((), status) = samples.during(|| {
            for _ in 0..100 {
                // SAFETY: the handler is installed, and ignores it.
                unsafe { libc::raise(SAMPLE_SIGNAL) };
            }
        });
        status.unwrap();
        assert!(samples.count(0) < 100, "none but those that were due");
    }
}
