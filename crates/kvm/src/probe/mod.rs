//! Whether guests run here, found out by running one.
//!
//! That `/dev/kvm` opens says little: there are hosts where KVM is emulated, or stops at the first vector instruction of a
//! kernel. So a small guest does what stock kernels do first, stage by stage, before a deadline.

mod guest;

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use engine::{
    Answer, CpuIo, Engine, Error, Exit, GuestTsc, HypercallArgs, Ledger, MsrRefused, Signal, Signals, VcpuConfig,
    VcpuId,
};
use host::{Clock, HostClock};
use memory::{Gpa, GuestRam};

use crate::capability;
use crate::kvm::{Config, Kvm, open};

#[cfg(test)]
pub(crate) use guest::{CODE, long_mode, set_gate};

/// How long the guest may take. Where KVM is good, it takes a millisecond.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long a vCPU that was told to stop may take to do so.
const LAST_PATIENCE: Duration = Duration::from_millis(500);
/// What the guest tells where it found something wrong.
const WRONG: u8 = 0xff;

/// One thing that was tried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// What.
    pub name: &'static str,
    /// What was found, or what is wrong; `None` where an earlier step failed.
    pub outcome: Option<Result<String, String>>,
}

/// All that was tried, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Each step.
    pub steps: Vec<Step>,
}

/// The steps before guest code runs.
const HOST_STEPS: [&str; 4] = ["device", "capabilities", "VM", "vCPU"];

impl Report {
    /// `done` in order of the steps; whatever is behind a failure was not reached.
    fn of(done: Vec<Result<String, String>>) -> Self {
        let mut done = done.into_iter();
        let names = HOST_STEPS.into_iter().chain(guest::STAGES);
        Self { steps: names.map(|name| Step { name, outcome: done.next() }).collect() }
    }

    /// Whether guests as stock kernels run here.
    ///
    /// # Errors
    /// [`Error::Unusable`] with the step that failed and why.
    pub fn verdict(&self) -> Result<(), Error> {
        for step in &self.steps {
            match &step.outcome {
                Some(Ok(_)) => {}
                Some(Err(why)) if step.name == HOST_STEPS[0] => return Err(crate::kvm::unusable(why.clone())),
                Some(Err(why)) => {
                    let first = why.lines().next().unwrap_or_default();
                    return Err(crate::kvm::unusable(format!("{}: {first}", step.name)));
                }
                None => return Err(crate::kvm::unusable(format!("{}: not reached", step.name))),
            }
        }
        Ok(())
    }
}

/// Tries everything.
pub fn run() -> Report {
    let mut done = Vec::new();
    let kvm = match open(Path::new("/dev/kvm")) {
        Ok(kvm) => kvm,
        Err(error) => return Report::of(vec![Err(reason(error))]),
    };
    done.push(Ok(format!("/dev/kvm opens, API version {}", kvm.get_api_version())));
    let missing = capability::missing(|number| kvm.check_extension_raw(number.into()) > 0);
    drop(kvm);
    match capability::reason(&missing) {
        None => done.push(Ok("all that are needed".into())),
        Some(reason) => {
            done.push(Err(reason));
            return Report::of(done);
        }
    }
    let made = GuestRam::new(&[(Gpa(0), guest::MEMORY)])
        .map_err(|error| error.to_string())
        .and_then(|ram| Ok((Kvm::new(ram.clone(), Config::default()).map_err(reason)?, ram)));
    match made {
        Ok((engine, ram)) => {
            done.push(Ok("memory and a split interrupt chip".into()));
            run_guest(&engine, &ram, &mut done);
        }
        Err(why) => done.push(Err(why)),
    }
    Report::of(done)
}

fn reason(error: Error) -> String {
    match error {
        Error::Unusable { reason, .. } => reason,
        other => other.to_string(),
    }
}

/// Makes a vCPU and runs the guest on it, on a thread that is left behind where even a stop does not reach it.
fn run_guest(engine: &Kvm, ram: &GuestRam, done: &mut Vec<Result<String, String>>) {
    let signal = Arc::new(Signal::default());
    let mut vcpu = match vcpu(engine, ram, &signal) {
        Ok(vcpu) => vcpu,
        Err(why) => return done.push(Err(why)),
    };
    done.push(Ok("takes a model and a state".into()));
    let (tell, told) = channel();
    let started = HostClock.monotonic_ns();
    let running = std::thread::Builder::new().name("kvm-probe".into()).spawn(move || {
        let mut io = ProbeIo { stages: 0, wrong: false };
        let exit = vcpu.run(&mut io);
        let _ = tell.send((io.stages, io.wrong, exit, vcpu.failure())); // nobody listens any more after the deadline
    });
    if let Err(error) = running {
        return done.push(Err(format!("the host refused a thread: {error}")));
    }
    let ended = match told.recv_timeout(PATIENCE) {
        Err(RecvTimeoutError::Timeout) => {
            signal.raise(Signals::STOP);
            told.recv_timeout(LAST_PATIENCE).map_err(|_| "the vCPU does not even stop".to_owned())
        }
        ended => ended.map_err(|_| "the vCPU's thread died".to_owned()),
    };
    let took = HostClock.monotonic_ns() - started;
    match ended {
        Ok((stages, wrong, exit, failure)) => stages_done(stages, wrong, exit, failure, took, done),
        Err(why) => done.push(Err(why)),
    }
}

