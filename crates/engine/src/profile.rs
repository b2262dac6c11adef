//! Where a vCPU's time goes, for runs that are profiled.
//!
//! ```text
//!   engine, machine ──> what the vCPU's thread does now: a Phase      always, a store where it changes
//!   engine          ──> where translated code lies                    once
//!   sampler         ──> counts, by phase                              while Profile::during runs
//! ```
//!
//! Neighbours: `host` samples; the [`Ledger`](crate::Ledger) holds this beside the counts of exits and work.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use host::{Clock as _, HostClock, SAMPLE_KINDS, Samples, ThreadTime};

/// What a vCPU's thread spends processor time on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Phase {
    /// What is not named below: the loop between runs of guest code, delivering interrupts, going to sleep and waking up.
    Other,
    /// Guest code as the translator made it, with its checks of memory operands.
    Translated,
    /// Entering and leaving translated code: registers, tables, and finding blocks that are translated already.
    Switching,
    /// Translating: reading and decoding guest code, emitting host code, linking blocks, looking for what is stale.
    Translating,
    /// Filling the soft TLB: page walks after a miss.
    TlbFill,
    /// The interpreter's handlers, called from translated code.
    Handlers,
    /// The interpreter by itself, decoding included.
    Interpreting,
    /// The machine answers: ports, device memory, MSRs, hypercalls.
    Devices,
}

impl Phase {
    /// All phases, in table order.
    pub const ALL: [Self; 8] = [
        Self::Translated,
        Self::Switching,
        Self::Translating,
        Self::TlbFill,
        Self::Handlers,
        Self::Interpreting,
        Self::Devices,
        Self::Other,
    ];

    /// The name in tables and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Translated => "translated-code",
            Self::Switching => "switching",
            Self::Translating => "translating",
            Self::TlbFill => "tlb-fill",
            Self::Handlers => "handlers",
            Self::Interpreting => "interpreting",
            Self::Devices => "devices",
            Self::Other => "other",
        }
    }
}

const _: () = assert!(Phase::ALL.len() <= SAMPLE_KINDS);

/// What was done before a phase began that ends with [`Profile::back`].
#[must_use]
#[derive(Clone, Copy, Debug)]
pub struct Before(u8);

/// Where the time of one vCPU goes.
#[derive(Debug, Default)]
pub struct Profile {
    samples: Samples,
    processor_ns: AtomicU64,
    kernel_ns: AtomicU64,
    wall_ns: AtomicU64,
    asleep_ns: AtomicU64,
}

/// What [`Profile::during`] found, added up over vCPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Samples, in the order of [`Phase::ALL`].
    pub samples: [u64; Phase::ALL.len()],
    /// Processor time, nanoseconds.
    pub processor_ns: u64,
    /// How much of it the host's kernel used: page faults, system calls.
    pub kernel_ns: u64,
    /// Time by the clock, nanoseconds.
    pub wall_ns: u64,
    /// How much of it the vCPUs slept: halted, or not started yet.
    pub asleep_ns: u64,
}

impl Profile {
    /// The vCPU's thread does this from now on.
    #[inline]
    pub fn now(&self, phase: Phase) {
        self.samples.say(phase as u8);
    }

    /// The same, until [`Profile::back`].
    #[inline]
    pub fn begin(&self, phase: Phase) -> Before {
        Before(self.samples.change(phase as u8))
    }

    /// What was done before goes on.
    #[inline]
    pub fn back(&self, before: Before) {
        self.samples.say(before.0);
    }

    /// Says where translated code runs, and the pieces that enter and leave it. Before the vCPU runs.
    pub fn declare_code(&self, translated: Range<u64>, switching: Range<u64>) {
        self.samples.declare([(translated, Phase::Translated as u8), (switching, Phase::Switching as u8)]);
    }

    /// Counts a sleep of the vCPU.
    pub fn slept(&self, ns: u64) {
        self.asleep_ns.fetch_add(ns, Ordering::Relaxed);
    }

    /// Profiles this thread, a vCPU's, while `work` runs.
    ///
    /// # Errors
    /// Why there are no samples. Times are taken, and the work is done, all the same.
    pub fn during(&self, work: impl FnOnce()) -> io::Result<()> {
        let (wall, used) = (HostClock.monotonic_ns(), ThreadTime::now());
        let ((), status) = self.samples.during(work);
        let now = ThreadTime::now();
        self.processor_ns.fetch_add(now.total_ns - used.total_ns, Ordering::Relaxed);
        self.kernel_ns.fetch_add(now.kernel_ns.saturating_sub(used.kernel_ns), Ordering::Relaxed);
        self.wall_ns.fetch_add(HostClock.monotonic_ns() - wall, Ordering::Relaxed);
        status
    }

    /// The figures of several vCPUs together.
    pub fn sum<'a>(profiles: impl Iterator<Item = &'a Self>) -> Figures {
        profiles.fold(Figures::default(), |mut sum, profile| {
            let load = |cell: &AtomicU64| cell.load(Ordering::Relaxed);
            for (count, phase) in sum.samples.iter_mut().zip(Phase::ALL) {
                *count += profile.samples.count(phase as u8);
            }
            sum.processor_ns += load(&profile.processor_ns);
            sum.kernel_ns += load(&profile.kernel_ns);
            sum.wall_ns += load(&profile.wall_ns);
            sum.asleep_ns += load(&profile.asleep_ns);
            sum
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(figures: &Figures, phase: Phase) -> u64 {
        Phase::ALL.iter().zip(figures.samples).find(|(known, _)| **known == phase).map_or(0, |(_, count)| count)
    }

    #[test]
    fn samples_belong_to_the_phase_that_was_on() {
        let (one, two) = (Profile::default(), Profile::default());
        let until_sampled = |profile: &Profile, phase: Phase| {
            let before = count(&Profile::sum([profile].into_iter()), phase);
            while count(&Profile::sum([profile].into_iter()), phase) == before {
                std::hint::spin_loop();
            }
        };
        one.during(|| {
            until_sampled(&one, Phase::Other);
            one.now(Phase::Interpreting);
            until_sampled(&one, Phase::Interpreting);
            let before = one.begin(Phase::Devices);
            until_sampled(&one, Phase::Devices);
            one.back(before);
            until_sampled(&one, Phase::Interpreting);
        })
        .unwrap();
        two.during(|| {
            two.now(Phase::TlbFill);
            until_sampled(&two, Phase::TlbFill);
        })
        .unwrap();
        two.slept(7);
        let sum = Profile::sum([&one, &two].into_iter());
        assert!(count(&sum, Phase::Interpreting) >= 2 && count(&sum, Phase::Devices) >= 1, "{sum:?}");
        assert!(count(&sum, Phase::Other) >= 1 && count(&sum, Phase::TlbFill) >= 1, "{sum:?}");
        assert_eq!((count(&sum, Phase::Translated), sum.asleep_ns), (0, 7));
        assert!(sum.processor_ns > 0 && sum.wall_ns > 0 && sum.kernel_ns <= sum.processor_ns, "{sum:?}");
    }

    #[test]
    fn a_phase_is_listed_once() {
        for (position, phase) in Phase::ALL.iter().enumerate() {
            assert_eq!(Phase::ALL.iter().position(|other| other.name() == phase.name()), Some(position));
        }
    }
}
