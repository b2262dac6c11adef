//! `cargo xtask bench cpu`: the workloads of guest/bench on the host, in Cordial and in QEMU.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::guest::{Place, Run};
use super::report::{self, Spread, Table, figure, geometric_mean};
use super::{Kit, MEMORY, Options, PROGRAM, Setup, guest};

const ROUNDS: usize = 3;
const SECONDS: f64 = 0.1;
/// Rounds that the program measures each time it runs.
const INNER_ROUNDS: usize = 3;
/// A guest's clock that is further off makes its figures worthless.
const CLOCK_TOLERANCE: f64 = 0.02;
/// A shorter time says nothing about a clock: when a line arrives is not exact.
const CLOCK_LEAST_MS: f64 = 3000.0;

/// One line of the program; see guest/bench.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Record {
    pub(super) name: String,
    kind: String,
    iterations: u64,
    best_ns: f64,
    pub(super) median_ns: f64,
    rounds_ns: Vec<f64>,
    pub(super) checksum: Option<String>,
    clock_ns: u64,
    pub(super) error: Option<String>,
}

impl Record {
    /// Reads a line; `None` where it is another one.
    pub(super) fn of(line: &str) -> Option<Self> {
        serde_json::from_str(line).ok()
    }
}

/// One run of the program.
#[derive(Serialize)]
struct Measured {
    place: Place,
    round: usize,
    records: Vec<Record>,
    /// The place's clock against this process's: 1 where they run alike.
    clock: Option<f64>,
    ready_ms: Option<f64>,
    end_ms: f64,
    failure: Option<String>,
}

impl Measured {
    fn of(place: Place, round: usize, run: &Run) -> Self {
        let record = |(when, line): &(f64, String)| Some((*when, Record::of(line)?));
        let timed: Vec<_> = run.lines.iter().filter_map(record).collect();
        let clock = match (timed.first(), timed.last()) {
            (Some((from, first)), Some((to, last))) if to - from > CLOCK_LEAST_MS => {
                Some(last.clock_ns.saturating_sub(first.clock_ns) as f64 / 1e6 / (to - from))
            }
            _ => None,
        };
        let records = timed.into_iter().map(|(_, record)| record).collect();
        Self { place, round, records, clock, ready_ms: run.ready_ms, end_ms: run.end_ms, failure: run.failure.clone() }
    }
}

/// Everything about one workload in one place.
#[derive(Debug, Default, PartialEq)]
struct Cell {
    ns: Option<f64>,
    /// How far the runs' figures lie apart, as a part of `ns`.
    spread: Option<f64>,
    /// Why there is no figure, or why it is worth nothing.
    trouble: Option<String>,
}

/// One line of the table.
#[derive(Debug)]
struct Row {
    name: String,
    kind: String,
    cells: BTreeMap<Place, Cell>,
}

impl Row {
    /// How many times as long `place` takes as `than`.
    fn factor(&self, place: Place, than: Place) -> Option<f64> {
        let ns = |place| self.cells.get(&place).filter(|cell| cell.trouble.is_none()).and_then(|cell| cell.ns);
        Some(ns(place)? / ns(than)?)
    }

    /// The largest spread of all places.
    fn spread(&self) -> Option<f64> {
        self.cells.values().filter_map(|cell| cell.spread).max_by(f64::total_cmp)
    }
}

/// Measures, prints, writes.
pub(super) fn run(options: &Options) -> Result<bool> {
    let root = super::root();
    let program = super::build_workloads(&root)?;
    let names = chosen(&super::output(std::process::Command::new(&program).arg("--list"))?, &options.only)?;
    let setup = Setup { memory: MEMORY, copies: &[(&program, PROGRAM)], disk: None };
    let machine = super::machine(&root, options, &setup)?;
    let seconds = options.seconds.unwrap_or(SECONDS).to_string();
    let words = ["--rounds", &INNER_ROUNDS.to_string(), "--seconds", &seconds].map(str::to_owned);
    let arguments = [words.as_slice(), &names].concat();
    let argv = |place: Place| -> Vec<String> {
        let program = if place == Place::Native { program.to_string_lossy().into_owned() } else { PROGRAM.into() };
        [&[program], arguments.as_slice()].concat()
    };
    compare(&Kit { root, machine, rounds: options.rounds.unwrap_or(ROUNDS), names, schema: "cpu" }, options, argv)
}

