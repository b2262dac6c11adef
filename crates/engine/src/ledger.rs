//! The exit ledger: how often, and for how long, a vCPU left guest code.
//!
//! An exit is a departure from guest code into the monitor for something the guest asked for or the architecture
//! demands. The engine's own work (decoding, TLB fills) is counted apart, as [`Work`]. Always on: one relaxed add and
//! two time-stamp reads an exit. Where the rest of the time goes is the [`Profile`]'s.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::profile::Profile;

/// Why a vCPU left guest code. The same names on every engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(usize)]
pub enum Cause {
    /// IN or INS.
    PortRead,
    /// OUT or OUTS.
    PortWrite,
    /// A load from a device's memory.
    MmioRead,
    /// A store to a device's memory.
    MmioWrite,
    /// RDMSR that the machine answered.
    MsrRead,
    /// WRMSR that the machine answered.
    MsrWrite,
    /// CPUID.
    Cpuid,
    /// HLT.
    Halt,
    /// VMCALL or VMMCALL.
    Hypercall,
    /// An interrupt was delivered.
    Interrupt,
    /// An NMI was delivered.
    Nmi,
    /// PAUSE in a loop.
    Pause,
    /// INIT or start-up.
    Startup,
    /// Triple fault.
    Shutdown,
    /// CLI, STI, PUSHF or POPF of a kernel. This and what follows leave guest code only where everything sensitive does.
    InterruptFlag,
    /// MOV to or from a control register, CLTS, LMSW.
    ControlRegister,
    /// MOV to or from a debug register.
    DebugRegister,
    /// LGDT, LIDT, LLDT, LTR.
    DescriptorTable,
    /// INVLPG, INVPCID.
    Tlb,
    /// RDTSC, RDTSCP of a kernel.
    Tsc,
    /// IRET of a kernel.
    Iret,
    /// SWAPGS.
    Swapgs,
    /// SYSRET, SYSEXIT.
    Sysret,
}

impl Cause {
    /// All causes, in table order.
    pub const ALL: [Self; 23] = [
        Self::PortRead,
        Self::PortWrite,
        Self::MmioRead,
        Self::MmioWrite,
        Self::MsrRead,
        Self::MsrWrite,
        Self::Cpuid,
        Self::Halt,
        Self::Hypercall,
        Self::Interrupt,
        Self::Nmi,
        Self::Pause,
        Self::Startup,
        Self::Shutdown,
        Self::InterruptFlag,
        Self::ControlRegister,
        Self::DebugRegister,
        Self::DescriptorTable,
        Self::Tlb,
        Self::Tsc,
        Self::Iret,
        Self::Swapgs,
        Self::Sysret,
    ];

    /// The name in tables and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::PortRead => "port-read",
            Self::PortWrite => "port-write",
            Self::MmioRead => "mmio-read",
            Self::MmioWrite => "mmio-write",
            Self::MsrRead => "msr-read",
            Self::MsrWrite => "msr-write",
            Self::Cpuid => "cpuid",
            Self::Halt => "halt",
            Self::Hypercall => "hypercall",
            Self::Interrupt => "interrupt",
            Self::Nmi => "nmi",
            Self::Pause => "pause",
            Self::Startup => "startup",
            Self::Shutdown => "shutdown",
            Self::InterruptFlag => "interrupt-flag",
            Self::ControlRegister => "control-register",
            Self::DebugRegister => "debug-register",
            Self::DescriptorTable => "descriptor-table",
            Self::Tlb => "tlb",
            Self::Tsc => "tsc",
            Self::Iret => "iret",
            Self::Swapgs => "swapgs",
            Self::Sysret => "sysret",
        }
    }
}

