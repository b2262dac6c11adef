//! `cargo xtask bench boot`: how long a guest takes to its first process, and what the monitor costs in memory.

use anyhow::Result;
use serde_json::json;

use super::guest::{Place, Run};
use super::report::{self, Spread, Table};
use super::{MEMORY, Options, Setup, guest};

const ROUNDS: usize = 5;

/// Reads one figure of a run.
type Figure = fn(&Run) -> Option<f64>;

/// What is measured of a run, by name; milliseconds or MiB.
const FIGURES: [(&str, Figure); 5] = [
    ("first console output, ms", |run| run.first_output_ms),
    ("first process, ms", |run| run.ready_ms),
    ("whole run of `true`, ms", |run| Some(run.end_ms)),
    ("guest RAM touched, MiB", |run| Some(run.memory?.guest_touched as f64 / MIB)),
    ("peak memory beyond it, MiB", |run| Some(run.memory?.overhead() as f64 / MIB)),
];
const MIB: f64 = 1_048_576.0;

/// Measures, prints, writes.
pub(super) fn run(options: &Options) -> Result<bool> {
    let root = super::root();
    report::warn_of_load();
    let places = options.places(false);
    let machine = super::machine(&root, options, &Setup { memory: MEMORY, ..Setup::default() })?;
    let rounds = options.rounds.unwrap_or(ROUNDS);
    let mut runs: Vec<(Place, Run)> = Vec::new();
    for round in 0..rounds {
        for place in super::in_turn(&places, round) {
            let run = guest::run(place, &machine, &["true".to_owned()])?;
            let outcome = match (&run.failure, run.ready_ms) {
                (None, Some(ready)) => format!("{ready:.0} ms"),
                (failure, _) => format!("failed: {}", failure.as_deref().unwrap_or("no first process")),
            };
            eprintln!("round {}/{rounds}, {place}: {outcome}", round + 1);
            runs.push((place, run));
        }
    }
    let of = |place: Place, figure: Figure| {
        let good = runs.iter().filter(|(at, run)| *at == place && run.failure.is_none());
        Spread::of(&good.filter_map(|(_, run)| figure(run)).collect::<Vec<_>>())
    };
    let mut table = Table::new(&["figure", "place", "median", "least", "most"]);
    for (name, figure) in FIGURES {
        for place in &places {
            let figures = of(*place, figure).map_or_else(
                || ["-", "-", "-"].map(str::to_owned),
                |spread| [spread.median, spread.least, spread.most].map(|value| format!("{value:.1}")),
            );
            let [median, least, most] = figures;
            table.row(vec![name.into(), place.to_string(), median, least, most]);
        }
    }
    let ready = |place| of(place, |run| run.ready_ms).map(|spread| spread.median);
    let factor = ready(Place::Cordial).zip(ready(Place::Qemu)).map(|(cordial, qemu)| cordial / qemu);
    let words =
        factor.map(|factor| format!("\nCordial takes {factor:.2} times as long as QEMU to the first process.\n"));
    report::show(&(table.print() + &words.unwrap_or_default()))?;
    let failed: Vec<_> = runs.iter().filter(|(_, run)| run.failure.is_some()).collect();
    if let Some(file) = &options.json {
        let runs: Vec<_> = runs.iter().map(|(place, run)| json!({ "place": place, "run": run })).collect();
        let host = report::surroundings(&root, &machine, options);
        report::write(
            file,
            &json!({ "schema": "cordial.bench.boot/1", "about": host, "factor": factor, "runs": runs }),
        )?;
    }
    Ok(failed.is_empty())
}
