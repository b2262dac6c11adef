//! Workloads that time themselves: one static binary that runs on the host and in a guest, so that the two compare.
//!
//! ```text
//!   bench [NAME...] ──> for each workload: itself again, as `--alone NAME`, with a time limit
//!                             └─> set up ─> calibrate ─> rounds ─> one JSON line (Record)
//! ```
//!
//! A process of its own for each workload: what one leaves in the heap or the page tables does not change the next,
//! and one that crashes is a line that says so. Everything runs on one processor, the one it happened to start on: a
//! guest with one vCPU and a host with many then do the same.
//!
//! Neighbours: `cargo xtask bench cpu` builds and runs it in all places and compares the lines. It knows nothing of
//! `init` or of where it runs.

mod floats;
mod kernel;
mod measure;
mod memory;
mod sys;
mod text;
mod user;

use std::io::{self, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{ChildStdout, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use measure::{Plan, Record, Workload};

const USAGE: &str = "\
Usage: bench [--rounds N] [--seconds S] [--limit S] [--list] [NAME...]

Runs the named workloads, or all, and prints one JSON object a line for each.

  --rounds N    measured rounds of each workload; default 3
  --seconds S   length of a round; default 0.1
  --limit S     time after which a workload is given up; default 60
  --list        print the names";

/// First argument of the process that runs one workload.
const ALONE: &str = "--alone";
/// First argument of the process that does nothing: what `forkexec` starts.
pub(crate) const NOTHING: &str = "--nothing";

/// All workloads, in the order they run.
fn workloads() -> Vec<Workload> {
    [user::WORKLOADS, text::WORKLOADS, memory::WORKLOADS, floats::WORKLOADS, kernel::WORKLOADS].concat()
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match words.first().map(String::as_str) {
        Some(NOTHING) => return ExitCode::SUCCESS,
        Some(ALONE) => parse(&words[1..]).and_then(|(plan, names)| alone(&plan, &names)),
        Some("--list") => list(),
        _ => parse(&words).and_then(|(plan, names)| all(&plan, &names)),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("bench: {message}");
            ExitCode::FAILURE
        }
    }
}

fn parse(words: &[String]) -> Result<(Plan, Vec<Workload>), String> {
    let (mut plan, mut chosen, all) = (Plan::default(), Vec::new(), workloads());
    let mut words = words.iter();
    while let Some(word) = words.next() {
        if !word.starts_with("--") {
            let known = all.iter().find(|workload| workload.name == word);
            chosen.push(*known.ok_or_else(|| format!("no workload is called {word}; `bench --list` names them"))?);
            continue;
        }
        let value = words.next().ok_or_else(|| format!("{word} needs a value\n{USAGE}"))?;
        let number: f64 = value.parse().map_err(|_| format!("{word} {value}: not a number"))?;
        if !(0.001..1e6).contains(&number) {
            return Err(format!("{word} {value}: give a number from 0.001 to 1000000"));
        }
        match word.as_str() {
            "--rounds" => plan.rounds = (number as usize).max(1),
            "--seconds" => plan.round = Duration::from_secs_f64(number),
            "--limit" => plan.limit = Duration::from_secs_f64(number),
            _ => return Err(format!("unknown option {word}\n{USAGE}")),
        }
    }
    Ok((plan, if chosen.is_empty() { all } else { chosen }))
}

fn list() -> Result<(), String> {
    let names: Vec<_> =
        workloads().iter().map(|workload| format!("{:12} {}\n", workload.name, workload.what)).collect();
    io::stdout().write_all(names.concat().as_bytes()).map_err(|error| error.to_string())
}

/// Runs each in a process of its own.
fn all(plan: &Plan, chosen: &[Workload]) -> Result<(), String> {
    sys::pin_to_this_cpu().map_err(|error| format!("cannot stay on one processor: {error}"))?;
    for workload in chosen {
        let line = in_own_process(plan, workload).unwrap_or_else(|why| Record::failed(workload, &why).line());
        let mut output = io::stdout().lock();
        output.write_all(line.as_bytes()).and_then(|()| output.flush()).map_err(|error| format!("output: {error}"))?;
    }
    Ok(())
}

/// The line that a process of its own printed for the workload, or why there is none.
fn in_own_process(plan: &Plan, workload: &Workload) -> Result<String, String> {
    let mut command = Command::new("/proc/self/exe");
    command.args([ALONE, workload.name]).args(plan.words()).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn().map_err(|error| format!("cannot start a process: {error}"))?;
    let line = child.stdout.take().map(|output| everything(output, plan.limit));
    if !matches!(line, Some(Ok(_))) {
        // One that has just ended needs no signal.
        let _ = child.kill();
    }
    let status = child.wait().map_err(|error| format!("lost its process: {error}"))?;
    let line = line.unwrap_or_else(|| Err("it has no output".into()))?;
    match (status.code(), status.signal()) {
        (Some(0), _) if line.ends_with('\n') => Ok(line),
        (_, Some(signal)) => Err(format!("ended by signal {signal}")),
        (code, None) => Err(format!("ended with status {} and without a result", code.unwrap_or(-1))),
    }
}

/// What a process prints until it ends. Waits without waking up: a timer would be measured with the workload.
fn everything(mut output: ChildStdout, limit: Duration) -> Result<String, String> {
    let (started, mut bytes, mut buffer) = (Instant::now(), Vec::new(), [0; 4096]);
    loop {
        let left = limit.saturating_sub(started.elapsed());
        if !sys::readable_within(&output, left).map_err(|error| error.to_string())? {
            return Err(format!("not done after {} s", limit.as_secs_f32()));
        }
        match output.read(&mut buffer).map_err(|error| error.to_string())? {
            0 => return String::from_utf8(bytes).map_err(|_| "its output is not text".into()),
            length => bytes.extend_from_slice(&buffer[..length]),
        }
    }
}

/// Runs one workload in this process and prints its line.
fn alone(plan: &Plan, chosen: &[Workload]) -> Result<(), String> {
    let [workload] = chosen else { return Err(format!("{ALONE} takes one workload")) };
    let record = measure::measure(workload, plan).unwrap_or_else(|error| Record::failed(workload, &error.to_string()));
    let mut output = io::stdout().lock();
    output.write_all(record.line().as_bytes()).and_then(|()| output.flush()).map_err(|error| format!("output: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_workload_does_the_same_each_time() {
        for workload in workloads() {
            let mut unit = match (workload.start)() {
                Ok(unit) => unit,
                Err(error) => {
                    // A processor without the instructions.
                    assert_eq!(error.kind(), io::ErrorKind::Unsupported, "{}: {error}", workload.name);
                    continue;
                }
            };
            let first = unit().unwrap();
            assert_eq!(unit().unwrap(), first, "{}", workload.name);
        }
    }

    #[test]
    fn names_are_unique_and_unknown_ones_refused() {
        let mut names: Vec<_> = workloads().iter().map(|workload| workload.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), workloads().len());
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(parse(&words("--rounds 2 sort hash")).unwrap().1.len(), 2);
        assert!(parse(&words("sorrt")).unwrap_err().contains("sorrt"));
        assert!(parse(&words("--seconds -1")).unwrap_err().contains("-1"));
    }
}