/// The engine's own work; not exits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Work {
    /// Guest instructions that the interpreter executed by itself.
    Instructions,
    /// Guest instructions that translated code executed. Counted only where the engine is told to.
    NativeInstructions,
    /// Blocks decoded for the interpreter.
    Decode,
    /// Blocks translated.
    Translate,
    /// Guest instructions in them.
    TranslateInstructions,
    /// Bytes of host code made of them.
    TranslateBytes,
    /// Decoded or translated blocks dropped because their bytes were written.
    SelfModified,
    /// Times a full code cache was emptied.
    CacheEmptied,
    /// Translated blocks compared with the interpreter.
    Compared,
    /// Soft-TLB fills (page walks).
    TlbFill,
    /// Soft-TLB flushes.
    TlbFlush,
    /// Exceptions delivered to the guest.
    Exception,
}

impl Work {
    /// All kinds, in table order.
    pub const ALL: [Self; 12] = [
        Self::Instructions,
        Self::NativeInstructions,
        Self::Decode,
        Self::Translate,
        Self::TranslateInstructions,
        Self::TranslateBytes,
        Self::SelfModified,
        Self::CacheEmptied,
        Self::Compared,
        Self::TlbFill,
        Self::TlbFlush,
        Self::Exception,
    ];

    /// The name in tables and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Instructions => "instructions",
            Self::NativeInstructions => "native-instructions",
            Self::Decode => "decode",
            Self::Translate => "translate",
            Self::TranslateInstructions => "translate-instructions",
            Self::TranslateBytes => "translate-bytes",
            Self::SelfModified => "self-modified",
            Self::CacheEmptied => "cache-emptied",
            Self::Compared => "compared",
            Self::TlbFill => "tlb-fill",
            Self::TlbFlush => "tlb-flush",
            Self::Exception => "exception",
        }
    }
}

/// Buckets of a latency histogram: two a power of two of TSC ticks, so a quantile is within 25 % of the truth.
const BUCKETS: usize = 128;

/// How often something happened and how long it took. Written by one thread, readable by anyone at any time.
#[derive(Debug)]
pub struct Histogram {
    count: AtomicU64,
    ticks: AtomicU64,
    longest: AtomicU64,
    buckets: [AtomicU64; BUCKETS],
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            count: AtomicU64::new(0),
            ticks: AtomicU64::new(0),
            longest: AtomicU64::new(0),
            buckets: std::array::from_fn(|_| AtomicU64::new(0)),
        }
    }
}

impl Histogram {
    /// Counts one that took `ticks` of the host's TSC.
    #[inline]
    pub fn record(&self, ticks: u64) {
        add(&self.count, 1);
        add(&self.ticks, ticks);
        add(&self.buckets[bucket(ticks)], 1);
        if ticks > self.longest.load(Ordering::Relaxed) {
            self.longest.store(ticks, Ordering::Relaxed);
        }
    }

    fn record_untimed(&self, count: u64) {
        add(&self.count, count);
        add(&self.buckets[bucket(0)], count);
    }

    /// How often it happened.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Several histograms as one.
    pub fn summary<'a>(histograms: impl Iterator<Item = &'a Self> + Clone) -> Summary {
        let sum =
            |value: fn(&Self) -> &AtomicU64| histograms.clone().map(|one| value(one).load(Ordering::Relaxed)).sum();
        let count = sum(|one| &one.count);
        let longest = histograms.clone().map(|one| one.longest.load(Ordering::Relaxed)).max().unwrap_or(0);
        let quantile = |share: f64| {
            let wanted = (count as f64 * share).ceil() as u64;
            let mut seen = 0;
            for index in 0..BUCKETS {
                seen += histograms.clone().map(|one| one.buckets[index].load(Ordering::Relaxed)).sum::<u64>();
                if seen >= wanted && seen > 0 {
                    return bucket_end(index).min(longest);
                }
            }
            longest
        };
        Summary { count, ticks: sum(|one| &one.ticks), p50: quantile(0.5), p99: quantile(0.99), longest }
    }
}

/// The counts of one vCPU. Written by the thread that runs it, readable by anyone at any time.
#[derive(Debug, Default)]
pub struct Ledger {
    rows: [Histogram; Cause::ALL.len()],
    work: [AtomicU64; Work::ALL.len()],
    /// Where the vCPU's time goes.
    pub profile: Profile,
}

