//! `cargo xtask bench contract`: one operation as a trap, as a hypercall and through shared memory.
//!
//! ```text
//!   guest/suite, group cost ── # cost OPERATION WAY TIMES NANOSECONDS EXITS ──> a round's figure ──> medians ──> table
//! ```
//!
//! The same bare-metal guest in three places: our engine with every sensitive instruction an exit (`--virt classic`), our
//! engine as it is, and KVM where `/dev/kvm` opens. The guest for KVM is the one for integers only, so that one without
//! hardware help runs it; it does less in a round.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde::Serialize;
use serde_json::json;

use super::report::{self, Spread, Table, figure};
use super::{Options, TARGET};
use crate::run;

const ROUNDS: usize = 5;
/// Flags of the guest for integers only: guest/suite/README.md.
const INTEGERS: &str = "-C target-feature=-sse,-sse2,+soft-float --cfg integer_only";
/// Seconds after which a guest is stopped.
const PATIENCE: &str = "300";

/// Where a guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Place {
    Classic,
    Translator,
    Kvm,
}

impl Place {
    const ALL: [Self; 3] = [Self::Classic, Self::Translator, Self::Kvm];

    fn name(self) -> &'static str {
        match self {
            Self::Classic => "classic",
            Self::Translator => "translator",
            Self::Kvm => "KVM",
        }
    }

    fn words(self) -> [&'static str; 4] {
        match self {
            Self::Classic => ["--engine", "translate", "--virt", "classic"],
            Self::Translator => ["--engine", "translate", "--virt", "para"],
            Self::Kvm => ["--engine", "kvm-unprobed", "--virt", "para"],
        }
    }
}

/// What an operation is called, by each way, in the order of the table.
const ROWS: [(&str, &str, &str); 15] = [
    ("mask", "instruction", "interrupts off and on: CLI, STI"),
    ("mask", "call", "  IRQ_WINDOW, the call behind a masked section in which one came"),
    ("mask", "memory", "  the mask byte"),
    ("clock", "instruction", "the time: RDTSC"),
    ("clock", "device", "  the HPET's counter"),
    ("clock", "call", "  TIME_OF_DAY"),
    ("clock", "memory", "  the clock in the vCPU page"),
    ("end", "instruction", "the end of an interrupt: the local APIC's EOI register"),
    ("end", "call", "  ACK"),
    ("interrupt", "instruction", "an interrupt to oneself: sent, taken, ended by the EOI register"),
    ("interrupt", "call", "  ended by ACK"),
    ("interrupt", "memory", "  ended in memory"),
    ("timer", "instruction", "a timer: the local APIC's initial count"),
    ("timer", "call", "  SET_TIMER"),
    ("timer", "memory", "  SET_TIMER, eight in one MULTICALL, each"),
];

/// One line of the guest's.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Record {
    operation: String,
    way: String,
    /// Of one operation.
    ns: f64,
    exits: f64,
}

impl Record {
    /// Reads a line; `None` where it is another one.
    fn of(line: &str) -> Option<Self> {
        let words: Vec<&str> = line.strip_prefix("# cost ")?.split_whitespace().collect();
        let [operation, way, numbers @ ..] = words.as_slice() else { return None };
        let number = |text: &str| u64::from_str_radix(text.strip_prefix("0x")?, 16).ok().map(|number| number as f64);
        let [times, ns, exits] = numbers else { return None };
        let (times, ns, exits) = (number(times)?, number(ns)?, number(exits)?);
        (times > 0.0).then(|| Self {
            operation: (*operation).into(),
            way: (*way).into(),
            ns: ns / times,
            exits: exits / times,
        })
    }
}

/// One run of the guest.
#[derive(Serialize)]
struct Measured {
    place: Place,
    round: usize,
    records: Vec<Record>,
    failure: Option<String>,
}

/// Measures, prints, writes. True where every guest got through.
pub(super) fn run(options: &Options) -> Result<bool> {
    let root = super::root();
    let cordial = super::build_cordial(&root, options)?;
    let guests = [build(&root, "suite", None)?, build(&root, "suite-integers", Some(INTEGERS))?];
    report::warn_of_load();
    let mut places = Place::ALL.to_vec();
    if let Err(error) = std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        eprintln!("KVM is left out: /dev/kvm: {error}");
        places.retain(|place| *place != Place::Kvm);
    }
    let rounds = options.rounds.unwrap_or(ROUNDS);
    let mut measured = Vec::new();
    for round in 0..rounds {
        let mut turn = places.clone();
        if round % 2 == 1 {
            turn.reverse();
        }
        for place in turn {
            let one = measure(&cordial, &guests[usize::from(place == Place::Kvm)], place, round)?;
            eprintln!("round {}/{rounds}, {}: {} figures", round + 1, place.name(), one.records.len());
            one.failure.iter().for_each(|why| eprintln!("  failed: {why}"));
            measured.push(one);
        }
    }
    let cells = cells(&measured);
    report::show(&table(&cells, &places, options.best).print())?;
    if let Some(file) = &options.json {
        let about = report::host(&root, options);
        let rows: Vec<_> = cells
            .iter()
            .map(|((operation, way, place), cell)| {
                json!({ "operation": operation, "way": way, "place": place, "ns": cell.ns, "exits": cell.exits })
            })
            .collect();
        let document = json!({ "schema": "cordial.bench.contract/1", "about": about, "rows": rows, "runs": measured });
        report::write(file, &document)?;
    }
    Ok(measured.iter().all(|run| run.failure.is_none()))
}