/// Runs `argv` of each place in turn, reads its records, prints the table, writes the document. True where Cordial's
/// results are right and complete.
pub(super) fn compare(kit: &Kit, options: &Options, argv: impl Fn(Place) -> Vec<String>) -> Result<bool> {
    let Kit { root, machine, rounds, names, schema } = kit;
    report::warn_of_load();
    let places = options.places(true);
    let mut measured = Vec::new();
    for round in 0..*rounds {
        for place in super::in_turn(&places, round) {
            let run = guest::run(place, machine, &argv(place))?;
            let one = Measured::of(place, round, &run);
            let (done, all, seconds) = (one.records.len(), names.len(), one.end_ms / 1e3);
            eprintln!("round {}/{rounds}, {place}: {done} of {all}, {seconds:.1} s", round + 1);
            one.failure.iter().for_each(|why| eprintln!("  failed: {why}"));
            measured.push(one);
        }
    }
    let rows = rows(names, &places, &measured, options.best);
    let troubles = [troubles(&rows), clock_troubles(&measured, &places)].concat();
    let lines: String = troubles.iter().map(|trouble| format!("{}\n", trouble.text)).collect();
    report::show(&(table(&rows, &places).print() + &lines))?;
    if let Some(file) = &options.json {
        let about = report::surroundings(root, machine, options);
        let summary: Vec<_> = rows.iter().map(summary).collect();
        let means: Vec<_> = groups(&rows).iter().map(|(group, rows)| means(group, rows)).collect();
        let schema = format!("cordial.bench.{schema}/1");
        let document = json!({ "schema": schema, "about": about, "rows": summary, "means": means, "runs": measured });
        report::write(file, &document)?;
    }
    Ok(!troubles.iter().any(|trouble| trouble.ours))
}

/// The workloads to run, of those that the program lists.
pub(super) fn chosen(list: &str, only: &[String]) -> Result<Vec<String>> {
    let all: Vec<String> = list.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect();
    for name in only {
        ensure!(all.contains(name), "--only {name}: there is no such workload; there are {}", all.join(", "));
    }
    Ok(if only.is_empty() { all } else { only.to_vec() })
}

/// Per workload and place the median of the runs' medians, or the best round of all.
fn rows(names: &[String], places: &[Place], measured: &[Measured], best: bool) -> Vec<Row> {
    let of = |name: &str, place: Place| -> Vec<&Record> {
        let runs = measured.iter().filter(|run| run.place == place);
        runs.flat_map(|run| run.records.iter().filter(|record| record.name == name)).collect()
    };
    let row = |name: &String| {
        let native = of(name, Place::Native);
        let expected = native.iter().find_map(|record| record.checksum.as_ref());
        let cell = |place: &Place| (*place, cell(&of(name, *place), expected, best));
        let kind = measured.iter().flat_map(|run| &run.records).find(|record| record.name == *name);
        let kind = kind.map_or_else(|| "?".to_owned(), |record| record.kind.clone());
        Row { name: name.clone(), kind, cells: places.iter().map(cell).collect() }
    };
    names.iter().map(row).collect()
}

fn cell(records: &[&Record], expected: Option<&String>, best: bool) -> Cell {
    let wrong = records.iter().find(|record| record.error.is_none() && record.checksum.as_ref() != expected);
    let trouble = match (records.iter().find_map(|record| record.error.clone()), wrong) {
        (Some(error), _) => Some(error),
        (None, Some(record)) => Some(format!("wrong result {}", record.checksum.as_deref().unwrap_or("none"))),
        (None, None) if records.is_empty() => Some("no result".to_owned()),
        (None, None) => None,
    };
    let good = records.iter().filter(|record| record.error.is_none());
    let figures: Vec<f64> = good.map(|record| if best { record.best_ns } else { record.median_ns }).collect();
    let ns = Spread::of(&figures);
    let spread = ns.map(|ns| (ns.most - ns.least) / ns.median);
    Cell { ns: ns.map(|ns| if best { ns.least } else { ns.median }), spread, trouble }
}

