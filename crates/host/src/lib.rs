//! What the host can do for a VM, each a small trait with the Linux implementation and a deterministic fake.
//!
//! Nothing else in the house reads a clock, arms a timer or draws a random number: a test that wants to decide what
//! time it is passes a [`fake::FakeClock`].

mod clock;
mod coarse;
mod entropy;
pub mod fake;
mod low;
mod process;
mod run_delay;
mod sample;
mod signals;
mod timer;

pub use clock::{Clock, HostClock, read_tsc};
pub use coarse::{CoarseClock, CoarseTimers, TscGrid};
pub use entropy::{Entropy, HostEntropy};
pub use low::LowWord;
pub use process::resident_bytes;
pub use run_delay::{RunDelay, ThreadRunDelay};
pub use sample::{SAMPLE_KINDS, SAMPLE_SIGNAL, Samples, ThreadTime};
pub use signals::leave_signals_to_other_threads;
pub use timer::{HostTimers, Timer, TimerCallback, Timers};
