//! One vCPU on its thread: runs guest code and decides on what the engine hands back.
//!
//! ```text
//!              ┌───────── start-up IPI ─────────┐
//!   application processors                      ▼
//!   start ──> Waiting <──── INIT ──────────  Running ──> Halted, in a call that waits (asleep) ──────┐
//!                                            ▲     └──── power event, triple fault, stop ──> end     │
//!                                            └───────────────────────────────────────────────────────┘
//! ```
//!
//! One thread a vCPU, for now. What a scheduler of many vCPUs on few threads needs is kept apart already: everything
//! about a vCPU is in [`Processor`], and [`Processor::turn`] is the only place that runs it.

use std::sync::Arc;
use std::time::Duration;

use engine::state::rflags;
use engine::{Cause, CpuIo, CpuState, Doze, Exit, Ledger, Signal, Signals, Vcpu};
use host::{Clock as _, HostClock, Timer};
use paravirt::native::Asleep;

use crate::Outcome;
use crate::control::Control;
use crate::guest_io::GuestIo;

/// What can wake a processor in HLT, or stop being its sleep.
const WAKES: Signals = Signals::INTERRUPT
    .union(Signals::NMI)
    .union(Signals::INIT)
    .union(Signals::STOP)
    .union(Signals::ENGINE)
    .union(Signals::UNHALT);
/// A sleep in the engine is looked at this often: nobody tells us when a processor is reset there.
const LONGEST_DOZE: Duration = Duration::from_millis(100);
/// The bootstrap processor: it has no start-up IPI to wait for.
const BOOTSTRAP: u32 = 0;

/// Where a processor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// After power-up or INIT: nothing runs before a start-up IPI.
    Waiting,
    Running,
    /// The run is over.
    Ended,
}

/// One vCPU with all that belongs to it.
pub(crate) struct Processor {
    pub(crate) index: u32,
    pub(crate) vcpu: Box<dyn Vcpu>,
    pub(crate) io: GuestIo,
    pub(crate) signal: Arc<Signal>,
    pub(crate) ledger: Arc<Ledger>,
    pub(crate) control: Arc<Control>,
    /// Time is to be accounted for.
    pub(crate) profiled: bool,
    /// The engine has the local APIC: it waits for start-up IPIs and sleeps in HLT by itself.
    pub(crate) waits_in_engine: bool,
    /// Ends its sleep there while a hypercall waits; absent where it sleeps on its signal.
    pub(crate) alarm: Option<Box<dyn Timer>>,
}

impl Processor {
    /// Runs the processor to the end of the run.
    pub(crate) fn run(mut self) {
        let _guard = InRun::enter(&self.control);
        self.hold();
        if !self.profiled {
            return self.run_to_end();
        }
        let ledger = Arc::clone(&self.ledger);
        if let Err(error) = ledger.profile.during(|| self.run_to_end()) {
            tracing::warn!(vcpu = self.index, "there are no samples of what this vCPU did: {error}");
        }
    }

    fn run_to_end(&mut self) {
        let runs = self.index == BOOTSTRAP || self.waits_in_engine;
        let mut stage = if runs { Stage::Running } else { Stage::Waiting };
        while stage != Stage::Ended && !self.control.is_ending() {
            stage = match stage {
                Stage::Waiting => self.wait_for_startup(),
                Stage::Running | Stage::Ended => self.turn(),
            };
        }
    }

