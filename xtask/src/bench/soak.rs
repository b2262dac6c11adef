//! `cargo xtask soak`: the programs again and again, each time with the right results, in a monitor that does not grow.
//!
//! ```text
//!   native       each program once                        what is expected, and which are the short ones
//!   translator   one guest, round after round      ─┬──>  a wrong result, a failure, a monitor that grows: the end
//!   lockstep     another, the short programs first ─┘
//! ```

use std::collections::{BTreeMap, VecDeque};
use std::io::{IsTerminal as _, Write as _};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use super::cpu::Record;
use super::guest::{self, Happening, Happenings, Place, Running};
use super::programs::{self, Stage};
use super::{Options, curve, memory, report};

const USAGE: &str = "\
Usage: cargo xtask soak [OPTION...]

Runs the programs of `bench programs` over and over in one guest, then in another in lockstep with the interpreter. Fails
where a program or its guest fails, a result is not that of the host, the engine disagrees with itself, or the monitor's
memory beyond guest RAM grows.

  --minutes N            with the translator; default 60, 0 leaves it out
  --lockstep-minutes N   in lockstep, once the guest has started, which takes minutes; default 10, 0 leaves it out
  --only NAME,...        these programs only
  --cordial FILE         this program instead of building one";

/// Time between two looks at the monitor's memory.
const INTERVAL: Duration = Duration::from_secs(10);
/// The monitor of a guest from which nothing is heard for so long is given up. In lockstep a program takes minutes.
const PATIENCE: Duration = Duration::from_secs(3600);
/// How soon a wish to stop is seen.
const ATTENTION: Duration = Duration::from_millis(500);
/// Lines kept of what a monitor or a guest complains about: a report of the engine fits.
const COMPLAINTS: usize = 200;
/// Status of `cordial run` where lockstep finds a difference, among other failures of the monitor.
const MONITOR_FAILED: i32 = 125;

/// What was asked for.
#[derive(Debug)]
struct Asked {
    minutes: f64,
    lockstep_minutes: f64,
    options: Options,
}

impl Asked {
    fn parse(words: &[&str]) -> Result<Self> {
        let mut asked = Self { minutes: 60.0, lockstep_minutes: 10.0, options: Options::default() };
        let mut rest = words;
        while let [option, after @ ..] = rest {
            ensure!(
                ["--minutes", "--lockstep-minutes", "--only", "--cordial"].contains(option),
                "unknown option {option}\n{USAGE}"
            );
            let [value, after @ ..] = after else { bail!("{option} needs a value\n{USAGE}") };
            let minutes = || {
                let minutes = value.parse().ok().filter(|minutes| (0.0..=100_000.0).contains(minutes));
                minutes.with_context(|| format!("{option} {value}: not a number of minutes from 0 to 100000"))
            };
            match *option {
                "--minutes" => asked.minutes = minutes()?,
                "--lockstep-minutes" => asked.lockstep_minutes = minutes()?,
                "--only" => asked.options.only = value.split(',').map(str::to_owned).collect(),
                _ => asked.options.cordial = Some(value.into()),
            }
            rest = after;
        }
        Ok(asked)
    }
}

/// A guest that runs for long.
struct Stretch<'a> {
    name: &'static str,
    /// More words for the monitor.
    words: &'static [&'static str],
    minutes: f64,
    /// The programs, in their order.
    names: &'a [String],
}

