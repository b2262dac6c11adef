//! What tests wire devices to: an interrupt sink that remembers.

use std::sync::{Arc, Mutex, MutexGuard};

use super::{InterruptSink, IrqLine};

#[derive(Default)]
struct Notes {
    messages: Vec<(u64, u32)>,
    lines: Vec<(u32, bool)>,
    /// How many of `lines` have been taken.
    taken: usize,
}

/// Notes what arrives at the interrupt chips.
#[derive(Default)]
pub(crate) struct Recorder(Mutex<Notes>);

impl InterruptSink for Recorder {
    fn set_line(&self, gsi: u32, level: bool) {
        self.notes().lines.push((gsi, level));
    }
    fn message(&self, address: u64, data: u32) {
        self.notes().messages.push((address, data));
    }
}

impl Recorder {
    fn notes(&self) -> MutexGuard<'_, Notes> {
        self.0.lock().unwrap()
    }

    /// It as devices take it.
    pub(crate) fn sink(self: &Arc<Self>) -> Arc<dyn InterruptSink> {
        Arc::clone(self) as _
    }

    /// One of its lines.
    pub(crate) fn line(self: &Arc<Self>, gsi: u32) -> IrqLine {
        IrqLine::new(self.sink(), gsi)
    }

    /// Takes the messages seen so far.
    pub(crate) fn messages(&self) -> Vec<(u64, u32)> {
        std::mem::take(&mut self.notes().messages)
    }

    /// Takes the line changes seen so far.
    pub(crate) fn lines(&self) -> Vec<(u32, bool)> {
        let mut notes = self.notes();
        let all = notes.lines.len();
        let from = std::mem::replace(&mut notes.taken, all);
        notes.lines[from..].to_vec()
    }

    /// The level of a line.
    pub(crate) fn level(&self, gsi: u32) -> bool {
        self.notes().lines.iter().rev().find(|change| change.0 == gsi).is_some_and(|change| change.1)
    }

    /// How often a line has risen.
    pub(crate) fn rises(&self, gsi: u32) -> usize {
        let notes = self.notes();
        let mut before = false;
        let levels = notes.lines.iter().filter(|change| change.0 == gsi).map(|change| change.1);
        levels.filter(|&level| !std::mem::replace(&mut before, level) && level).count()
    }
}
