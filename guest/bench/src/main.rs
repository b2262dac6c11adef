//! Workloads that time themselves: one static binary that runs on the host and in a guest, so that the two compare.
//!
//! ```text
//!   bench [NAME...] ──> for each workload: itself again, as `--alone NAME`, with a time limit
//!                             └─> set up ─> calibrate ─> rounds ─> one JSON line (Record)
//!   bench --command NAME -- COMMAND... ──> the same with a command for a workload
//!   bench --clocks ... ──> what the clocks of a guest do
//! ```
//!
//! A process of its own for each workload: what one leaves in the heap or the page tables does not change the next,
//! and one that crashes is a line that says so. Everything runs on one processor, the one it happened to start on: a
//! guest with one vCPU and a host with many then do the same.
//!
//! Neighbours: `cargo xtask bench cpu` builds and runs it in all places and compares the lines. It knows nothing of
//! `init` or of where it runs.

mod clocks;
mod command;
mod floats;
mod kernel;
mod measure;
mod memory;
mod sys;
mod text;
mod user;

use std::io::{self, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{ChildStdout, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use measure::{Kind, Plan, Record, Workload};

const USAGE: &str = "\
Usage: bench [--rounds N] [--seconds S] [--limit S] [--list] [NAME...]
       bench --clocks steps N | kept ROUNDS
       bench --command NAME [--output same|varies] [--rounds N] [--seconds S] [--limit S] -- COMMAND...

Runs the named workloads, or all, and prints one JSON object a line for each; or measures a command; or looks at clocks.

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
        Some(clocks::CLOCKS) => clocks::look(&words[1..]),
        Some(ALONE) => parse(&words[1..]).and_then(|asked| alone(&asked)),
        Some("--list") => list(),
        _ => parse(&words).and_then(|asked| all(&asked, &words)),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("bench: {message}");
            ExitCode::FAILURE
        }
    }
}

/// What the command line says.
#[derive(Debug, Default)]
struct Asked {
    plan: Plan,
    chosen: Vec<Workload>,
    /// Instead of workloads: a name, and program and arguments.
    command: Option<(String, Vec<String>)>,
    /// The command's output is not always the same.
    varies: bool,
}

fn parse(words: &[String]) -> Result<Asked, String> {
    let (mut asked, all) = (Asked::default(), workloads());
    let mut words = words.iter();
    while let Some(word) = words.next() {
        if word == "--" {
            let argv: Vec<String> = words.by_ref().cloned().collect();
            let command = asked.command.as_mut().filter(|_| !argv.is_empty());
            command.ok_or_else(|| format!("a command needs a name, and words behind --\n{USAGE}"))?.1 = argv;
            break;
        }
        if !word.starts_with("--") {
            let known = all.iter().find(|workload| workload.name == word);
            asked
                .chosen
                .push(*known.ok_or_else(|| format!("no workload is called {word}; `bench --list` names them"))?);
            continue;
        }
        let value = words.next().ok_or_else(|| format!("{word} needs a value\n{USAGE}"))?;
        let number = || match value.parse() {
            Ok(number) if (0.001..1e6).contains(&number) => Ok(number),
            _ => Err(format!("{word} {value}: not a number from 0.001 to 1000000")),
        };
        match word.as_str() {
            "--rounds" => asked.plan.rounds = (number()? as usize).max(1),
            "--seconds" => asked.plan.round = Duration::from_secs_f64(number()?),
            "--limit" => asked.plan.limit = Duration::from_secs_f64(number()?),
            "--command" => asked.command = Some((value.clone(), Vec::new())),
            "--output" => asked.varies = value == "varies",
            _ => return Err(format!("unknown option {word}\n{USAGE}")),
        }
    }
    if asked.command.as_ref().is_some_and(|(_, argv)| argv.is_empty()) {
        return Err(format!("--command needs the command behind --\n{USAGE}"));
    }
    if asked.chosen.is_empty() {
        asked.chosen = all;
    }
    Ok(asked)
}

fn list() -> Result<(), String> {
    let names: Vec<_> =
        workloads().iter().map(|workload| format!("{:12} {}\n", workload.name, workload.what)).collect();
    io::stdout().write_all(names.concat().as_bytes()).map_err(|error| error.to_string())
}

/// Runs each in a process of its own.
fn all(asked: &Asked, words: &[String]) -> Result<(), String> {
    sys::pin_to_this_cpu().map_err(|error| format!("cannot stay on one processor: {error}"))?;
    if let Some((name, _)) = &asked.command {
        return one(&asked.plan, name, Kind::Program, words);
    }
    for workload in &asked.chosen {
        let words = [asked.plan.words().as_slice(), &[workload.name.to_owned()]].concat();
        one(&asked.plan, workload.name, workload.kind, &words)?;
    }
    Ok(())
}

/// Prints the line that a process of its own makes of these words.
fn one(plan: &Plan, name: &str, kind: Kind, words: &[String]) -> Result<(), String> {
    let line = in_own_process(plan, words).unwrap_or_else(|why| Record::failed(name, kind, &why).line());
    print(&line)
}

fn print(line: &str) -> Result<(), String> {
    let mut output = io::stdout().lock();
    output.write_all(line.as_bytes()).and_then(|()| output.flush()).map_err(|error| format!("output: {error}"))
}

/// The line that a process of its own printed, or why there is none.
fn in_own_process(plan: &Plan, words: &[String]) -> Result<String, String> {
    let mut command = Command::new("/proc/self/exe");
    command.arg(ALONE).args(words).process_group(0).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn().map_err(|error| format!("cannot start a process: {error}"))?;
    let line = child.stdout.take().map(|output| everything(output, plan.limit));
    if !matches!(line, Some(Ok(_))) {
        // With all that it has started, or that would be measured with the next one.
        sys::kill_group(child.id());
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
fn alone(asked: &Asked) -> Result<(), String> {
    sys::end_with_parent();
    let record = match (&asked.command, asked.chosen.as_slice()) {
        (Some((name, argv)), _) => command::measure(name, argv, asked.varies, &asked.plan)
            .unwrap_or_else(|error| Record::failed(name, Kind::Program, &error.to_string())),
        (None, [workload]) => measure::measure(workload, &asked.plan)
            .unwrap_or_else(|error| Record::failed(workload.name, workload.kind, &error.to_string())),
        _ => return Err(format!("{ALONE} takes one workload")),
    };
    print(&record.line())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_workload_does_the_same_each_time() {
        // Here, this program is the test: executing it is something else.
        for workload in workloads().into_iter().filter(|workload| workload.name != "forkexec") {
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
        assert_eq!(parse(&words("--rounds 2 sort hash")).unwrap().chosen.len(), 2);
        assert_eq!(parse(&words("--command x -- a --b")).unwrap().command.unwrap().1, ["a", "--b"]);
        assert!(parse(&words("--command x")).unwrap_err().contains("behind --"));
        assert!(parse(&words("sorrt")).unwrap_err().contains("sorrt"));
        assert!(parse(&words("--seconds -1")).unwrap_err().contains("-1"));
    }
}
