//! Signals to this process.
//!
//! ```text
//!   watch ─> keep: the machine's place ─> tell: the machine is there
//!     └─────── end this process ───────┘    └─ one of the things that happen
//! ```
//!
//! Until there is a machine to be told of them they end this process, as if nobody had listened; but its place goes with it.
//! SIGINT and SIGHUP stay ignored where this process was started so: by nohup(1), or by a shell, in the background.

use crate::control::Place;
use crate::failure::Failure;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGWINCH};
use signal_hook::iterator::{self, Handle};
use signal_hook::low_level::emulate_default_handler;
use std::fs;
use std::mem::replace;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

/// What comes of a signal.
enum Way {
    /// It ends the process, and this is taken away before.
    End(Option<Place>),
    Tell(Sender<i32>),
}

/// Listens for signals until it is dropped.
pub(super) struct Signals {
    handle: Handle,
    way: Arc<Mutex<Way>>,
}

impl Signals {
    /// Listens from now on.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn watch() -> Result<Self, Failure> {
        let ignored = fs::read_to_string("/proc/self/status").map_or(0, |status| ignored(&status));
        let hears = |signal: &i32| ignored >> (signal - 1) & 1 == 0;
        let heard = [SIGINT, SIGHUP].into_iter().filter(hears).chain([SIGTERM, SIGWINCH]);
        let mut signals = iterator::Signals::new(heard).map_err(|error| Failure::io("watch for signals", &error))?;
        let (handle, way) = (signals.handle(), Arc::new(Mutex::new(Way::End(None))));
        let to = Arc::clone(&way);
        thread::spawn(move || signals.forever().for_each(|signal| arrived(signal, &mut lock(&to))));
        Ok(Self { handle, way })
    }

    /// Keeps a place that goes with the process. A signal that comes while it is taken waits for that.
    ///
    /// # Errors
    /// Those of `take`.
    pub(super) fn keep(&self, take: impl FnOnce() -> Result<Option<Place>, Failure>) -> Result<(), Failure> {
        let mut way = lock(&self.way);
        *way = Way::End(take()?);
        Ok(())
    }

    /// Tells of signals from now on, and gives the place away.
    pub(super) fn tell(&self) -> (Option<Place>, Receiver<i32>) {
        let (to, told) = channel();
        match replace(&mut *lock(&self.way), Way::Tell(to)) {
            Way::End(place) => (place, told),
            Way::Tell(_) => (None, told),
        }
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        *lock(&self.way) = Way::End(None);
        self.handle.close();
    }
}

/// Signals that a process ignores, by its status in /proc: a bit each, from signal 1 on. None where that does not say so.
fn ignored(status: &str) -> u64 {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

fn arrived(signal: i32, way: &mut Way) {
    match way {
        Way::Tell(to) => drop(to.send(signal)),
        Way::End(_) if signal == SIGWINCH => {}
        Way::End(place) => {
            drop(place.take());
            // Fails for signals only that this process does not listen for.
            let _ = emulate_default_handler(signal);
        }
    }
}

fn lock(way: &Mutex<Way>) -> MutexGuard<'_, Way> {
    way.lock().unwrap_or_else(PoisonError::into_inner)
}
