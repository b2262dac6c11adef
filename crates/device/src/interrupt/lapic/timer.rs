//! The APIC timer: one-shot, periodic and TSC-deadline (Intel SDM vol. 3A, 11.5.4).
//!
//! Its input clock runs at [`FREQUENCY_HZ`]: one tick a nanosecond before the divider, so counts and host time agree.

/// Rate of the timer's input clock. Guests that believe CPUID leaf 15h need the core crystal clock there to say the same.
pub const FREQUENCY_HZ: u64 = 1_000_000_000;

/// A periodic timer does not interrupt more often than this, whatever its count: a guest that asks for a tick a
/// nanosecond must not own a host processor. KVM draws the line at 200 us.
const SHORTEST_PERIOD_NS: u64 = 100_000;

/// Bits 18:17 of the LVT timer entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    OneShot,
    Periodic,
    TscDeadline,
    Reserved,
}

impl Mode {
    pub(super) const fn from_lvt(entry: u32) -> Self {
        match (entry >> 17) & 3 {
            0 => Self::OneShot,
            1 => Self::Periodic,
            2 => Self::TscDeadline,
            _ => Self::Reserved,
        }
    }
}

#[derive(Clone, Debug, Default)]
pub(super) struct ApicTimer {
    initial_count: u32,
    divide: u32,
    /// When the count next reaches zero; `None` where it does not count.
    expiry_ns: Option<u64>,
    /// Not to be armed before.
    earliest_ns: u64,
    /// IA32_TSC_DEADLINE; 0 is disarmed.
    tsc_deadline: u64,
}

impl ApicTimer {
    pub(super) const DIVIDE_WRITABLE: u32 = 0b1011;

    pub(super) fn initial_count(&self) -> u32 {
        self.initial_count
    }

    pub(super) fn divide(&self) -> u32 {
        self.divide
    }

    pub(super) fn tsc_deadline(&self) -> u64 {
        self.tsc_deadline
    }

    /// Nanoseconds a count (SDM figure 11-10): 2, 4, .. 128, and 1.
    fn tick_ns(&self) -> u64 {
        let encoded = (self.divide & 3) | ((self.divide >> 1) & 4);
        1 << ((encoded + 1) & 7)
    }

    fn period_ns(&self) -> u64 {
        u64::from(self.initial_count) * self.tick_ns()
    }

    pub(super) fn current_count(&self, mode: Mode, now: u64) -> u32 {
        let Some(expiry) = self.expiry_ns else { return 0 };
        let left = match expiry.checked_sub(now) {
            Some(left) => left,
            // The host's timer is late; the guest's count has wrapped already.
            None if mode == Mode::Periodic => self.period_ns() - (now - expiry) % self.period_ns().max(1),
            None => 0,
        };
        left.div_ceil(self.tick_ns()) as u32
    }

    /// A write of the initial count starts the timer, zero stops it.
    pub(super) fn set_initial_count(&mut self, count: u32, now: u64) {
        self.initial_count = count;
        self.earliest_ns = 0;
        self.expiry_ns = (count != 0).then(|| now + self.period_ns());
    }

    /// The count goes on at the new rate from where it is.
    pub(super) fn set_divide(&mut self, divide: u32, mode: Mode, now: u64) {
        let count = u64::from(self.current_count(mode, now));
        self.divide = divide & Self::DIVIDE_WRITABLE;
        self.expiry_ns = self.expiry_ns.map(|_| now + count * self.tick_ns());
    }

    /// Into and out of TSC-deadline mode everything is disarmed; between one-shot and periodic the count goes on.
    pub(super) fn change_mode(&mut self, from: Mode, to: Mode) {
        if from != to && (from == Mode::TscDeadline || to == Mode::TscDeadline) {
            *self = Self { divide: self.divide, ..Self::default() };
        }
    }

    pub(super) fn set_tsc_deadline(&mut self, deadline: u64) {
        self.tsc_deadline = deadline;
    }

    /// True where the TSC deadline has been reached; disarms it then.
    pub(super) fn take_tsc_expiry(&mut self, guest_tsc: u64) -> bool {
        let due = self.tsc_deadline != 0 && guest_tsc >= self.tsc_deadline;
        if due {
            self.tsc_deadline = 0;
        }
        due
    }

    /// True where the count has reached zero; starts the next period then, leaving out those missed.
    pub(super) fn take_expiry(&mut self, mode: Mode, now: u64) -> bool {
        let Some(expiry) = self.expiry_ns.filter(|expiry| (*expiry).max(self.earliest_ns) <= now) else { return false };
        self.expiry_ns = None;
        if mode == Mode::Periodic {
            let period = self.period_ns().max(1);
            self.expiry_ns = Some(now + period - (now - expiry) % period);
            self.earliest_ns = now + SHORTEST_PERIOD_NS;
        }
        true
    }

    /// When the host is to look again, for the counting modes.
    pub(super) fn host_deadline(&self) -> Option<u64> {
        self.expiry_ns.map(|expiry| expiry.max(self.earliest_ns))
    }
}
