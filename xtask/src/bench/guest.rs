//! A program of the host's, or a guest in one monitor or the other, from its start to its end.
//!
//! ```text
//!   Place::Native   the program itself                      its standard output
//!   Place::Cordial  cordial run --events ... -- COMMAND     events on standard error, the command's standard output
//!   Place::Qemu     qemu-system-x86_64 with ports of the    the words of `protocol`, which the first process speaks
//!                   same names, kernel, initramfs, command
//!                   line and memory
//!          \______________________ each a stream of (when, Happening) ______________________/
//!                                            |
//!                                           Run
//! ```
//!
//! When something happened is when it arrived here, for all alike: what a monitor or a guest's clock says about itself
//! is not taken for granted.

use std::fmt;
use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde::Serialize;
use serde_json::Value;

use super::{memory, qemu};

/// After this a run is ended and counts as failed.
const PATIENCE: Duration = Duration::from_secs(1800);
/// How long a machine may take to switch itself off once its command has ended.
pub(super) const GRACE: Duration = Duration::from_secs(60);

/// Where something runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Place {
    Native,
    Cordial,
    Qemu,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Native => "native",
            Self::Cordial => "Cordial",
            Self::Qemu => "QEMU",
        })
    }
}

/// What all guests are made of.
pub(super) struct Machine {
    /// The `cordial` program.
    pub(super) cordial: PathBuf,
    pub(super) kernel: PathBuf,
    pub(super) initramfs: PathBuf,
    /// The kernel's command line, as `cordial` plans it.
    pub(super) command_line: String,
    /// MiB.
    pub(super) memory: u64,
    /// An image that guests read.
    pub(super) disk: Option<PathBuf>,
    /// What `cordial run` needs to make the same of it.
    pub(super) words: Vec<String>,
}

/// Something that happened in a run.
#[derive(Debug)]
pub(super) enum Happening {
    /// The first byte on the guest's console.
    FirstOutput,
    /// The guest's first process has spoken; its kernel's release.
    Ready(String),
    /// A line on the command's standard output.
    Line(String),
    /// A line on its standard error, or the monitor's.
    Complaint(String),
    /// Something else that the monitor tells of itself.
    Event(Value),
    /// The command has ended with this status.
    Exit(i32),
    /// A stream has come to its end.
    Closed,
}

