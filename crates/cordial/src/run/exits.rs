//! The exit table: how often the guest left for the monitor, by cause and vCPU.

use engine::ledger::{Cause, Ledger, Summary, Work};
use serde::Serialize;
use std::sync::Arc;

/// One cause, over all vCPUs.
#[derive(Debug, Serialize)]
pub struct Row {
    /// Its name.
    pub cause: &'static str,
    /// Exits.
    pub count: u64,
    /// Of all exits, per cent.
    pub share: f64,
    /// Time in them, milliseconds.
    pub time_ms: f64,
    /// Of the time in all exits, per cent.
    pub time_share: f64,
    /// Median, microseconds.
    pub p50_us: f64,
    /// 99th percentile, microseconds.
    pub p99_us: f64,
    /// The longest, microseconds.
    pub longest_us: f64,
    /// Exits of each vCPU.
    pub vcpus: Vec<u64>,
}

/// The whole table.
#[derive(Debug, Default, Serialize)]
pub struct Table {
    /// Causes that happened, the most frequent first.
    pub causes: Vec<Row>,
    /// All exits.
    pub total: u64,
    /// What the engine did by itself; not exits.
    pub work: std::collections::BTreeMap<&'static str, u64>,
}

impl Table {
    /// Reads the ledgers of a machine, whose ticks are `tsc_khz` a millisecond.
    pub fn of(ledgers: &[Arc<Ledger>], tsc_khz: u64) -> Self {
        let khz = tsc_khz.max(1) as f64;
        let summaries: Vec<(Cause, Summary)> = Cause::ALL
            .into_iter()
            .map(|cause| (cause, Ledger::summary(ledgers.iter().map(Arc::as_ref), cause)))
            .filter(|(_, summary)| summary.count > 0)
            .collect();
        let total: u64 = summaries.iter().map(|(_, summary)| summary.count).sum();
        let ticks: u64 = summaries.iter().map(|(_, summary)| summary.ticks).sum();
        let percent = |part: u64, whole: u64| if whole == 0 { 0.0 } else { part as f64 * 100.0 / whole as f64 };
        let mut causes: Vec<_> = summaries
            .into_iter()
            .map(|(cause, summary)| Row {
                cause: cause.name(),
                count: summary.count,
                share: percent(summary.count, total),
                time_ms: summary.ticks as f64 / khz,
                time_share: percent(summary.ticks, ticks),
                p50_us: summary.p50 as f64 * 1000.0 / khz,
                p99_us: summary.p99 as f64 * 1000.0 / khz,
                longest_us: summary.longest as f64 * 1000.0 / khz,
                vcpus: ledgers.iter().map(|ledger| ledger.count(cause)).collect(),
            })
            .collect();
        causes.sort_by_key(|row| std::cmp::Reverse(row.count));
        let work = Work::ALL.into_iter().map(|work| {
            let amount = ledgers.iter().map(|ledger| ledger.worked(work)).sum::<u64>();
            (work.name(), amount)
        });
        Self { causes, total, work: work.collect() }
    }

    /// For a person. A column a vCPU where there are a few.
    pub fn print(&self) -> String {
        let vcpus = self.causes.first().map_or(0, |row| row.vcpus.len());
        let columns = if (2..=8).contains(&vcpus) { vcpus } else { 0 };
        let mut text = format!(
            "{:<16} {:>10} {:>6} {:>10} {:>6} {:>9} {:>9}",
            "EXIT", "COUNT", "%", "TIME ms", "TIME%", "P50 us", "P99 us"
        );
        (0..columns).for_each(|vcpu| text += &format!(" {:>9}", format!("vCPU {vcpu}")));
        for row in &self.causes {
            text += &format!(
                "\n{:<16} {:>10} {:>6.1} {:>10.1} {:>6.1} {:>9.2} {:>9.2}",
                row.cause, row.count, row.share, row.time_ms, row.time_share, row.p50_us, row.p99_us
            );
            row.vcpus.iter().take(columns).for_each(|count| text += &format!(" {count:>9}"));
        }
        text += &format!("\n{:<16} {:>10}\n", "total", self.total);
        let work: Vec<_> = self.work.iter().filter(|(_, amount)| **amount > 0).collect();
        if !work.is_empty() {
            let work: Vec<_> = work.iter().map(|(name, amount)| format!("{name} {amount}")).collect();
            text += &format!("engine's own work: {}\n", work.join(", "));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_adds_up_and_leads_with_the_most_frequent() {
        let ledgers: Vec<Arc<Ledger>> = (0..2).map(|_| Arc::default()).collect();
        ledgers[0].record(Cause::Halt, 2000);
        for ledger in &ledgers {
            for _ in 0..3 {
                ledger.record(Cause::PortWrite, 1000);
            }
        }
        ledgers[1].work(Work::Decode, 5);
        let table = Table::of(&ledgers, 1_000_000);
        assert_eq!(table.total, 7);
        let names: Vec<_> = table.causes.iter().map(|row| (row.cause, row.count, row.vcpus.clone())).collect();
        assert_eq!(names, [("port-write", 6, vec![3, 3]), ("halt", 1, vec![1, 0])]);
        assert!((table.causes[0].time_share - 75.0).abs() < 1e-9);
        let printed = table.print();
        assert!(printed.contains("vCPU 1"), "{printed}");
        assert!(printed.contains("total                     7"), "{printed}");
        assert!(printed.contains("decode 5"), "{printed}");
        assert_eq!(Table::of(&[], 0).total, 0);
    }
}
