//! Which threads hear signals that are for the process.
#![allow(unsafe_code)] // the fence: a signal mask is the C library's

/// Signals that are sent to a process, and handled on whichever of its threads the kernel chooses.
const FOR_THE_PROCESS: [i32; 9] = [
    libc::SIGINT,
    libc::SIGTERM,
    libc::SIGHUP,
    libc::SIGQUIT,
    libc::SIGWINCH,
    libc::SIGCHLD,
    libc::SIGALRM,
    libc::SIGUSR1,
    libc::SIGUSR2,
];

/// Has other threads hear signals that are for the process. A thread whose stack pointer is something else meanwhile, as
/// translated code's is, cannot run handlers that do not ask for an alternate stack; those of libraries do not.
pub fn leave_signals_to_other_threads() {
    // SAFETY: zero is a valid value of this C structure, which the calls below only read and write.
    let mut signals: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set lives; the numbers are signals that can be blocked, so nothing here fails.
    unsafe {
        libc::sigemptyset(&raw mut signals);
        for signal in FOR_THE_PROCESS {
            libc::sigaddset(&raw mut signals, signal);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const signals, std::ptr::null_mut());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Signals that the calling thread does not hear, a bit each from signal 1 on.
    fn blocked() -> u64 {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let mask = status.lines().find_map(|line| line.strip_prefix("SigBlk:")).unwrap();
        u64::from_str_radix(mask.trim(), 16).unwrap()
    }

    #[test]
    fn a_thread_leaves_signals_for_the_process_to_others_and_keeps_its_own() {
        let before = blocked();
        let (there, own) = std::thread::spawn(|| {
            leave_signals_to_other_threads();
            (blocked(), [crate::SAMPLE_SIGNAL, libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGRTMIN() + 3])
        })
        .join()
        .unwrap();
        let bit = |signal: i32| 1_u64 << (signal - 1);
        assert!(FOR_THE_PROCESS.iter().all(|&signal| there & bit(signal) != 0), "{there:#x}");
        assert!(own.iter().all(|&signal| there & bit(signal) == before & bit(signal)), "{there:#x}");
        assert_eq!(blocked(), before, "of one thread only");
    }
}