/// How a run went. Times are milliseconds from the start of the process.
#[derive(Debug, Default, Serialize)]
pub(super) struct Run {
    pub(super) first_output_ms: Option<f64>,
    pub(super) ready_ms: Option<f64>,
    pub(super) end_ms: f64,
    pub(super) lines: Vec<(f64, String)>,
    pub(super) complaints: Vec<String>,
    /// What the monitor told of itself.
    pub(super) events: Vec<Value>,
    /// The command's.
    pub(super) status: Option<i32>,
    /// The guest's, or the host's.
    pub(super) kernel: Option<String>,
    /// The monitor's memory when the command had ended.
    pub(super) memory: Option<memory::Figures>,
    /// Why there is nothing more, if so.
    pub(super) failure: Option<String>,
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// A process that ends with its guard.
pub(super) struct Running(pub(super) Child);

impl Drop for Running {
    fn drop(&mut self) {
        // One that has ended needs neither.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What happens, and when.
pub(super) type Happenings = Receiver<(Instant, Happening)>;

/// Timed happenings, from any thread.
#[derive(Clone)]
pub(super) struct Teller(Sender<(Instant, Happening)>);

impl Teller {
    pub(super) fn tell(&self, happening: Happening) {
        // Nobody listens any more once a run is given up.
        let _ = self.0.send((Instant::now(), happening));
    }

    /// Tells each line of a stream, and its end.
    pub(super) fn tell_lines(&self, stream: impl Read + Send + 'static, wrap: fn(String) -> Happening) {
        let teller = self.clone();
        thread::spawn(move || {
            for line in BufReader::new(stream).lines().map_while(Result::ok) {
                teller.tell(wrap(line));
            }
            teller.tell(Happening::Closed);
        });
    }
}

/// Runs a command in a place to its end. A run that fails is a `Run` that says so.
///
/// # Errors
/// What the place needs cannot be started at all.
pub(super) fn run(place: Place, machine: &Machine, argv: &[String]) -> Result<Run> {
    let (to, happenings) = channel();
    let teller = Teller(to);
    let started = Instant::now();
    match place {
        Place::Native => {
            let mut command = Command::new(&argv[0]);
            let running = spawn(command.args(&argv[1..]), &teller, Happening::Complaint)?;
            follow(running, None, started, &happenings, 2, || ())
        }
        Place::Cordial => {
            let running = boot(machine, &[], argv, &teller)?;
            follow(running, Some(machine.memory), started, &happenings, 2, || ())
        }
        Place::Qemu => {
            let (running, mut session) = qemu::boot(machine, argv, &teller)?;
            follow(running, Some(machine.memory), started, &happenings, qemu::STREAMS, move || session.end())
        }
    }
}

/// Starts a command in a guest of Cordial's, with `more` words for the monitor; what happens there can be followed.
///
/// # Errors
/// The monitor cannot be started.
pub(super) fn start(machine: &Machine, more: &[&str], argv: &[String]) -> Result<(Running, Happenings)> {
    let (to, happenings) = channel();
    Ok((boot(machine, more, argv, &Teller(to))?, happenings))
}

fn boot(machine: &Machine, more: &[&str], argv: &[String], teller: &Teller) -> Result<Running> {
    let mut command = Command::new(&machine.cordial);
    command.args(["run", "--events", "/dev/stderr"]).args(more).args(&machine.words).arg("--").args(argv);
    spawn(&mut command, teller, event)
}

fn spawn(command: &mut Command, teller: &Teller, complaint: fn(String) -> Happening) -> Result<Running> {
    // No configuration of whoever measures has a say.
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("CORDIAL_")) {
        command.env_remove(name);
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).env("XDG_CONFIG_HOME", "/nonexistent");
    let mut child = command.spawn().with_context(|| format!("cannot start {}", command.get_program().display()))?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let running = Running(child);
    stdout.into_iter().for_each(|stream| teller.tell_lines(stream, Happening::Line));
    stderr.into_iter().for_each(|stream| teller.tell_lines(stream, complaint));
    Ok(running)
}

/// What a line of `cordial`'s events means.
fn event(line: String) -> Happening {
    let Ok(event) = serde_json::from_str::<Value>(&line) else { return Happening::Complaint(line) };
    let details = &event["details"];
    match event["event"].as_str() {
        Some("ready") => Happening::Ready(details.as_str().unwrap_or_default().into()),
        Some("exit") => Happening::Exit(details.as_i64().unwrap_or(-1) as i32),
        Some("machine") if details["event"] == "first-output" => Happening::FirstOutput,
        _ => Happening::Event(event),
    }
}

/// Collects what happens until all streams are closed and the process has ended. `release` lets the machine go once
/// the command has ended.
fn follow(
    mut running: Running,
    guest: Option<u64>,
    started: Instant,
    happenings: &Happenings,
    streams: usize,
    mut release: impl FnMut(),
) -> Result<Run> {
    let (mut run, mut open, mut deadline) = (Run::default(), streams, started + PATIENCE);
    while open > 0 {
        let (when, happening) = match happenings.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(next) => next,
            Err(RecvTimeoutError::Timeout) => {
                run.failure = Some(format!("not done after {} s", started.elapsed().as_secs()));
                return Ok(run);
            }
            Err(RecvTimeoutError::Disconnected) => break,
        };
        let when = milliseconds(when - started);
        match happening {
            Happening::FirstOutput => run.first_output_ms = Some(when),
            Happening::Ready(kernel) => (run.ready_ms, run.kernel) = (Some(when), Some(kernel)),
            Happening::Line(line) => run.lines.push((when, line)),
            Happening::Complaint(line) => run.complaints.push(line),
            Happening::Event(event) => run.events.push(event),
            Happening::Exit(status) => {
                run.status = Some(status);
                run.memory = guest.and_then(|mib| memory::of_process(running.0.id(), mib << 20));
                release();
                deadline = Instant::now() + GRACE;
            }
            Happening::Closed => open -= 1,
        }
    }
    let status = running.0.wait().context("lost a process")?;
    run.end_ms = milliseconds(started.elapsed());
    // A native program's status is that of its process.
    let status = run.status.or_else(|| guest.is_none().then(|| status.code()).flatten());
    run.status = status;
    if status != Some(0) {
        let last = run.complaints.iter().rev().take(3).rev().cloned().collect::<Vec<_>>().join(" | ");
        run.failure = Some(format!("status {}: {last}", status.map_or("unknown".into(), |status| status.to_string())));
    }
    Ok(run)
}
