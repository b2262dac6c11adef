//! The system calls that the standard library does not have, or hides: all unsafe code of this program but the vectors.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

fn checked(result: impl Into<i64>) -> io::Result<i64> {
    let result = result.into();
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Makes this process, and all it starts, stay where it is.
pub(crate) fn pin_to_this_cpu() -> io::Result<()> {
    // SAFETY: no arguments.
    let cpu = checked(unsafe { libc::sched_getcpu() })?;
    // SAFETY: a set of bits: all zero is the empty one.
    let mut cpus: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: a processor's number is smaller than the set, or there would be no getting it from the C library.
    unsafe { libc::CPU_SET(cpu as usize, &mut cpus) };
    // SAFETY: the pointer and the size are those of one live set.
    checked(unsafe { libc::sched_setaffinity(0, size_of_val(&cpus), &cpus) }).map(drop)
}

/// A clock that exists on every Linux.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Clock {
    Monotonic = libc::CLOCK_MONOTONIC as isize,
    MonotonicRaw = libc::CLOCK_MONOTONIC_RAW as isize,
    Realtime = libc::CLOCK_REALTIME as isize,
}

/// A clock, nanoseconds.
pub(crate) fn clock_ns(clock: Clock) -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is that of a live value. The clock exists, so the call does not fail.
    unsafe { libc::clock_gettime(clock as libc::clockid_t, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// `CLOCK_MONOTONIC`, nanoseconds.
pub(crate) fn monotonic_ns() -> u64 {
    clock_ns(Clock::Monotonic)
}

/// The time-stamp counter, behind what was read before it and before what is read behind it.
pub(crate) fn tsc() -> u64 {
    // SAFETY: instructions of every 64-bit processor that touch no memory.
    unsafe {
        std::arch::x86_64::_mm_lfence();
        let tsc = std::arch::x86_64::_rdtsc();
        std::arch::x86_64::_mm_lfence();
        tsc
    }
}

/// EAX, EBX, ECX and EDX of a leaf.
pub(crate) fn cpuid(leaf: u32) -> [u32; 4] {
    let answer = std::arch::x86_64::__cpuid(leaf);
    [answer.eax, answer.ebx, answer.ecx, answer.edx]
}

/// Lets this process use ports: root may.
pub(crate) fn allow_ports() -> io::Result<()> {
    // SAFETY: a plain number.
    checked(unsafe { libc::iopl(3) }).map(drop)
}

/// OUT, after [`allow_ports`]. Ports reach devices, whose memory accesses are the kernel's to know.
pub(crate) fn out(port: u16, value: u32) {
    // SAFETY: the ports that this program names are a test device's, which writes to no memory of this process.
    unsafe { std::arch::asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags)) };
}

/// IN, after [`allow_ports`].
pub(crate) fn input(port: u16) -> u32 {
    let value;
    // SAFETY: as in [`out`].
    unsafe { std::arch::asm!("in eax, dx", in("dx") port, out("eax") value, options(nostack, preserves_flags)) };
    value
}

/// The system call itself: nothing in the C library answers in its place.
pub(crate) fn getppid() -> i64 {
    // SAFETY: no arguments, no effect.
    unsafe { libc::syscall(libc::SYS_getppid) }
}

/// sched_yield(2).
pub(crate) fn yield_now() {
    // SAFETY: no arguments.
    unsafe { libc::sched_yield() };
}