/// Runs all of it; true where nothing was wrong.
pub(crate) fn run(words: &[&str]) -> Result<bool> {
    let asked = Asked::parse(words)?;
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&stop)).context("cannot watch for signals")?;
    }
    let root = super::root();
    let names = programs::chosen(&asked.options)?;
    let reference = reference(&root, &asked.options, &names)?;
    let expected: BTreeMap<_, _> =
        reference.iter().map(|record| (record.name.clone(), record.checksum.clone())).collect();
    let mut short_first = reference;
    short_first.sort_by(|one, other| one.median_ns.total_cmp(&other.median_ns));
    let short_first: Vec<String> = short_first.into_iter().map(|record| record.name).collect();
    let stretches = [
        // A code cache that is full before the first quarter is over: what grows behind that is no code.
        Stretch { name: "translator", words: &["--code-cache", "64M"], minutes: asked.minutes, names: &names },
        Stretch {
            name: "lockstep",
            words: &["--engine-check", "lockstep"],
            minutes: asked.lockstep_minutes,
            names: &short_first,
        },
    ];
    let mut good = true;
    for stretch in stretches.iter().filter(|stretch| stretch.minutes > 0.0) {
        good &= soak(&root, &asked.options, stretch, &expected, &stop)?;
    }
    Ok(good)
}

/// What the programs come to on the host.
fn reference(root: &Path, options: &Options, names: &[String]) -> Result<Vec<Record>> {
    eprintln!("soak: {} programs on the host, for their results", names.len());
    let Stage { machine, native, .. } = Stage::set(root, options, &programs::script(names, programs::LEAST))?;
    let run = guest::run(Place::Native, &machine, &native)?;
    let records: Vec<_> = run.lines.iter().filter_map(|(_, line)| Record::of(line)).collect();
    if let Some((name, error)) = records.iter().find_map(|record| Some((&record.name, record.error.as_ref()?))) {
        bail!("{name} does not run on the host: {error}");
    }
    ensure!(records.len() == names.len(), "the programs do not run on the host: {}", run.failure.unwrap_or_default());
    Ok(records)
}

/// Runs one guest for its time; prints how it went. True where the monitor has not grown.
///
/// # Errors
/// What else was wrong.
fn soak(
    root: &Path,
    options: &Options,
    stretch: &Stretch<'_>,
    expected: &BTreeMap<String, Option<String>>,
    stop: &AtomicBool,
) -> Result<bool> {
    let seconds = (stretch.minutes * 60.0).ceil() as u64;
    let stage = Stage::set(root, options, &programs::endless(stretch.names, seconds))?;
    let (running, happenings) = guest::start(&stage.machine, stretch.words, &stage.guest)?;
    let mut watch = Watch::new(stretch, expected, stage.machine.memory << 20);
    let ended = watch.follow(running, &happenings, stop);
    report::show(&watch.summary())?;
    ended?;
    let memory = watch.curve.verdict();
    report::show(&format!("{}: {memory}\n", stretch.name))?;
    match watch.trouble {
        Some(trouble) => bail!("{}: {trouble}", stretch.name),
        None => Ok(!memory.is_growth()),
    }
}

/// What is known of a guest while it runs.
struct Watch<'a> {
    stretch: &'a Stretch<'a>,
    expected: &'a BTreeMap<String, Option<String>>,
    /// Bytes of guest RAM.
    ram: u64,
    started: Instant,
    /// The guest's first process runs.
    ready: bool,
    /// How often each program has run.
    runs: BTreeMap<String, u64>,
    looks: u64,
    curve: curve::Curve,
    complaints: VecDeque<String>,
    status: Option<i32>,
    /// What is wrong.
    trouble: Option<String>,
}

impl<'a> Watch<'a> {
    fn new(stretch: &'a Stretch<'a>, expected: &'a BTreeMap<String, Option<String>>, ram: u64) -> Self {
        Self {
            stretch,
            expected,
            ram,
            started: Instant::now(),
            ready: false,
            runs: BTreeMap::new(),
            looks: 0,
            curve: curve::Curve::default(),
            complaints: VecDeque::new(),
            status: None,
            trouble: None,
        }
    }