    /// Runs guest code once, until there is something to decide, and decides it.
    fn turn(&mut self) -> Stage {
        self.io.paravirt.enter_guest(&self.ledger);
        let exit = self.vcpu.run(&mut self.io);
        self.io.paravirt.leave_guest();
        match exit {
            Exit::Halted => self.halt(),
            Exit::Waiting => self.wait_call(),
            Exit::Yielded => {
                if !self.io.paravirt.native().is_some_and(|native| native.keeps_processor()) {
                    self.io.paravirt.give_way();
                }
            }
            Exit::Init => return self.init(),
            Exit::Stopped => {
                self.stopped();
            }
            Exit::Device => self.control.follow_power(),
            Exit::Difference => {
                let (rip, difference) = (self.vcpu.save().rip, self.vcpu.difference().unwrap_or_default());
                self.control.end_with(Outcome::EngineDifference { vcpu: self.index, rip }, difference);
                return Stage::Ended;
            }
            Exit::Failed => {
                let (rip, failure) = (self.vcpu.save().rip, self.vcpu.failure().unwrap_or_default());
                self.control.end_with(Outcome::EngineFailure { vcpu: self.index, rip }, failure);
                return Stage::Ended;
            }
            Exit::Shutdown => {
                let rip = self.vcpu.save().rip;
                self.control.end(Outcome::Shutdown { vcpu: self.index, rip });
                return Stage::Ended;
            }
        }
        Stage::Running
    }

    /// Asked to stop: for the end of the run, which the caller sees; for a pause; any other stop has been served by stopping.
    fn stopped(&mut self) {
        if !self.control.is_ending() {
            self.signal.take(Signals::STOP);
            self.hold();
        }
    }

    /// Stands still while the run is paused.
    fn hold(&mut self) {
        if self.control.hold() {
            self.vcpu.stopped();
            self.io.paravirt.stopped();
        }
    }

    /// HLT: sleeps until something is for this processor.
    fn halt(&mut self) {
        let start = host::read_tsc();
        let mut wakes = WAKES;
        if self.signal.pending().intersects(WAKES) {
            // What is pending and did not end the halt may be blocked: it must not end the sleep either.
            let state = self.vcpu.save();
            wakes.set(Signals::INTERRUPT, state.rflags & rflags::IF != 0);
            wakes.set(Signals::NMI, !state.nmi_blocked);
        }
        self.io.paravirt.set_halted(true);
        self.sleep(wakes, None);
        self.io.paravirt.set_halted(false);
        self.ledger.record(Cause::Halt, host::read_tsc().wrapping_sub(start));
    }

    /// A hypercall waits: sleeps until it is over, and hands its result in.
    fn wait_call(&mut self) {
        if let Some(value) = self.io.paravirt.native().and_then(|native| native.finish_flush()) {
            return self.vcpu.answer(value);
        }
        if self.waits_in_engine {
            self.io.paravirt.go_away();
            let value = self.wait_in_engine();
            self.io.paravirt.come_back();
            if let Some(value) = value {
                self.vcpu.answer(value);
            }
            return;
        }
        let state = self.vcpu.save();
        let mut wakes = Signals::WAKE | Signals::INIT | Signals::STOP;
        wakes.set(Signals::INTERRUPT, state.rflags & rflags::IF != 0);
        wakes.set(Signals::NMI, !state.nmi_blocked);
        let mut owed = Signals::empty();
        self.io.paravirt.go_away();
        let value = loop {
            // Taken before the look at what they stand for, so that what comes behind the look raises them anew.
            let raised = self.signal.take(Signals::WAKE | wakes & Signals::INTERRUPT);
            owed |= raised & Signals::INTERRUPT;
            let asked = self.asked_while_waiting(wakes & !Signals::INTERRUPT);
            let deliverable = wakes.contains(Signals::INTERRUPT) && self.io.interrupt_pending();
            // No engine waits for a call that nobody could have made.
            let Some(native) = self.io.paravirt.native() else { break 0 };
            match native.asleep() {
                Asleep::Over(value) => break value,
                Asleep::For(_) if asked || deliverable => break native.interrupt_wait(),
                Asleep::For(left) => self.sleep(wakes, left),
            };
        };
        self.io.paravirt.come_back();
        // A wake may have been seen by what it did before it was seen here, and means nothing to the engine.
        self.signal.take(Signals::WAKE);
        self.signal.raise(owed); // the engine has not seen it
        self.vcpu.answer(value);
    }

