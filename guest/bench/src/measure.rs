//! From a workload to a record: calibrate, run the rounds, keep the times.

use std::hint::black_box;
use std::io;
use std::time::Duration;

use serde::Serialize;

use crate::sys;

/// Does one unit of a workload's work and tells its checksum, the same each time and everywhere.
pub(crate) type Unit = Box<dyn FnMut() -> io::Result<u64>>;

/// Something to measure.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Workload {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    /// What an iteration is.
    pub(crate) what: &'static str,
    /// Iterations in one unit.
    pub(crate) batch: u64,
    /// Sets up.
    pub(crate) start: fn() -> io::Result<Unit>,
}

/// What a workload mostly exercises: rows are averaged by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    /// Integers, branches and calls in user mode.
    Integer,
    /// Loads and stores in user mode.
    Memory,
    /// Floating point and vectors in user mode.
    Float,
    /// System calls, faults, context switches.
    Kernel,
    /// A whole program, from its start to its end.
    Program,
}

/// How to measure.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) rounds: usize,
    /// Length of one round.
    pub(crate) round: Duration,
    /// Time for the whole of one workload.
    pub(crate) limit: Duration,
}

impl Default for Plan {
    fn default() -> Self {
        Self { rounds: 3, round: Duration::from_millis(100), limit: Duration::from_secs(60) }
    }
}

impl Plan {
    /// The options that say the same.
    pub(crate) fn words(&self) -> [String; 4] {
        ["--rounds".into(), self.rounds.to_string(), "--seconds".into(), self.round.as_secs_f64().to_string()]
    }
}

/// The line about one workload.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Record {
    pub(crate) name: String,
    pub(crate) kind: Option<Kind>,
    /// Iterations a round.
    iterations: u64,
    /// Nanoseconds an iteration.
    best_ns: f64,
    median_ns: f64,
    rounds_ns: Vec<f64>,
    /// Of one unit's results: equal wherever the work was done right.
    pub(crate) checksum: Option<String>,
    /// `CLOCK_MONOTONIC` at the end: the reader can tell whether this clock runs like its own.
    clock_ns: u64,
    /// Why there are no figures.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

impl Record {
    pub(crate) fn failed(name: &str, kind: Kind, why: &str) -> Self {
        let clock_ns = sys::monotonic_ns();
        Self { name: name.into(), kind: Some(kind), error: Some(why.into()), clock_ns, ..Self::default() }
    }

    pub(crate) fn line(&self) -> String {
        serde_json::to_string(self).map_or_else(|error| error.to_string(), |text| text + "\n")
    }
}

/// Measures one workload.
pub(crate) fn measure(workload: &Workload, plan: &Plan) -> io::Result<Record> {
    let record = measure_unit((workload.start)()?, workload.batch, plan)?;
    Ok(Record { name: workload.name.into(), kind: Some(workload.kind), ..record })
}

/// Measures a unit of `batch` iterations; the record has no name yet.
pub(crate) fn measure_unit(mut unit: Unit, batch: u64, plan: &Plan) -> io::Result<Record> {
    // The first one warms up, too.
    let checksum = unit()?;
    let mut repeat = |count: u64| -> io::Result<Duration> {
        let started = sys::monotonic_ns();
        for _ in 0..count {
            if black_box(unit()?) != checksum {
                return Err(io::Error::other("the same work had two different results"));
            }
        }
        Ok(Duration::from_nanos(sys::monotonic_ns() - started))
    };
    let units = calibrate(&mut repeat, plan.round)?;
    let iterations = units * batch;
    let mut rounds_ns = Vec::new();
    for _ in 0..plan.rounds {
        rounds_ns.push(repeat(units)?.as_nanos() as f64 / iterations as f64);
    }
    let mut sorted = rounds_ns.clone();
    sorted.sort_by(f64::total_cmp);
    Ok(Record {
        iterations,
        best_ns: sorted[0],
        median_ns: (sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2]) / 2.0,
        rounds_ns,
        checksum: Some(format!("{checksum:016x}")),
        clock_ns: sys::monotonic_ns(),
        ..Record::default()
    })
}

/// How many units a round is: doubled until they take long enough to extrapolate from.
fn calibrate(repeat: &mut impl FnMut(u64) -> io::Result<Duration>, round: Duration) -> io::Result<u64> {
    let mut units = 1_u64;
    loop {
        let took = repeat(units)?.max(Duration::from_nanos(1));
        if took >= round / 4 {
            let fit = units as f64 * round.as_secs_f64() / took.as_secs_f64();
            return Ok((fit.round() as u64).max(1));
        }
        units *= 2;
    }
}

/// A stream of numbers that is the same everywhere (xorshift64*, Vigna 2016).
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// One below `limit`.
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_is_extrapolated_from_what_a_unit_takes() {
        let mut repeat = |units: u64| Ok(Duration::from_micros(30 * units));
        assert_eq!(calibrate(&mut repeat, Duration::from_millis(30)).unwrap(), 1000);
        let mut slow = |units: u64| Ok(Duration::from_secs(units));
        assert_eq!(calibrate(&mut slow, Duration::from_millis(30)).unwrap(), 1);
    }

    #[test]
    fn different_results_are_an_error() {
        fn start() -> io::Result<Unit> {
            let mut count = 0;
            Ok(Box::new(move || {
                count += 1;
                Ok(count)
            }))
        }
        let workload = Workload { name: "x", kind: Kind::Integer, what: "", batch: 1, start };
        assert!(measure(&workload, &Plan::default()).unwrap_err().to_string().contains("two different"));
    }
}