/// True where there is something to read, or the end, before `limit` is over.
pub(crate) fn readable_within(stream: &impl AsRawFd, limit: Duration) -> io::Result<bool> {
    let mut wanted = libc::pollfd { fd: stream.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let milliseconds = i32::try_from(limit.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: one live element, as the count says.
    checked(unsafe { libc::poll(&mut wanted, 1, milliseconds) }).map(|ready| ready > 0)
}

/// Has the kernel kill this process when its parent ends.
pub(crate) fn end_with_parent() {
    // SAFETY: plain numbers.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
}

/// Kills a process that leads a group, and the group. One that has just ended needs no signal.
pub(crate) fn kill_group(leader: u32) {
    // SAFETY: plain numbers; the leader is a child that was not waited for, so the number is still its own.
    unsafe { libc::kill(-(leader as libc::pid_t), libc::SIGKILL) };
}

/// A process that ends with its guard.
#[derive(Debug)]
pub(crate) struct Child(libc::pid_t);

/// Forks; the child does `work` and exits with what it returns. For processes of one thread.
pub(crate) fn fork(work: impl FnOnce() -> i32) -> io::Result<Child> {
    // SAFETY: the caller's process has no other thread that could hold a lock the child needs.
    let pid = checked(unsafe { libc::fork() })?;
    if pid == 0 {
        end_with_parent();
        let status = work();
        // SAFETY: ends the process without running what belongs to the parent.
        unsafe { libc::_exit(status) };
    }
    Ok(Child(pid as libc::pid_t))
}

impl Child {
    /// Waits for its end; its exit status.
    pub(crate) fn wait(self) -> io::Result<i32> {
        let mut status = 0;
        // SAFETY: a child of ours that nobody else waits for, and a live integer.
        let waited = checked(unsafe { libc::waitpid(self.0, &mut status, 0) });
        std::mem::forget(self);
        waited?;
        if libc::WIFEXITED(status) { Ok(libc::WEXITSTATUS(status)) } else { Err(io::Error::other("it was killed")) }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: a child of ours that was not waited for: the number is still its own.
        unsafe { libc::kill(self.0, libc::SIGKILL) };
        // SAFETY: as above; a null pointer means that the status is not wanted.
        unsafe { libc::waitpid(self.0, std::ptr::null_mut(), 0) };
    }
}

/// Sleeps where the word is `expected`. May return early.
pub(crate) fn futex_wait(word: &AtomicU32, expected: u32) -> io::Result<()> {
    let operation = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
    let no_timeout = std::ptr::null::<libc::timespec>();
    // SAFETY: the word is alive for the call; the kernel reads it as an atomic.
    match checked(unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), operation, expected, no_timeout) }) {
        Err(error) if !matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => Err(error),
        _ => Ok(()),
    }
}

/// Wakes one that sleeps.
pub(crate) fn futex_wake(word: &AtomicU32) -> io::Result<()> {
    let operation = libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: the word is alive for the call.
    checked(unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), operation, 1) }).map(drop)
}

static SIGNALS: AtomicU64 = AtomicU64::new(0);

extern "C" fn on_signal(_: libc::c_int) {
    SIGNALS.fetch_add(1, Ordering::Relaxed);
}

/// How many signals the handler has seen.
pub(crate) fn signals() -> u64 {
    SIGNALS.load(Ordering::Relaxed)
}

/// Installs the handler for [`signal_self`].
pub(crate) fn count_signals() -> io::Result<()> {
    let handler: extern "C" fn(libc::c_int) = on_signal;
    // SAFETY: the handler does nothing but one atomic addition, which is safe at any time.
    let before = unsafe { libc::signal(libc::SIGUSR1, handler as libc::sighandler_t) };
    if before == libc::SIG_ERR { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Sends this thread a signal, which it takes before the call returns.
pub(crate) fn signal_self() -> io::Result<()> {
    // SAFETY: a signal that has a handler, to ourselves.
    checked(unsafe { libc::raise(libc::SIGUSR1) }).map(drop)
}

/// Maps so many bytes, writes to each page, unmaps them; how many pages.
pub(crate) fn map_and_touch(bytes: usize) -> io::Result<u64> {
    const PAGE: usize = 4096;
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping at a place of the kernel's choice changes nothing that exists.
    let area = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, -1, 0) };
    if area == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let pages = bytes / PAGE;
    for page in 0..pages {
        // SAFETY: within the mapping, which is ours alone.
        unsafe { area.cast::<u8>().add(page * PAGE).write_volatile(1) };
    }
    // SAFETY: the mapping made above; nothing refers to it any more.
    checked(unsafe { libc::munmap(area, bytes) })?;
    Ok(pages as u64)
}