    /// True where any of `signals` is for this processor while its call waits. A pause is waited for here, inside of the call:
    /// what ends the call meanwhile, a wake or its timeout, is what it is told afterwards.
    fn asked_while_waiting(&mut self, signals: Signals) -> bool {
        let pending = self.signal.pending();
        if pending.contains(Signals::STOP) {
            self.stopped();
        }
        pending.intersects(signals)
    }

    /// The same where the engine has the local APIC. `None` where the processor was reset meanwhile.
    fn wait_in_engine(&mut self) -> Option<u64> {
        loop {
            // Taken before the look at what it stands for.
            self.signal.take(Signals::WAKE);
            let asked = self.asked_while_waiting(Signals::INIT | Signals::STOP);
            let native = self.io.paravirt.native()?;
            let left = match native.asleep() {
                Asleep::Over(value) => return Some(value),
                Asleep::For(_) if asked => return Some(native.interrupt_wait()),
                Asleep::For(left) => left,
            };
            let start = HostClock.monotonic_ns();
            if let Some(alarm) = &self.alarm {
                let left = left.map_or(LONGEST_DOZE, |left| left.min(LONGEST_DOZE));
                alarm.arm(start.saturating_add(left.as_nanos() as u64));
            }
            let doze = self.vcpu.doze(&mut self.io);
            if let Some(alarm) = &self.alarm {
                alarm.disarm();
            }
            if self.profiled {
                self.ledger.profile.slept(HostClock.monotonic_ns() - start);
            }
            match doze {
                Doze::Again => {}
                Doze::Deliverable => return Some(self.io.paravirt.native()?.interrupt_wait()),
                Doze::Gone => {
                    // Nothing behind the INIT has been answered yet.
                    self.io.init();
                    return None;
                }
            }
        }
    }

    /// INIT, from wherever the processor was.
    fn init(&mut self) -> Stage {
        if self.index == BOOTSTRAP {
            // It would start at the firmware's reset vector; there is no firmware, and what firmware does then is to
            // start the machine anew.
            self.control.end(Outcome::Reset);
            return Stage::Ended;
        }
        let state = self.vcpu.save().after_init();
        self.io.init();
        self.load(&state)
    }

    fn wait_for_startup(&mut self) -> Stage {
        let pending = self.sleep(Signals::STARTUP | Signals::INIT | Signals::STOP, None);
        if pending.contains(Signals::STOP) {
            self.stopped();
            return Stage::Waiting;
        }
        if self.signal.take(Signals::INIT) == Signals::INIT {
            return self.init();
        }
        if self.signal.take(Signals::STARTUP) == Signals::STARTUP {
            let state = self.vcpu.save().started_at(self.signal.startup_vector());
            self.load(&state);
            return Stage::Running;
        }
        Stage::Waiting
    }

    /// Sleeps until any of `signals` is raised, or `timeout` has passed. Returns what is pending then.
    fn sleep(&self, signals: Signals, timeout: Option<Duration>) -> Signals {
        let start = self.profiled.then(|| HostClock.monotonic_ns());
        let pending = self.signal.wait(signals, timeout);
        if let Some(start) = start {
            self.ledger.profile.slept(HostClock.monotonic_ns() - start);
        }
        pending
    }

    fn load(&mut self, state: &CpuState) -> Stage {
        if let Err(error) = self.vcpu.load(state) {
            // A state made from a saved one and the architecture's constants.
            unreachable!("the engine refuses the state after INIT: {error}");
        }
        Stage::Waiting
    }
}

/// A vCPU's thread in the run. One that panics takes the others with it, so that the run ends and says so.
struct InRun(Arc<Control>);

impl InRun {
    fn enter(control: &Arc<Control>) -> Self {
        control.enter();
        Self(Arc::clone(control))
    }
}

impl Drop for InRun {
    fn drop(&mut self) {
        self.0.leave();
        if std::thread::panicking() {
            self.0.stop_all();
        }
    }
}
