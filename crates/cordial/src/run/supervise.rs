//! While the machine runs: everything that happens arrives on one channel, and is decided on in one place.

use super::connect::{Captured, Connected};
use super::exits::Table;
use super::prepare::Prepared;
use super::profile::Profile;
use super::progress::Progress;
use super::reachable;
use super::signals::Signals;
use super::verdict::{Evidence, Stop, Verdict};
use crate::console::ConsoleLog;
use crate::control::{Facts, Place, Server};
use crate::failure::Failure;
use crate::session::{Notice, Session};
use crate::terminal::{self, RawMode};
use machine::{Event, Handle, Machine, Report};
use signal_hook::consts::SIGWINCH;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

/// How long a command may take to end after it was signalled, and a guest to switch off after its command.
const GRACE: Duration = Duration::from_secs(10);
/// How long a machine may take to stop when told to.
const STOPPING: Duration = Duration::from_secs(10);

/// Everything that can happen.
enum Happening {
    Machine(Event),
    Guest(Notice),
    Signal(i32),
    Escape,
    Ended(Box<Result<Report, machine::Error>>),
}

/// How it went.
pub(super) struct Ended {
    pub(super) verdict: Verdict,
    pub(super) report: Option<Report>,
    pub(super) console: ConsoleLog,
    pub(super) captured: Option<[Captured; 2]>,
    pub(super) guest_kernel: Option<String>,
}

impl Ended {
    /// The exit table.
    pub(super) fn exits(&self) -> Table {
        self.report.as_ref().map(|report| Table::of(&report.ledgers, report.tsc_khz)).unwrap_or_default()
    }

    /// Where the time went, of a run that was profiled.
    pub(super) fn profile(&self) -> Option<Profile> {
        self.report.as_ref().map(|report| Profile::of(report.engine, &report.ledgers))
    }
}

/// Assembles the machine, runs it, and sees to it that it ends.
///
/// Other processes reach it at the place that `signals` has kept.
pub(super) fn supervise(
    prepared: &Prepared,
    connected: Connected,
    signals: Signals,
    progress: &mut Progress,
) -> Result<Ended, Failure> {
    let Connected { attachments, events, session, console, captured, escape, raw_from_start } = connected;
    let machine = Machine::assemble(&prepared.plan, attachments).map_err(|error| Failure::other(error.to_string()))?;
    let (happens, happenings) = channel();
    let handle = machine.handle();
    let (place, told) = signals.tell();
    forward(told, happens.clone(), Happening::Signal);
    let serve = |place| reachable(prepared.options.name.as_deref(), serve(place, prepared, &handle));
    let _server = place.map(serve).transpose()?.flatten();
    let session = session.map(|(session, notices)| {
        forward(notices, happens.clone(), Happening::Guest);
        session
    });
    forward(events, happens.clone(), Happening::Machine);
    forward(escape, happens.clone(), |()| Happening::Escape);
    thread::spawn(move || {
        // Nobody listens only where the user could not wait for the end.
        drop(happens.send(Happening::Ended(Box::new(machine.run()))));
    });

    let mut supervision = Supervision {
        prepared,
        progress,
        handle,
        session,
        raw: if raw_from_start { RawMode::enter() } else { None },
        evidence: Evidence { command: prepared.command.is_some(), ..Evidence::default() },
        deadline: prepared.options.timeout.map(|timeout| (Instant::now() + timeout, Stop::Timeout)),
        guest_kernel: None,
    };
    let end = supervision.watch(&happenings);
    drop(signals);
    drop(supervision.raw.take());
    let Supervision { mut evidence, guest_kernel, .. } = supervision;
    evidence.panic = console.panic();
    // An interactive shell that is not heard of again has simply gone with its machine.
    evidence.command &= prepared.command.as_ref().is_some_and(|command| !command.terminal);
    let (verdict, report) = match end {
        Some(Ok(report)) => (Verdict::of(report.outcome, &evidence), Some(report)),
        Some(Err(error)) => (Verdict::Failed(error.to_string()), None),
        None => (Verdict::of(machine::Outcome::Stopped, &evidence), None),
    };
    Ok(Ended { verdict, report, console, captured, guest_kernel })
}

/// Answers other processes about the machine.
fn serve(place: Place, prepared: &Prepared, handle: &Handle) -> Result<Server, Failure> {
    let facts = Facts {
        name: place.name().to_owned(),
        pid: std::process::id(),
        engine: handle.engine().into(),
        cpus: prepared.plan.cpus,
        memory: prepared.plan.memory,
        kernel: prepared.kernel.image.display().to_string(),
        uptime_ms: 0,
    };
    Server::start(place, facts, handle.clone())
}

