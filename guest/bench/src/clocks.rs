//! Not a workload: what the clocks of a Linux guest do, looked at from its user space.
//!
//! ```text
//!   steps      each clock, read until it has stepped so often ──> how many steps, and the least of them
//!   kept       TSC, clock, TSC ──> how far the clock is from where the TSC says that it should be
//!              clock, TSC, the host's clock, TSC, clock ──> how far it is from the host's
//! ```
//!
//! A clock read between two reads of the TSC lies between what both say, however long the three took: what is beyond is
//! the clock's. The TSC's rate is the one the host names (docs/contract.md, leaf base + 3). The host's CLOCK_MONOTONIC, read by
//! a port, lies between two reads of a clock of ours in the same way. What it has drifted from the TSC, whose rate the host has
//! measured and may have steered since, is not the clock's: that much is taken off.

use std::io;

use crate::sys::{self, Clock};

/// First argument of the process that looks at clocks.
pub(crate) const CLOCKS: &str = "--clocks";
const USAGE: &str = "Usage: bench --clocks steps N | kept ROUNDS";

/// Where our own hosts have the leaf of the native dialect that names the TSC's rate.
const TIME_LEAF: u32 = 0x4000_0103;
/// Ports of the native dialect's test device: a rate in kHz to count at from now on, milliseconds to stand still.
const RATE: u16 = 0x2104;
const PAUSE: u16 = 0x210c;
/// The host's CLOCK_MONOTONIC, nanoseconds: the low half is read first.
const HOST_NS: [u16; 2] = [0x2100, 0x2104];
const PAUSE_MS: u32 = 300;

const CLOCKS_READ: [(&str, Clock); 3] =
    [("monotonic", Clock::Monotonic), ("monotonic-raw", Clock::MonotonicRaw), ("realtime", Clock::Realtime)];

/// Does what the words say, and prints a JSON object a line.
///
/// # Errors
/// Words that mean nothing; ports that may not be used.
pub(crate) fn look(words: &[String]) -> Result<(), String> {
    let [what, count] = words else { return Err(USAGE.into()) };
    let count: u64 = count.parse().map_err(|_| USAGE.to_owned())?;
    match what.as_str() {
        "steps" => steps(count),
        "kept" => kept(count).map_err(|error| error.to_string())?,
        _ => return Err(USAGE.into()),
    }
    Ok(())
}

/// How clocks step.
fn steps(count: u64) {
    for (name, clock) in CLOCKS_READ {
        stepping(name, count, || sys::clock_ns(clock));
    }
    stepping("tsc", count, sys::tsc);
}

fn stepping(name: &str, count: u64, read: impl Fn() -> u64) {
    let (mut last, mut seen, mut least) = (read(), 0, u64::MAX);
    let mut whole = false;
    while seen < count {
        let now = read();
        if now != last {
            // The first step may have begun before we looked.
            if whole {
                seen += 1;
                least = least.min(now.wrapping_sub(last));
            }
            (last, whole) = (now, true);
        }
    }
    println!("{{\"clock\":\"{name}\",\"steps\":{seen},\"least\":{least}}}");
}

/// A clock between two reads of the TSC.
#[derive(Clone, Copy)]
struct Reading {
    before: u64,
    ns: u64,
    after: u64,
}

impl Reading {
    fn of(clock: Clock) -> Self {
        let before = sys::tsc();
        let ns = sys::clock_ns(clock);
        Self { before, ns, after: sys::tsc() }
    }

    /// How far the clock is from what the TSC says since `start`, nanoseconds beyond what is not known.
    fn deviation(self, start: Self, khz: u64) -> u64 {
        let ns = |ticks: u64| u128::from(ticks) * 1_000_000 / u128::from(khz);
        let (least, most) = (ns(self.before - start.after), ns(self.after - start.before) + 1);
        let passed = u128::from(self.ns - start.ns);
        let beyond = least.saturating_sub(passed).max(passed.saturating_sub(most));
        u64::try_from(beyond).unwrap_or(u64::MAX)
    }
}

/// The host's clock between two reads of the TSC, and of a clock of ours.
#[derive(Clone, Copy)]
struct Beside {
    before: [u64; 2],
    host: u64,
    after: [u64; 2],
}

impl Beside {
    fn of(clock: Clock) -> Self {
        let ns = sys::clock_ns(clock);
        let before = [ns, sys::tsc()];
        let low = sys::input(HOST_NS[0]);
        let tsc = sys::tsc();
        let after = [sys::clock_ns(clock), tsc];
        Self { before, host: u64::from(sys::input(HOST_NS[1])) << 32 | u64::from(low), after }
    }

    /// How far our clock is from the host's since `start`, nanoseconds beyond what is not known and what the TSC drifted.
    fn deviation(self, start: Self, khz: u64) -> u64 {
        let passed = u128::from(self.host - start.host);
        let ns = |ticks: u64| u128::from(ticks) * 1_000_000 / u128::from(khz);
        let beyond = |least: u128, most: u128| least.saturating_sub(passed).max(passed.saturating_sub(most));
        let between = |which: usize| {
            (self.before[which].saturating_sub(start.after[which]), self.after[which] - start.before[which])
        };
        let ((least, most), (ticks_least, ticks_most)) = (between(0), between(1));
        let drift = beyond(ns(ticks_least), ns(ticks_most) + 1);
        u64::try_from(beyond(least.into(), most.into()).saturating_sub(drift)).unwrap_or(u64::MAX)
    }
}

