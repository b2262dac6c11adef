//! How other threads get a vCPU out of guest code, without a race.
//!
//! ```text
//!   vCPU:    thread = me; immediate_exit = 0; look at the signal; KVM_RUN; thread = 0
//!   others:  raise the signal; immediate_exit = 1; where thread is not 0: send it a signal of the system
//! ```
//!
//! Whoever raises before the vCPU looks is seen. Whoever raises after that sets `immediate_exit` after it was cleared, so
//! that KVM_RUN returns at once; and where it has looked at that already, the system's signal ends it.

use std::io;
use std::os::fd::AsFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};

use crate::run_page::RunPage;

/// The signal that ends KVM_RUN; its handler does nothing. A real-time one that the C library leaves alone.
fn number() -> libc::c_int {
    libc::SIGRTMIN() + 3
}

extern "C" fn ignore(_signal: libc::c_int) {}

/// Installs the handler, once a process.
fn install() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let installed = INSTALLED.get_or_init(|| {
        // SAFETY: zero is a valid `sigaction`: no flags, an empty mask; the handler does nothing, whatever it interrupts.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = ignore as *const () as usize;
        // Without SA_RESTART; with an alternate stack where a thread has one, as other handlers here.
        action.sa_flags = libc::SA_ONSTACK;
        // SAFETY: the action lives through the call; the old one is not asked for.
        match unsafe { libc::sigaction(number(), &raw const action, std::ptr::null_mut()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL)),
        }
    });
    installed.map_err(io::Error::from_raw_os_error)
}

/// Reaches one vCPU.
#[derive(Debug)]
pub(crate) struct Kick {
    page: RunPage,
    /// The thread that is about to run the vCPU, or does; 0 where none is.
    thread: AtomicI32,
}

impl Kick {
    /// For the vCPU behind `vcpu`, with its shared memory's size.
    pub(crate) fn new(vcpu: impl AsFd, bytes: usize) -> io::Result<Self> {
        install()?;
        Ok(Self { page: RunPage::new(vcpu, bytes)?, thread: AtomicI32::new(0) })
    }

    /// The vCPU's shared memory.
    pub(crate) fn page(&self) -> &RunPage {
        &self.page
    }

    /// The calling thread is about to run the vCPU: from now on it is woken.
    pub(crate) fn arm(&self, thread: libc::pid_t) {
        self.thread.store(thread, Ordering::SeqCst);
        self.page.immediate_exit().store(0, Ordering::SeqCst);
    }

    /// The vCPU is out of guest code.
    pub(crate) fn disarm(&self) {
        self.thread.store(0, Ordering::SeqCst);
    }

    /// Has the next KVM_RUN only finish what the last exit left.
    pub(crate) fn only_finish(&self) {
        self.page.immediate_exit().store(1, Ordering::SeqCst);
    }

    /// Gets the vCPU out of guest code, or keeps it from entering.
    pub(crate) fn kick(&self) {
        self.page.immediate_exit().store(1, Ordering::SeqCst);
        let thread = self.thread.load(Ordering::SeqCst);
        if thread != 0 {
            // SAFETY: a system call on numbers. A thread of this process that is not meant any more runs the handler.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, number()) };
        }
    }
}

/// The calling thread, as signals name it.
pub(crate) fn this_thread() -> libc::pid_t {
    // SAFETY: a system call without arguments.
    unsafe { libc::gettid() }
}