/// Passes one channel on into another.
fn forward<T: Send + 'static>(
    from: Receiver<T>,
    to: Sender<Happening>,
    wrap: impl Fn(T) -> Happening + Send + 'static,
) {
    thread::spawn(move || from.into_iter().map(wrap).try_for_each(|happening| to.send(happening)));
}

struct Supervision<'a> {
    prepared: &'a Prepared,
    progress: &'a mut Progress,
    handle: Handle,
    session: Option<Session>,
    raw: Option<RawMode>,
    evidence: Evidence,
    /// When to stop the machine, and why.
    deadline: Option<(Instant, Stop)>,
    guest_kernel: Option<String>,
}

impl Supervision<'_> {
    /// Until the machine has ended; `None` where it would not.
    fn watch(&mut self, happenings: &Receiver<Happening>) -> Option<Result<Report, machine::Error>> {
        loop {
            let wait = self.deadline.as_ref().map(|(when, _)| when.saturating_duration_since(Instant::now()));
            let happening = match wait {
                Some(wait) => happenings.recv_timeout(wait),
                None => happenings.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            match happening {
                Ok(Happening::Ended(end)) => return Some(*end),
                Ok(Happening::Machine(event)) => self.machine_says(&event),
                Ok(Happening::Guest(notice)) => self.guest_says(notice),
                Ok(Happening::Signal(SIGWINCH)) => {
                    if let (Some(session), Some(window)) = (&self.session, terminal::window()) {
                        session.resize(window);
                    }
                }
                Ok(Happening::Signal(number)) => self.signalled(number),
                Ok(Happening::Escape) => self.stop(Stop::Signal(0)),
                Err(RecvTimeoutError::Timeout) => match self.deadline.take() {
                    Some((_, stop)) if self.evidence.stopped.is_none() => self.stop(stop),
                    _ => return None,
                },
                Err(RecvTimeoutError::Disconnected) => return None,
            }
        }
    }

    fn stop(&mut self, why: Stop) {
        self.evidence.stopped.get_or_insert(why.clone());
        self.handle.stop();
        self.deadline = Some((Instant::now() + STOPPING, why));
    }

    fn machine_says(&mut self, event: &Event) {
        let text = match event {
            Event::KernelLoaded { protocol, bytes, .. } => {
                let protocol = serde_json::to_value(protocol).ok();
                let protocol = protocol.as_ref().and_then(|name| name.as_str()).unwrap_or_default();
                Some(format!("kernel loaded ({protocol}, {})", crate::values::human(*bytes)))
            }
            Event::FirstOutput => Some("first output".into()),
            Event::DeviceReady { name } => Some(format!("{name} ready")),
            Event::Started | Event::Ended => None,
        };
        self.progress.event("machine", event);
        // On a serial console the guest speaks for itself.
        let silent = self.prepared.command.is_none() || self.raw.is_some();
        if let Some(text) = text.filter(|_| !silent) {
            self.progress.phase(&text);
        }
    }

    fn guest_says(&mut self, notice: Notice) {
        match notice {
            Notice::Ready { kernel } => {
                self.progress.event("ready", &kernel);
                self.progress.phase(&format!("user space ready (Linux {kernel})"));
                self.progress.clear();
                self.guest_kernel = Some(kernel);
                let terminal = self.prepared.command.as_ref().is_some_and(|command| command.terminal);
                if terminal && self.raw.is_none() {
                    self.raw = RawMode::enter();
                }
            }
            Notice::Exit { status, error } => {
                self.progress.event("exit", &status);
                self.evidence.exit.get_or_insert((status, error));
                // All is known; the guest only has to switch off.
                self.deadline = Some((Instant::now() + GRACE, Stop::Timeout));
            }
            Notice::Nonsense(what) => self.stop(Stop::Nonsense(what)),
        }
    }

    /// The first signal goes to the guest's command; the second, or one that nobody in there can take, ends the machine.
    fn signalled(&mut self, number: i32) {
        let stop = Stop::Signal(number);
        let again = self.deadline.as_ref().is_some_and(|(_, why)| matches!(why, Stop::Signal(_)));
        match &self.session {
            Some(session) if self.guest_kernel.is_some() && self.evidence.exit.is_none() && !again => {
                session.signal(number);
                self.deadline = Some((Instant::now() + GRACE, stop));
            }
            _ => self.stop(stop),
        }
    }
}
