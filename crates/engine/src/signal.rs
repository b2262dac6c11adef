//! How everyone else reaches a vCPU, running or asleep.

use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use host::LowWord;

bitflags::bitflags! {
    /// What a vCPU is asked to look at.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Signals: u32 {
        /// The interrupt controller may have a vector to deliver.
        const INTERRUPT = 1 << 0;
        /// A non-maskable interrupt.
        const NMI = 1 << 1;
        /// INIT.
        const INIT = 1 << 2;
        /// Start-up IPI; the vector is in [`Signal::startup_vector`].
        const STARTUP = 1 << 3;
        /// The monitor wants the vCPU to leave guest code.
        const STOP = 1 << 4;
        /// The engine's own request to this vCPU (forget cached translations, acknowledge a handshake).
        const ENGINE = 1 << 5;
        /// Another non-maskable interrupt behind the one that [`Signals::NMI`] stands for; never without it.
        const NMI_AGAIN = 1 << 6;
        /// What a hypercall waits for has happened.
        const WAKE = 1 << 7;
        /// Forget the translations of guest-virtual addresses, before the next instruction.
        const FLUSH = 1 << 8;
        /// End HLT, whatever RFLAGS.IF; where the vCPU is not in HLT, its next one ends at once.
        const UNHALT = 1 << 9;
    }
}

/// How an engine gets a vCPU out of guest code that polls nothing.
type Kick = Box<dyn Fn() + Send + Sync>;

/// The mailbox of one vCPU. Raising is lock-free unless the vCPU sleeps.
#[derive(Default)]
pub struct Signal {
    bits: LowWord,
    asleep: AtomicU32,
    startup_vector: AtomicU8,
    lock: Mutex<()>,
    wake: Condvar,
    kick: OnceLock<Kick>,
}

impl std::fmt::Debug for Signal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Signal").field("pending", &self.pending()).finish_non_exhaustive()
    }
}

impl Signal {
    /// Has `kick` called after each raise: for engines whose guest code does not look at [`Signal::word`]. Once, by the
    /// engine, when it makes the vCPU; it may be called on any thread.
    pub fn on_raise(&self, kick: impl Fn() + Send + Sync + 'static) {
        // A second engine for the same mailbox would be a mistake in the machine; the first one's vCPU goes on.
        let _ = self.kick.set(Box::new(kick));
    }

    /// Adds to what the vCPU is asked, and wakes it where it sleeps.
    pub fn raise(&self, signals: Signals) {
        self.bits.fetch_or(signals.bits(), Ordering::SeqCst);
        self.wake();
    }

    fn wake(&self) {
        if let Some(kick) = self.kick.get() {
            kick();
        }
        if self.asleep.load(Ordering::SeqCst) != 0 {
            let _guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
            self.wake.notify_all();
        }
    }

    /// Raises [`Signals::STARTUP`] with the page number the processor starts at.
    pub fn raise_startup(&self, vector: u8) {
        self.startup_vector.store(vector, Ordering::SeqCst);
        self.raise(Signals::STARTUP);
    }

    /// Raises [`Signals::NMI`]. A processor that handles none takes one and keeps one more, so two can stand here; further
    /// ones are lost. Whoever handles one drops [`Signals::NMI_AGAIN`].
    pub fn raise_nmi(&self) {
        let more =
            |bits| Some(bits | if bits & Signals::NMI.bits() == 0 { Signals::NMI } else { Signals::NMI_AGAIN }.bits());
        let _ = self.bits.fetch_update(Ordering::SeqCst, Ordering::SeqCst, more);
        self.wake();
    }

    /// Takes back one non-maskable interrupt.
    pub fn take_nmi(&self) {
        let again = Signals::NMI_AGAIN.bits();
        let less = |bits| Some(bits & if bits & again == 0 { !Signals::NMI.bits() } else { !again });
        let _ = self.bits.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less);
    }

    /// The vector of the last start-up IPI: the processor starts at `vector << 12`.
    pub fn startup_vector(&self) -> u8 {
        self.startup_vector.load(Ordering::SeqCst)
    }

    /// What is asked. One relaxed load: cheap enough for every block boundary.
    #[inline]
    pub fn pending(&self) -> Signals {
        Signals::from_bits_retain(self.bits.load(Ordering::Relaxed))
    }

    /// The raw word, for engines that poll it from generated code.
    pub fn word(&self) -> &LowWord {
        &self.bits
    }

    /// Takes back `signals`; returns those of them that were raised.
    pub fn take(&self, signals: Signals) -> Signals {
        Signals::from_bits_retain(self.bits.fetch_and(!signals.bits(), Ordering::SeqCst)) & signals
    }

    /// Sleeps until any of `signals` is raised, or `timeout` has passed. Returns what is pending then.
    pub fn wait(&self, signals: Signals, timeout: Option<Duration>) -> Signals {
        let deadline = timeout.map(|timeout| std::time::Instant::now() + timeout);
        let mut guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.asleep.fetch_add(1, Ordering::SeqCst);
        loop {
            let pending = Signals::from_bits_retain(self.bits.load(Ordering::SeqCst));
            let left = deadline.map(|deadline| deadline.saturating_duration_since(std::time::Instant::now()));
            if pending.intersects(signals) || left.is_some_and(|left| left.is_zero()) {
                self.asleep.fetch_sub(1, Ordering::SeqCst);
                return pending;
            }
            guard = match left {
                Some(left) => self.wake.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner).0,
                None => self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn a_sleeper_wakes_for_what_it_waits_for() {
        let signal = Arc::new(Signal::default());
        let raiser = Arc::clone(&signal);
        let thread = std::thread::spawn(move || {
            raiser.raise(Signals::ENGINE);
            raiser.raise_startup(0x9a);
        });
        let pending = signal.wait(Signals::STARTUP, None);
        assert!(pending.contains(Signals::STARTUP));
        assert_eq!(signal.startup_vector(), 0x9a);
        thread.join().unwrap();
        assert_eq!(signal.take(Signals::STARTUP | Signals::NMI), Signals::STARTUP);
        assert_eq!(signal.pending(), Signals::ENGINE);
    }

    #[test]
    fn two_nmis_are_kept_and_taken_one_by_one() {
        let signal = Signal::default();
        (0..3).for_each(|_| signal.raise_nmi());
        assert_eq!(signal.pending(), Signals::NMI | Signals::NMI_AGAIN);
        signal.take_nmi();
        assert_eq!(signal.pending(), Signals::NMI);
        signal.take_nmi();
        assert_eq!(signal.pending(), Signals::empty());
    }

    #[test]
    fn each_raise_kicks_after_the_bits_are_there() {
        let signal = Arc::new(Signal::default());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (weak, to) = (Arc::downgrade(&signal), Arc::clone(&seen));
        signal.on_raise(move || to.lock().unwrap().push(weak.upgrade().unwrap().pending()));
        signal.raise(Signals::STOP);
        signal.raise_nmi();
        signal.take(Signals::STOP);
        signal.raise_startup(1);
        let nmi = Signals::NMI;
        assert_eq!(*seen.lock().unwrap(), [Signals::STOP, Signals::STOP | nmi, nmi | Signals::STARTUP]);
    }

    #[test]
    fn waiting_ends_at_the_timeout() {
        let signal = Signal::default();
        assert_eq!(signal.wait(Signals::all(), Some(Duration::from_millis(1))), Signals::empty());
    }
}