/// Rows by kind, then all of user mode, then all.
fn groups(rows: &[Row]) -> Vec<(String, Vec<&Row>)> {
    let mut kinds: Vec<&str> = Vec::new();
    for row in rows {
        if !kinds.contains(&row.kind.as_str()) {
            kinds.push(&row.kind);
        }
    }
    let of = |wanted: &dyn Fn(&Row) -> bool| rows.iter().filter(|row| wanted(row)).collect::<Vec<_>>();
    let mut groups: Vec<_> = kinds.iter().map(|kind| ((*kind).to_owned(), of(&|row| row.kind == *kind))).collect();
    if kinds.len() > 1 {
        groups.push(("user mode".into(), of(&|row| row.kind != "kernel")));
        groups.push(("all".into(), of(&|_| true)));
    }
    groups
}

/// The columns that compare: which place with which.
const FACTORS: [(Place, Place, &str); 3] = [
    (Place::Cordial, Place::Native, "Cordial/native"),
    (Place::Qemu, Place::Native, "QEMU/native"),
    (Place::Cordial, Place::Qemu, "Cordial/QEMU"),
];

fn table(rows: &[Row], places: &[Place]) -> Table {
    let factors: Vec<_> =
        FACTORS.iter().filter(|(place, than, _)| places.contains(place) && places.contains(than)).collect();
    let names: Vec<&str> = factors.iter().map(|(_, _, name)| *name).collect();
    let mut table = Table::new(&[&["workload", "kind", "native ns"], names.as_slice(), &["spread %"]].concat());
    let shown = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), figure);
    for row in rows {
        let native = row.cells.get(&Place::Native).and_then(|cell| cell.ns);
        let mut cells = vec![row.name.clone(), row.kind.clone(), shown(native)];
        cells.extend(factors.iter().map(|(place, than, _)| shown(row.factor(*place, *than))));
        cells.push(row.spread().map_or_else(|| "-".to_owned(), |spread| format!("{:.0}", spread * 100.0)));
        table.row(cells);
    }
    table.rule();
    for (group, rows) in groups(rows) {
        let mut cells = vec!["geometric mean".to_owned(), group, String::new()];
        let mean =
            |place, than| geometric_mean(&rows.iter().filter_map(|row| row.factor(place, than)).collect::<Vec<_>>());
        cells.extend(factors.iter().map(|(place, than, _)| shown(mean(*place, *than))));
        table.row(cells);
    }
    table
}

/// Something that the reader must know, and whether it is Cordial's fault.
#[derive(Clone, Debug, PartialEq)]
struct Trouble {
    text: String,
    ours: bool,
}

/// What has no figure. An instruction that the host does not have either is nobody's fault.
fn troubles(rows: &[Row]) -> Vec<Trouble> {
    let of_row = |row: &Row| -> Vec<Trouble> {
        let native = row.cells.get(&Place::Native).is_some_and(|cell| cell.trouble.is_none());
        let troubled = row.cells.iter().filter_map(|(place, cell)| Some((*place, cell.trouble.as_ref()?)));
        troubled
            .map(|(place, trouble)| Trouble {
                text: format!("{} in {place}: {trouble}", row.name),
                ours: native && place == Place::Cordial,
            })
            .collect()
    };
    rows.iter().flat_map(of_row).collect()
}

