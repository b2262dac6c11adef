//! What is told while a machine runs: lines for people, events for programs.
//!
//! Every line stands for something that happened, never for time passed. On a terminal a phase replaces the one before;
//! elsewhere each is a line.

use super::verdict::Verdict;
use crate::failure::Failure;
use serde::Serialize;
use serde_json::json;
use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Tells it.
pub(super) struct Progress {
    quiet: bool,
    terminal: bool,
    transient: bool,
    events: Option<(PathBuf, File)>,
    started: Instant,
}

impl Progress {
    pub(super) fn new(quiet: bool, events: Option<&Path>) -> Result<Self, Failure> {
        let open = |path: &Path| {
            let failed = |error| Failure::io(format!("write events to {}", path.display()), &error);
            File::create(path).map(|file| (path.to_owned(), file)).map_err(failed)
        };
        Ok(Self {
            quiet,
            terminal: std::io::stderr().is_terminal(),
            transient: false,
            events: events.map(open).transpose()?,
            started: Instant::now(),
        })
    }

    /// Milliseconds since the start.
    fn elapsed(&self) -> u128 {
        self.started.elapsed().as_millis()
    }

    /// A line that stays.
    pub(super) fn line(&mut self, text: &str) {
        if !self.quiet {
            self.clear();
            eprintln!("cordial: {text}");
        }
    }

    /// A phase.
    pub(super) fn phase(&mut self, text: &str) {
        if self.quiet {
            return;
        }
        let time = self.elapsed();
        if self.terminal {
            eprint!("\r\x1b[Kcordial: {text} ({time} ms)");
            self.transient = true;
        } else {
            eprintln!("cordial: {text} ({time} ms)");
        }
    }

    /// Takes the last phase off the terminal: the guest is next.
    pub(super) fn clear(&mut self) {
        if std::mem::take(&mut self.transient) {
            eprint!("\r\x1b[K");
        }
    }

    /// An event for programs. A full disk costs the events, not the machine.
    pub(super) fn event(&mut self, name: &str, details: &impl Serialize) {
        let time = self.elapsed();
        let line = json!({ "schema": "cordial.event/1", "ms": time, "event": name, "details": details });
        self.write(&line);
    }

    /// The last event: how it ended.
    pub(super) fn end(&mut self, verdict: &Verdict, engine: &str) {
        self.clear();
        let time = self.elapsed();
        let line = json!({
            "schema": "cordial.event/1", "ms": time, "event": "end", "outcome": verdict.outcome(),
            "guest_status": verdict.guest_status(), "status": verdict.status(), "engine": engine,
            "message": verdict.complaint(),
        });
        self.write(&line);
    }

    fn write(&mut self, line: &serde_json::Value) {
        if let Some((path, file)) = &mut self.events
            && let Err(error) = writeln!(file, "{line}")
        {
            tracing::warn!("events are lost from here on: {}: {error}", path.display());
            self.events = None;
        }
    }
}