/// What was seen of one clock.
struct Watch {
    clock: Clock,
    start: Reading,
    start_beside: Beside,
    last: u64,
    worst: u64,
    worst_beside: u64,
    backwards: u64,
}

impl Watch {
    fn new(clock: Clock) -> Self {
        // The least disturbed of some.
        let start = (0..32).map(|_| Reading::of(clock)).min_by_key(|reading| reading.after - reading.before);
        let start = start.unwrap_or_else(|| Reading::of(clock));
        let width = |reading: &Beside| reading.after[0] - reading.before[0];
        let beside = (0..32).map(|_| Beside::of(clock)).min_by_key(width);
        let start_beside = beside.unwrap_or_else(|| Beside::of(clock));
        Self { clock, start, start_beside, last: start.ns, worst: 0, worst_beside: 0, backwards: 0 }
    }

    fn look(&mut self, khz: Option<u64>) {
        let reading = Reading::of(self.clock);
        self.backwards += u64::from(reading.ns < self.last);
        self.last = reading.ns;
        if let Some(khz) = khz {
            self.worst = self.worst.max(reading.deviation(self.start, khz));
        }
    }

    /// Looks at the host's clock beside ours.
    fn look_beside(&mut self, khz: u64) {
        self.worst_beside = self.worst_beside.max(Beside::of(self.clock).deviation(self.start_beside, khz));
    }
}

/// How clocks keep to the TSC, while the host writes their scale anew so many times, and pauses the machine once.
fn kept(rounds: u64) -> io::Result<()> {
    sys::allow_ports()?;
    let khz = sys::cpuid(TIME_LEAF)[0];
    if khz == 0 {
        return Err(io::Error::other("the host does not name the TSC's rate"));
    }
    let clocks = [CLOCKS_READ[0], CLOCKS_READ[1]];
    // At other rates nothing but the order can be said.
    let mut watches = clocks.map(|(_, clock)| Watch::new(clock));
    for round in 0..rounds {
        sys::out(RATE, if round % 2 == 0 { khz / 4 * 3 } else { khz / 3 * 4 });
        (0..100).for_each(|_| watches.iter_mut().for_each(|watch| watch.look(None)));
    }
    let backwards = watches.map(|watch| watch.backwards);
    sys::out(RATE, khz);

    let mut watches = clocks.map(|(_, clock)| Watch::new(clock));
    for _ in 0..rounds {
        sys::out(RATE, khz);
        (0..100).for_each(|_| watches.iter_mut().for_each(|watch| watch.look(Some(khz.into()))));
        watches.iter_mut().for_each(|watch| watch.look_beside(khz.into()));
    }
    let before = sys::tsc();
    sys::out(PAUSE, PAUSE_MS);
    let paused_ms = (sys::tsc() - before) / u64::from(khz);
    (0..100).for_each(|_| watches.iter_mut().for_each(|watch| watch.look(Some(khz.into()))));
    (0..100).for_each(|_| watches.iter_mut().for_each(|watch| watch.look_beside(khz.into())));
    for ((name, _), (watch, backwards)) in clocks.into_iter().zip(watches.into_iter().zip(backwards)) {
        println!(
            "{{\"clock\":\"{name}\",\"rescales\":{},\"paused_ms\":{paused_ms},\"beyond_ns\":{},\"beyond_host_ns\":{},\
             \"backwards\":{}}}",
            2 * rounds + 1,
            watch.worst,
            watch.worst_beside,
            watch.backwards + backwards,
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_deviates_by_what_is_beyond_both_reads_of_the_tsc() {
        let start = Reading { before: 0, ns: 100, after: 20 };
        let at = |before, ns, after| Reading { before, ns, after }.deviation(start, 2_000_000);
        // 1000 to 1040 ticks since: 490 to 520 ns, rounded outwards.
        assert_eq!([589, 590, 621, 622].map(|ns| at(1000, ns, 1040)), [1, 0, 0, 1]);
        assert_eq!(at(1000, 10_621, 1040), 10_000);
    }
    #[test]
    fn what_the_hosts_clock_says_beside_the_tsc_is_not_the_clocks() {
        let start = Beside { before: [0, 0], host: 7_000, after: [10, 20] };
        let at = |ns, ticks, host| Beside { before: [ns, ticks], host, after: [ns + 40, ticks + 60] };
        let deviation = |ns, ticks, host: u64| at(ns, ticks, 7_000 + host).deviation(start, 2_000_000);
        // 990 to 1040 ns of ours since, 990 to 1030 ns of the TSC's.
        assert_eq!([989, 990, 1040, 1042].map(|host| deviation(1_000, 2_000, host)), [0, 0, 0, 0]);
        assert_eq!([5_000, 500].map(|host| deviation(1_000, 2_000, host)), [0, 0], "the TSC has drifted as far");
        assert_eq!(deviation(5_000, 2_000, 1_000), 3_990, "ours has not kept to it");
        assert_eq!(deviation(1_000, 10_000, 5_000), 3_960);
    }
}