fn vcpu(engine: &Kvm, ram: &GuestRam, signal: &Arc<Signal>) -> Result<Box<dyn engine::Vcpu>, String> {
    let model = engine::cpu_model::lookup(engine::cpu_model::DEFAULT).ok_or("there is no default CPU model")?;
    let cpuid = model.table(&engine.host_cpu(), 0, 1).map_err(|error| error.to_string())?;
    let tsc = GuestTsc::new(HostClock.tsc_khz(), HostClock.tsc(), 0);
    let config = VcpuConfig {
        id: VcpuId(0),
        cpuid: Arc::new(cpuid),
        signal: Arc::clone(signal),
        ledger: Arc::new(Ledger::default()),
        tsc: Arc::new(tsc),
    };
    let state = guest::load(ram).map_err(|error| error.to_string())?;
    let mut vcpu = engine.vcpu(config).map_err(|error| error.to_string())?;
    vcpu.load(&state).map_err(|error| error.to_string())?;
    Ok(vcpu)
}

/// Turns what the guest told, and how it ended, into steps.
fn stages_done(
    stages: u8,
    wrong: bool,
    exit: Exit,
    failure: Option<String>,
    took_ns: u64,
    done: &mut Vec<Result<String, String>>,
) {
    done.extend((0..stages).map(|_| Ok("ran".into())));
    if usize::from(stages) == guest::STAGES.len() {
        if let Some(Ok(last)) = done.last_mut() {
            *last = format!("ran; the probe guest took {}.{} ms", took_ns / 1_000_000, took_ns / 100_000 % 10);
        }
        return;
    }
    done.push(Err(match (wrong, exit) {
        (true, _) => "the guest found a wrong value".into(),
        (_, Exit::Failed) => failure.unwrap_or_else(|| "KVM could not go on".into()),
        (_, Exit::Stopped) => format!("nothing happened within {} s", PATIENCE.as_secs()),
        (_, Exit::Shutdown) => "a triple fault".into(),
        (_, exit) => format!("the guest ended with {exit:?}"),
    }));
}

/// The probe guest's machine: a port.
struct ProbeIo {
    /// Stages told, in order.
    stages: u8,
    wrong: bool,
}

impl CpuIo for ProbeIo {
    fn port_read(&mut self, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn port_write(&mut self, port: u16, data: &[u8]) {
        if port == guest::PORT {
            match data {
                [stage] if *stage == self.stages + 1 => self.stages += 1,
                [WRONG, ..] | [_, ..] | [] => self.wrong = true,
            }
        }
    }
    fn mmio_read(&mut self, _gpa: Gpa, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&mut self, _gpa: Gpa, _data: &[u8]) {}
    fn msr_read(&mut self, _index: u32) -> Result<u64, MsrRefused> {
        Err(MsrRefused)
    }
    fn msr_write(&mut self, _index: u32, _value: u64) -> Result<(), MsrRefused> {
        Err(MsrRefused)
    }
    fn hypercall(&mut self, _call: HypercallArgs) -> Answer {
        Answer::Now(u64::MAX)
    }
    fn take_interrupt(&mut self) -> Option<u8> {
        None
    }
    fn interrupt_pending(&mut self) -> bool {
        false
    }
    fn task_priority(&mut self) -> u8 {
        0
    }
    fn set_task_priority(&mut self, _priority: u8) {}
    fn stop_requested(&self) -> bool {
        self.wrong || usize::from(self.stages) == guest::STAGES.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_behind_a_failure_were_not_reached() {
        let mut done = vec![Ok("opens".into()), Ok("all".into()), Ok("made".into()), Ok("made".into())];
        stages_done(2, false, Exit::Failed, Some("no such instruction\nregisters".into()), 0, &mut done);
        let report = Report::of(done);
        assert_eq!(report.steps.len(), 10);
        assert_eq!(report.steps[5], Step { name: "paging", outcome: Some(Ok("ran".into())) });
        assert_eq!(report.steps[7], Step { name: "timer", outcome: None });
        let said = report.verdict().unwrap_err().to_string();
        assert_eq!(said, "the kvm engine is not usable here: MSRs: no such instruction");
    }

    #[test]
    fn a_guest_that_ends_otherwise_is_told_how() {
        let said = |wrong, exit| {
            let mut done = Vec::new();
            stages_done(0, wrong, exit, None, 0, &mut done);
            done.pop().unwrap().unwrap_err()
        };
        assert_eq!(said(true, Exit::Device), "the guest found a wrong value");
        assert_eq!(said(false, Exit::Stopped), "nothing happened within 2 s");
        assert_eq!(said(false, Exit::Shutdown), "a triple fault");
        assert_eq!(said(false, Exit::Failed), "KVM could not go on");
        assert_eq!(said(false, Exit::Halted), "the guest ended with Halted");
    }

    #[test]
    fn a_guest_that_came_through_is_good() {
        let mut done: Vec<_> = (0..4).map(|_| Ok("fine".into())).collect();
        stages_done(6, false, Exit::Device, None, 1_250_000, &mut done);
        let report = Report::of(done);
        assert!(report.verdict().is_ok());
        assert_eq!(report.steps[9].outcome, Some(Ok("ran; the probe guest took 1.2 ms".into())));
    }

    #[test]
    fn the_probe_comes_to_a_verdict_here() {
        let report = run();
        let failed = report.steps.iter().filter(|step| matches!(step.outcome, Some(Err(_)))).count();
        let reached = report.steps.iter().take_while(|step| matches!(step.outcome, Some(Ok(_)))).count();
        // Whatever this host is: all was reached, or one step failed and none behind it was tried.
        assert_eq!(failed, usize::from(reached < report.steps.len()), "{report:?}");
        assert_eq!(report.verdict().is_ok(), failed == 0);
    }
}