/// Whose clock is off.
fn clock_troubles(measured: &[Measured], places: &[Place]) -> Vec<Trouble> {
    let of_place = |place: &Place| {
        let clocks = measured.iter().filter(|run| run.place == *place).filter_map(|run| run.clock);
        let off = clocks.map(|clock| (clock - 1.0).abs()).fold(0.0, f64::max);
        (off > CLOCK_TOLERANCE).then(|| Trouble {
            text: format!("The clock of {place} is off by {:.1} %: its figures are worth nothing.", off * 100.0),
            ours: *place == Place::Cordial,
        })
    };
    places.iter().filter_map(of_place).collect()
}

fn summary(row: &Row) -> serde_json::Value {
    let places: serde_json::Map<_, _> = row
        .cells
        .iter()
        .map(|(place, cell)| {
            (place.to_string(), json!({ "ns": cell.ns, "spread": cell.spread, "trouble": cell.trouble }))
        })
        .collect();
    json!({ "name": row.name, "kind": row.kind, "places": places, "factors": factors(|place, than| row.factor(place, than)) })
}

fn means(group: &str, rows: &[&Row]) -> serde_json::Value {
    let mean = |place, than| geometric_mean(&rows.iter().filter_map(|row| row.factor(place, than)).collect::<Vec<_>>());
    json!({ "group": group, "factors": factors(mean) })
}

fn factors(of: impl Fn(Place, Place) -> Option<f64>) -> serde_json::Value {
    FACTORS
        .iter()
        .map(|(place, than, name)| ((*name).to_owned(), json!(of(*place, *than))))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(name: &str, ns: f64, checksum: &str) -> Record {
        let line = json!({
            "name": name, "kind": "integer", "iterations": 1, "best_ns": ns, "median_ns": ns, "rounds_ns": [ns],
            "checksum": checksum, "clock_ns": 0,
        });
        serde_json::from_value(line).unwrap()
    }

    fn measured(place: Place, records: Vec<Record>) -> Measured {
        Measured { place, round: 0, records, clock: Some(1.0), ready_ms: None, end_ms: 0.0, failure: None }
    }

    #[test]
    fn a_wrong_result_has_no_factor_and_is_ours_to_mend() {
        let places = [Place::Native, Place::Cordial, Place::Qemu];
        let names = ["right", "wrong"].map(str::to_owned);
        let runs = [
            measured(Place::Native, vec![record("right", 1.0, "a"), record("wrong", 1.0, "b")]),
            measured(Place::Cordial, vec![record("right", 10.0, "a"), record("wrong", 10.0, "c")]),
            measured(Place::Qemu, vec![record("right", 5.0, "a")]),
        ];
        let rows = rows(&names, &places, &runs, false);
        assert_eq!(rows[0].factor(Place::Cordial, Place::Native), Some(10.0));
        assert_eq!(rows[0].factor(Place::Cordial, Place::Qemu), Some(2.0));
        assert_eq!(rows[0].spread(), Some(0.0));
        assert_eq!(rows[1].factor(Place::Cordial, Place::Native), None);
        let troubles = troubles(&rows);
        assert_eq!(troubles[0], Trouble { text: "wrong in Cordial: wrong result c".into(), ours: true });
        assert_eq!(troubles[1], Trouble { text: "wrong in QEMU: no result".into(), ours: false });
    }

    #[test]
    fn a_clock_that_is_off_is_told() {
        let mut run = measured(Place::Cordial, Vec::new());
        assert!(clock_troubles(std::slice::from_ref(&run), &[Place::Cordial]).is_empty());
        run.clock = Some(0.9);
        let [trouble] = &clock_troubles(&[run], &[Place::Cordial])[..] else { panic!("one trouble") };
        assert!(trouble.ours && trouble.text.contains("10.0 %"), "{}", trouble.text);
    }

    #[test]
    fn only_known_workloads_are_chosen() {
        let list = "sort   4096 numbers\nhash   a table\n";
        assert_eq!(chosen(list, &[]).unwrap(), ["sort", "hash"]);
        assert_eq!(chosen(list, &["hash".into()]).unwrap(), ["hash"]);
        assert!(chosen(list, &["hush".into()]).unwrap_err().to_string().contains("--only hush"));
    }
}