/// What a [`Histogram`] says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Summary {
    /// How many.
    pub count: u64,
    /// Time of all, TSC ticks.
    pub ticks: u64,
    /// Median, TSC ticks (upper edge of its bucket).
    pub p50: u64,
    /// 99th percentile, TSC ticks.
    pub p99: u64,
    /// The longest, TSC ticks.
    pub longest: u64,
}

impl Ledger {
    /// Counts an exit that took `ticks` of the host's TSC.
    #[inline]
    pub fn record(&self, cause: Cause, ticks: u64) {
        self.rows[cause as usize].record(ticks);
    }

    /// Counts `count` exits that the host's kernel answered by itself: their time is not known, and counts as none.
    pub fn record_untimed(&self, cause: Cause, count: u64) {
        self.rows[cause as usize].record_untimed(count);
    }

    /// Counts `amount` of the engine's own work.
    #[inline]
    pub fn work(&self, work: Work, amount: u64) {
        add(&self.work[work as usize], amount);
    }

    /// How often `cause` happened.
    pub fn count(&self, cause: Cause) -> u64 {
        self.rows[cause as usize].count()
    }

    /// How much `work` was done.
    pub fn worked(&self, work: Work) -> u64 {
        self.work[work as usize].load(Ordering::Relaxed)
    }

    /// One row, over the vCPUs given.
    pub fn summary<'a>(ledgers: impl Iterator<Item = &'a Ledger> + Clone, cause: Cause) -> Summary {
        Histogram::summary(ledgers.map(|ledger| &ledger.rows[cause as usize]))
    }
}

/// Only the running thread writes, so a load and a store do, without the price of a locked add.
#[inline]
fn add(cell: &AtomicU64, amount: u64) {
    cell.store(cell.load(Ordering::Relaxed).wrapping_add(amount), Ordering::Relaxed);
}

fn bucket(ticks: u64) -> usize {
    if ticks < 2 {
        return ticks as usize;
    }
    let log = 63 - ticks.leading_zeros();
    (2 * log + ((ticks >> (log - 1)) & 1) as u32) as usize
}

/// The largest value that falls into bucket `index`.
fn bucket_end(index: usize) -> u64 {
    if index < 2 {
        return index as u64;
    }
    let log = index as u32 / 2;
    let half = 1_u64 << (log - 1);
    let start = (1_u64 << log) + (index as u64 % 2) * half;
    start + (half - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_lies_in_its_bucket() {
        for shift in 0..64 {
            for near in [0_u64, 1, 2] {
                let ticks = (1_u64 << shift).wrapping_sub(1).wrapping_add(near);
                let index = bucket(ticks);
                assert!(ticks <= bucket_end(index), "{ticks} in {index}");
                assert!(index == 0 || ticks > bucket_end(index - 1), "{ticks} in {index}");
            }
        }
    }

    #[test]
    fn a_summary_adds_up_over_vcpus() {
        let (one, two) = (Ledger::default(), Ledger::default());
        for _ in 0..99 {
            one.record(Cause::Halt, 10);
        }
        two.record(Cause::Halt, 1000);
        let summary = Ledger::summary([&one, &two].into_iter(), Cause::Halt);
        assert_eq!((summary.count, summary.ticks, summary.longest), (100, 1990, 1000));
        assert!((10..16).contains(&summary.p50));
        assert!(summary.p99 < 16);
        assert_eq!(Ledger::summary([&one].into_iter(), Cause::Nmi), Summary::default());
    }

    #[test]
    fn what_the_kernel_answered_counts_without_time() {
        let ledger = Ledger::default();
        ledger.record_untimed(Cause::Halt, 7);
        let summary = Ledger::summary([&ledger].into_iter(), Cause::Halt);
        assert_eq!(summary, Summary { count: 7, ..Summary::default() });
    }

    #[test]
    fn names_are_in_the_order_of_the_rows() {
        for (index, cause) in Cause::ALL.iter().enumerate() {
            assert_eq!(*cause as usize, index);
        }
        for (index, work) in Work::ALL.iter().enumerate() {
            assert_eq!(*work as usize, index);
        }
    }
}