    /// Until the guest has ended, or something is wrong: that is the end, too.
    fn follow(&mut self, mut running: Running, happenings: &Happenings, stop: &AtomicBool) -> Result<()> {
        let (mut open, mut heard, mut look) = (2, Instant::now(), Instant::now() + INTERVAL);
        while open > 0 && self.trouble.is_none() {
            if stop.load(Ordering::Relaxed) {
                end_progress();
                bail!("{} was stopped; nothing was wrong until then", self.stretch.name);
            }
            let now = Instant::now();
            if now >= look {
                look = now + INTERVAL;
                self.look(running.0.id());
            }
            match happenings.recv_timeout(ATTENTION.min(look.saturating_duration_since(now))) {
                Ok((_, Happening::Closed)) => open -= 1,
                Ok((when, happening)) => {
                    heard = when;
                    self.heard(happening);
                }
                Err(RecvTimeoutError::Timeout) if heard.elapsed() > PATIENCE => {
                    self.trouble = Some(format!("nothing was heard for {} minutes", PATIENCE.as_secs() / 60));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        end_progress();
        if self.trouble.is_none() {
            let code = running.0.wait().context("lost the monitor")?.code();
            self.ended(code);
        }
        Ok(())
    }

    /// Notes the monitor's memory, and says how far things are.
    fn look(&mut self, id: u32) {
        if let Some(figures) = memory::of_process(id, self.ram).filter(|_| self.ready) {
            self.curve.note(self.started.elapsed(), figures.own);
        }
        progress(&self.line(), self.looks);
        self.looks += 1;
    }

    fn line(&self) -> String {
        let Stretch { name, minutes, .. } = self.stretch;
        let (passed, runs) = (self.started.elapsed().as_secs_f64() / 60.0, self.runs.values().sum::<u64>());
        let rounds = self.stretch.names.iter().map(|name| self.runs.get(name).copied().unwrap_or(0)).min().unwrap_or(0);
        let memory = self.curve.last().map_or_else(String::new, |mib| format!(", monitor {mib:.1} MiB"));
        let state = if self.ready { "" } else { ", starting" };
        format!("soak: {name}, {passed:.1} minutes of about {minutes}: {runs} runs, {rounds} of each{memory}{state}")
    }

    fn heard(&mut self, happening: Happening) {
        match happening {
            Happening::Ready(_) => self.ready = true,
            Happening::Line(line) => match Record::of(&line) {
                Some(record) => self.record(&record),
                None => self.complain(line),
            },
            Happening::Complaint(line) => self.complain(line),
            Happening::Exit(status) => self.status = Some(status),
            Happening::FirstOutput | Happening::Event(_) | Happening::Closed => {}
        }
    }

    fn complain(&mut self, line: String) {
        if self.complaints.len() == COMPLAINTS {
            self.complaints.pop_front();
        }
        self.complaints.push_back(line);
    }

    /// Judges one run of a program.
    fn record(&mut self, record: &Record) {
        let Record { name, checksum, error, .. } = record;
        let runs = self.runs.entry(name.clone()).or_default();
        *runs += 1;
        let shown = |sum: Option<&String>| sum.map_or_else(|| "none".to_owned(), String::clone);
        self.trouble = match (error, self.expected.get(name)) {
            (Some(error), _) => Some(format!("run {runs} of {name} failed: {error}")),
            (None, Some(expected)) if expected == checksum => None,
            (None, expected) => Some(format!(
                "run {runs} of {name} has the wrong result {}, not {}",
                shown(checksum.as_ref()),
                shown(expected.and_then(Option::as_ref))
            )),
        };
    }

    /// Judges the end of the monitor's process.
    fn ended(&mut self, code: Option<i32>) {
        let said: String = self.complaints.iter().map(|line| format!("\n  {line}")).collect();
        self.trouble = match (self.status, code) {
            (Some(0), Some(0)) if self.runs.is_empty() => Some("no program has run".into()),
            (Some(0), Some(0)) => None,
            (_, Some(MONITOR_FAILED)) => {
                Some(format!("the monitor failed, or the engine does not agree with itself:{said}"))
            }
            (_, code) => {
                let code = code.map_or_else(|| "a signal".to_owned(), |code| format!("status {code}"));
                Some(format!("the guest ended with {code}:{said}"))
            }
        };
    }

    /// The curve, and how often each program ran.
    fn summary(&self) -> String {
        let name = self.stretch.name;
        let runs: Vec<_> = self.runs.iter().map(|(program, runs)| format!("{program} {runs}")).collect();
        let minutes = self.started.elapsed().as_secs_f64() / 60.0;
        let ran = if runs.is_empty() { "none".to_owned() } else { runs.join(", ") };
        format!("{}{name}: runs in {minutes:.1} minutes: {ran}\n", self.curve.print(name))
    }
}

/// A line that replaces the one before on a terminal; elsewhere one a minute.
fn progress(line: &str, looks: u64) {
    if std::io::stderr().is_terminal() {
        eprint!("\r\x1b[K{line}");
    } else if looks.is_multiple_of(6) {
        eprintln!("{line}");
    }
    // A terminal that is gone does not matter.
    let _ = std::io::stderr().flush();
}

fn end_progress() {
    if std::io::stderr().is_terminal() {
        eprintln!();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_understood_or_refused() {
        let asked = Asked::parse(&["--minutes", "0.5", "--only", "sort,grep", "--cordial", "x"]).unwrap();
        assert_eq!((asked.minutes, asked.lockstep_minutes), (0.5, 10.0));
        assert_eq!((asked.options.only.len(), asked.options.cordial), (2, Some("x".into())));
        let refused = |words: &[&str]| Asked::parse(words).unwrap_err().to_string();
        assert!(refused(&["--minutes"]).starts_with("--minutes needs a value"));
        assert!(refused(&["--lockstep-minutes", "-1"]).starts_with("--lockstep-minutes -1: not a number"));
        assert!(refused(&["--rounds", "3"]).starts_with("unknown option --rounds"));
    }

    fn watched(check: impl FnOnce(&mut Watch<'_>)) {
        let names = ["sort".to_owned(), "redis".to_owned()];
        let expected = BTreeMap::from([("sort".to_owned(), Some("a1".to_owned())), ("redis".to_owned(), None)]);
        let stretch = Stretch { name: "translator", words: &[], minutes: 1.0, names: &names };
        check(&mut Watch::new(&stretch, &expected, 0));
    }

    fn line(name: &str, checksum: Option<&str>, error: Option<&str>) -> Happening {
        let line = serde_json::json!({
            "name": name, "kind": "program", "iterations": 1, "best_ns": 1, "median_ns": 1, "rounds_ns": [1],
            "checksum": checksum, "clock_ns": 0, "error": error,
        });
        Happening::Line(line.to_string())
    }

    #[test]
    fn a_wrong_result_and_a_failure_are_trouble() {
        watched(|watch| {
            watch.heard(line("sort", Some("a1"), None));
            watch.heard(line("redis", None, None));
            watch.heard(Happening::Exit(0));
            watch.ended(Some(0));
            assert_eq!(watch.trouble, None);
            watch.heard(line("sort", Some("b2"), None));
            assert_eq!(watch.trouble.as_deref(), Some("run 2 of sort has the wrong result b2, not a1"));
            watch.heard(line("redis", None, Some("exit status: 3")));
            assert_eq!(watch.trouble.as_deref(), Some("run 2 of redis failed: exit status: 3"));
        });
    }

    #[test]
    fn the_end_of_the_monitor_is_judged() {
        watched(|watch| {
            watch.heard(Happening::Exit(0));
            watch.ended(Some(0));
            assert_eq!(watch.trouble.as_deref(), Some("no program has run"));
        });
        watched(|watch| {
            watch.heard(line("sort", Some("a1"), None));
            watch.heard(Happening::Complaint("block at 0x10".into()));
            watch.ended(Some(125));
            let trouble = watch.trouble.as_deref().unwrap_or_default();
            assert!(trouble.contains("does not agree with itself:\n  block at 0x10"), "{trouble}");
        });
        watched(|watch| {
            watch.heard(line("sort", Some("a1"), None));
            watch.ended(None);
            assert_eq!(watch.trouble.as_deref(), Some("the guest ended with a signal:"));
        });
    }
}
