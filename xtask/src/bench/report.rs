//! Medians, geometric means, tables, and what is to be known of the surroundings of a measurement.

use std::io::Write as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};
use serde::Serialize;
use serde_json::{Value, json};

use super::guest::Machine;
use super::{Options, qemu};

/// The middle and the ends of some figures.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) least: f64,
    pub(super) most: f64,
}

impl Spread {
    /// `None` of nothing.
    pub(super) fn of(figures: &[f64]) -> Option<Self> {
        let mut sorted = figures.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (least, most) = (*sorted.first()?, *sorted.last()?);
        let median = (sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2]) / 2.0;
        Some(Self { median, least, most })
    }
}

/// The geometric mean: of ratios, the one whose inverse is the mean of the inverses. `None` of nothing.
pub(super) fn geometric_mean(figures: &[f64]) -> Option<f64> {
    let sum: f64 = figures.iter().map(|figure| figure.ln()).sum();
    (!figures.is_empty()).then(|| (sum / figures.len() as f64).exp())
}

/// Columns of text; all but the leading ones with names are aligned to the right.
pub(super) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(super) fn new(header: &[&str]) -> Self {
        Self { rows: vec![header.iter().map(|&name| name.to_owned()).collect()] }
    }

    pub(super) fn row(&mut self, row: Vec<String>) {
        self.rows.push(row);
    }

    /// A line between groups of rows.
    pub(super) fn rule(&mut self) {
        self.rows.push(Vec::new());
    }

    pub(super) fn print(&self) -> String {
        let columns = self.rows[0].len();
        let width =
            |column: usize| self.rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
        let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
        // A column of figures has nothing but figures and dashes below its header.
        let is_number =
            |cell: &String| cell.is_empty() || cell.starts_with(|first: char| first.is_ascii_digit() || first == '-');
        let right: Vec<bool> = (0..columns)
            .map(|column| self.rows.iter().skip(1).filter_map(|row| row.get(column)).all(is_number))
            .collect();
        let line = |row: &Vec<String>| {
            let cells = row.iter().enumerate().map(|(column, cell)| match right[column] {
                true => format!("{cell:>width$}", width = widths[column]),
                false => format!("{cell:<width$}", width = widths[column]),
            });
            cells.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
        };
        self.rows.iter().map(line).collect()
    }
}

/// Three or four digits that mean something.
pub(super) fn figure(value: f64) -> String {
    match value {
        value if value >= 100.0 => format!("{value:.0}"),
        value if value >= 10.0 => format!("{value:.1}"),
        value => format!("{value:.2}"),
    }
}

/// What must be known to make sense of the figures: versions, processor, kernels, date.
pub(super) fn surroundings(root: &Path, machine: &Machine, options: &Options) -> Value {
    let mut about = host(root, options);
    about["cordial"] = json!(said(Command::new(&machine.cordial).arg("--version")));
    about["qemu"] = json!(qemu::version());
    about["qemu_options"] = json!(qemu::machine_words(machine));
    about["guest_kernel"] = json!(machine.kernel.file_name().map(|name| name.to_string_lossy()));
    about["command_line"] = json!(machine.command_line);
    about["memory_mib"] = json!(machine.memory);
    about
}

/// Output of a command, where it succeeds.
fn said(command: &mut Command) -> Option<String> {
    let output = command.output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}

/// What of that no guest has a part in.
pub(super) fn host(root: &Path, options: &Options) -> Value {
    let first = |path: &str, name: &str| {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.lines().find_map(|line| Some(line.strip_prefix(name)?.trim_start_matches([' ', '\t', ':']).to_owned()))
    };
    let git = |words: &[&str]| said(Command::new("git").arg("-C").arg(root).args(words));
    json!({
        "date": said(Command::new("date").args(["--utc", "--iso-8601=seconds"])),
        "revision": git(&["rev-parse", "HEAD"]),
        "changed": git(&["status", "--porcelain"]).map(|text| !text.is_empty()),
        "given_program": options.cordial,
        "processor": first("/proc/cpuinfo", "model name"),
        "processors": std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
        "host_kernel": first("/proc/version", ""),
        "load": first("/proc/loadavg", ""),
    })
}

/// Prints the results: they are this command's data, and go to standard output.
pub(super) fn show(text: &str) -> Result<()> {
    std::io::stdout().write_all(text.as_bytes()).context("cannot print the results")
}

/// Says so where others are at work: they take the processor from one place more than from another.
pub(super) fn warn_of_load() {
    const IDLE: f64 = 0.5;
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = text.split_whitespace().next().and_then(|word| word.parse::<f64>().ok());
    if let Some(load) = load.filter(|load| *load > IDLE) {
        eprintln!("the machine is busy (load {load}): look at the spread before you trust a figure");
    }
}

/// Writes a document.
pub(super) fn write(file: &Path, document: &Value) -> Result<()> {
    let text = serde_json::to_string_pretty(document)? + "\n";
    std::fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_means() {
        assert_eq!(Spread::of(&[3.0, 1.0, 2.0]), Some(Spread { median: 2.0, least: 1.0, most: 3.0 }));
        assert_eq!(Spread::of(&[4.0, 1.0]).unwrap().median, 2.5);
        assert_eq!(Spread::of(&[]), None);
        assert!((geometric_mean(&[2.0, 8.0]).unwrap() - 4.0).abs() < 1e-9);
        assert_eq!(geometric_mean(&[]), None);
    }

    #[test]
    fn figures_stand_to_the_right() {
        let mut table = Table::new(&["name", "ns"]);
        table.row(vec!["a".into(), "1.00".into()]);
        table.row(vec!["longer".into(), "100".into()]);
        assert_eq!(table.print(), "name      ns\na       1.00\nlonger   100\n");
        assert_eq!([1.234, 12.34, 123.4].map(figure), ["1.23", "12.3", "123"]);
    }
}
