//! `cordial run`: take the name, prepare, connect, supervise, report.
//!
//! ```text
//!   prepare ──> Prepared ──> connect ──> machine's attachments, session
//!                                              │
//!        events, notices, signals, the end ────┴──> supervise ──> Verdict ──> status, console tail, table, JSON
//! ```

mod connect;
pub mod exits;
pub mod prepare;
pub mod profile;
mod progress;
mod report;
mod signals;
mod supervise;
pub mod verdict;

use crate::cli::RunArguments;
use crate::control::Place;
use crate::failure::Failure;
use crate::settings::Settings;
use crate::terminal;
use machine::EngineWish;
use prepare::{Options, Prepared, prepare};
use progress::Progress;
use report::Document;
use signals::Signals;
use std::io::{IsTerminal, Write};

/// Lines of the guest's console in a failure's explanation.
const TAIL: usize = 20;

/// Runs; returns the process status.
///
/// # Errors
/// What kept a machine from running.
pub fn run(arguments: &RunArguments) -> Result<u8, Failure> {
    let settings = Settings::load(arguments.layer())?;
    if arguments.print_config {
        print(settings.print().as_bytes())?;
        return Ok(0);
    }
    let options = Options::read(&settings)?;
    let signals = Signals::watch()?;
    if !arguments.dry_run {
        // Before any work for a machine that could not have its name.
        signals.keep(|| place(options.name.as_deref()))?;
    }
    let wish = EngineWish {
        choice: options.engine,
        check: options.engine_check,
        time: options.time_policy,
        virt: options.virt,
    };
    let engine = machine::select_engine(wish).map_err(|error| match error {
        machine::Error::Plan(invalid) => Failure::usage(invalid.to_string()),
        error => Failure::other(format!("{error}; `cordial doctor` shows each step")),
    })?;
    let quiet = options.quiet || arguments.json.is_some() || arguments.dry_run;
    let mut progress = Progress::new(quiet, options.events.as_deref())?;
    progress.line(&format!("engine: {} ({})", engine.name, engine.reason));
    progress.event("engine", &engine);
    let prepared = prepare(options, arguments, &settings)?;
    if arguments.dry_run {
        let mut plan = serde_json::to_vec_pretty(&prepared.plan).map_err(|error| Failure::other(error.to_string()))?;
        plan.push(b'\n');
        print(&plan)?;
        return Ok(0);
    }
    progress.line(&format!("kernel: {} ({})", prepared.kernel.image.display(), prepared.kernel.reason));
    let capture = arguments.json.as_deref() == Some("-");
    let connected = connect::connect(&prepared, capture)?;
    if connected.raw_from_start || prepared.command.as_ref().is_some_and(|command| command.terminal) {
        progress.line(terminal::WAY_OUT);
    }
    let ended = supervise::supervise(&prepared, connected, signals, &mut progress)?;
    progress.end(&ended.verdict, engine.name);
    explain(&prepared, &ended);
    if prepared.options.exits {
        eprint!("{}", ended.exits().print());
    }
    if prepared.options.profile
        && let Some(profile) = ended.profile()
    {
        eprint!("{}", profile.print());
    }
    if let Some(file) = &arguments.json {
        let document = Document::of(&prepared, &engine, &ended);
        let mut text = serde_json::to_vec(&document).map_err(|error| Failure::other(error.to_string()))?;
        text.push(b'\n');
        if file == "-" {
            print(&text)?;
        } else {
            std::fs::write(file, text).map_err(|error| Failure::io(format!("write {file}"), &error))?;
        }
    }
    Ok(ended.verdict.status())
}

/// Where other processes find the machine.
fn place(name: Option<&str>) -> Result<Option<Place>, Failure> {
    reachable(name, name.map_or_else(|| Place::take(&format!("vm-{}", std::process::id())), Place::take))
}

/// What it takes to be reached by other processes. A machine without a name of the user's choice runs without.
fn reachable<T>(name: Option<&str>, attempt: Result<T, Failure>) -> Result<Option<T>, Failure> {
    match attempt {
        Err(error) if name.is_none() => {
            tracing::warn!("other processes cannot reach this machine: {error}");
            Ok(None)
        }
        attempt => attempt.map(Some),
    }
}

/// Says on standard error what went wrong, if anything did.
fn explain(prepared: &Prepared, ended: &supervise::Ended) {
    if ended.verdict.wants_console() && !prepared.options.verbose {
        let tail = ended.console.tail(TAIL);
        if !tail.is_empty() {
            eprintln!("cordial: the guest's console ended with:");
            tail.iter().for_each(|line| eprintln!("  | {line}"));
        }
    }
    if let Some(finding) = ended.report.as_ref().and_then(|report| report.finding.as_ref()) {
        eprintln!("{}", finding.trim_end());
    }
    if let Some(complaint) = ended.verdict.complaint() {
        eprintln!("cordial: {complaint}");
    }
}

/// Standard output belongs to the guest and to data; this is data.
fn print(bytes: &[u8]) -> Result<(), Failure> {
    let mut output = std::io::stdout().lock();
    output
        .write_all(bytes)
        .and_then(|()| output.flush())
        .map_err(|error| Failure::io("write to standard output", &error))
}

/// True where both directions are a terminal.
fn at_terminal() -> bool {
    std::io::stdin().is_terminal() && std::io::stdout().is_terminal()
}