/// Builds the conformance guest, which has the operations.
fn build(root: &Path, name: &str, flags: Option<&str>) -> Result<PathBuf> {
    let target = super::folder(root)?.join(name);
    let mut cargo = run::cargo(&root.join("guest"));
    cargo.args(["build", "--quiet", "--locked", "--package", "suite", "--target", TARGET]);
    cargo.arg("--target-dir").arg(&target).env_remove("RUSTFLAGS").envs(flags.map(|flags| ("RUSTFLAGS", flags)));
    ensure!(run::succeeds(&mut cargo)?, "{} failed", run::words(&cargo));
    Ok(target.join(TARGET).join("debug/suite"))
}

fn measure(cordial: &Path, guest: &Path, place: Place, round: usize) -> Result<Measured> {
    let mut command = Command::new(cordial);
    command.args(["run", "--test-devices", "--quiet", "--cpus", "1", "--mem", "128M", "--dialect", "cordial"]);
    command.args(place.words()).args(["--timeout", PATIENCE, "--append", "cost", "--kernel"]).arg(guest);
    let output = command.output().with_context(|| format!("cannot start {}", run::words(&command)))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let records = text.lines().filter_map(Record::of).collect();
    // The debug-exit port's status where every test passed.
    let good = output.status.code() == Some(1) && !text.contains("\nnot ok ");
    let failure = (!good).then(|| {
        let said = String::from_utf8_lossy(&output.stderr).lines().last().unwrap_or_default().to_owned();
        format!("{}: {said}", output.status)
    });
    Ok(Measured { place, round, records, failure })
}

/// What an operation costs by one way in one place.
#[derive(Debug, PartialEq)]
struct Cell {
    ns: Spread,
    /// The same in every round, or the least.
    exits: f64,
}

fn cells(measured: &[Measured]) -> BTreeMap<(String, String, Place), Cell> {
    let mut figures: BTreeMap<_, Vec<(f64, f64)>> = BTreeMap::new();
    for run in measured.iter().filter(|run| run.failure.is_none()) {
        for record in &run.records {
            let key = (record.operation.clone(), record.way.clone(), run.place);
            figures.entry(key).or_default().push((record.ns, record.exits));
        }
    }
    let cell = |figures: Vec<(f64, f64)>| {
        let (ns, exits): (Vec<f64>, Vec<f64>) = figures.into_iter().unzip();
        Some(Cell { ns: Spread::of(&ns)?, exits: Spread::of(&exits)?.least })
    };
    figures.into_iter().filter_map(|(key, figures)| Some((key, cell(figures)?))).collect()
}

fn table(cells: &BTreeMap<(String, String, Place), Cell>, places: &[Place], best: bool) -> Table {
    let names: Vec<String> = places.iter().flat_map(|place| [format!("{} ns", place.name()), "exits".into()]).collect();
    let mut header = vec!["operation, by what"];
    header.extend(names.iter().map(String::as_str));
    let mut table = Table::new(&header);
    for (operation, way, text) in ROWS {
        let mut row = vec![text.to_owned()];
        for place in places {
            let cell = cells.get(&(operation.to_owned(), way.to_owned(), *place));
            row.extend(match cell {
                Some(cell) => [
                    figure(if best { cell.ns.least } else { cell.ns.median }),
                    format!("{}", (cell.exits * 1000.0).round() / 1000.0),
                ],
                None => ["-".into(), "-".into()],
            });
        }
        table.row(row);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_and_others_are_not() {
        let record = Record::of("# cost timer memory 0x640 0xc80 0xc8").unwrap();
        assert_eq!((record.operation.as_str(), record.way.as_str()), ("timer", "memory"));
        assert_eq!((record.ns, record.exits), (2.0, 0.125));
        for other in
            ["ok 1 - cost: timer_by_call # 5 checks", "# cost a b 0x0 0x1 0x1", "# cost a b 0x1 1 0x1", "# cost a"]
        {
            assert_eq!(Record::of(other), None, "{other}");
        }
    }

    #[test]
    fn medians_are_of_rounds_that_got_through() {
        let run = |round, ns, failure: Option<&str>| Measured {
            place: Place::Classic,
            round,
            records: vec![Record { operation: "mask".into(), way: "instruction".into(), ns, exits: 2.0 }],
            failure: failure.map(str::to_owned),
        };
        let cells =
            cells(&[run(0, 10.0, None), run(1, 30.0, None), run(2, 20.0, None), run(3, 1000.0, Some("stopped"))]);
        let cell = &cells[&("mask".to_owned(), "instruction".to_owned(), Place::Classic)];
        assert_eq!((cell.ns.median, cell.exits), (20.0, 2.0));
        let printed = table(&cells, &[Place::Classic, Place::Kvm], false).print();
        assert!(printed.lines().nth(1).unwrap().contains("CLI, STI"), "{printed}");
        assert_eq!(printed.lines().count(), 1 + ROWS.len());
    }
}
