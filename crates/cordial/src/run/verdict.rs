//! How a run ended, in the words of the user: one line, one status.

use crate::failure::status;
use machine::Outcome;

/// How it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The command (or shell) ended with this status.
    Exited {
        /// As a shell counts it.
        status: i32,
        /// Why it could not be started, if so.
        error: Option<String>,
    },
    /// The guest switched itself off or reset, with nothing further to say.
    Ended,
    /// A bare-metal guest wrote the debug-exit port.
    TestExit(u8),
    /// The guest's kernel panicked, with these words.
    Panic(String),
    /// A vCPU took a triple fault.
    TripleFault {
        /// Which.
        vcpu: u32,
        /// Where.
        rip: u64,
    },
    /// The engine could not go on.
    EngineFailure {
        /// On which vCPU.
        vcpu: u32,
        /// Its RIP.
        rip: u64,
    },
    /// The engine's check of itself failed.
    EngineDifference {
        /// On which vCPU.
        vcpu: u32,
        /// Where.
        rip: u64,
    },
    /// `--timeout` ran out.
    Timeout,
    /// The user ended it, by this signal.
    Interrupted(i32),
    /// Nothing of the above: what went wrong.
    Failed(String),
}

/// What is known when a machine has ended.
#[derive(Clone, Debug, Default)]
pub struct Evidence {
    /// What the guest's first process reported.
    pub exit: Option<(i32, Option<String>)>,
    /// What the kernel's console said of a panic.
    pub panic: Option<String>,
    /// Why the machine was stopped, where it was.
    pub stopped: Option<Stop>,
    /// Whether a command was to report its status.
    pub command: bool,
}

/// Why a machine is stopped from outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// `--timeout`.
    Timeout,
    /// A signal to this process; 0 for the escape keys.
    Signal(i32),
    /// The guest's half of the dialogue made no sense.
    Nonsense(String),
}

impl Verdict {
    /// What the evidence means.
    pub fn of(outcome: Outcome, evidence: &Evidence) -> Self {
        match (outcome, &evidence.exit) {
            // Whatever the guest has said: it may not be true.
            (Outcome::EngineDifference { vcpu, rip }, _) => Self::EngineDifference { vcpu, rip },
            (Outcome::EngineFailure { vcpu, rip }, None) => Self::EngineFailure { vcpu, rip },
            (_, Some((status, error))) => Self::Exited { status: *status, error: error.clone() },
            (Outcome::TestExit { status }, None) => Self::TestExit(status),
            (Outcome::Shutdown { vcpu, rip }, None) => Self::TripleFault { vcpu, rip },
            (Outcome::Stopped, None) => match &evidence.stopped {
                Some(Stop::Timeout) => Self::Timeout,
                Some(Stop::Signal(number)) => Self::Interrupted(*number),
                Some(Stop::Nonsense(what)) => Self::Failed(format!("the guest's first process said nonsense: {what}")),
                None => Self::Failed("the machine stopped without being told to".into()),
            },
            // panic=-1 on our command line makes a panic a reset.
            (Outcome::Reset | Outcome::PowerOff, None) => match &evidence.panic {
                Some(reason) => Self::Panic(reason.clone()),
                None if evidence.command => Self::Failed("the guest ended before its command did".into()),
                None => Self::Ended,
            },
        }
    }

    /// The status the process ends with.
    pub const fn status(&self) -> u8 {
        match self {
            Self::Exited { status, .. } => *status as u8,
            Self::Ended => 0,
            Self::TestExit(status) => *status,
            Self::Panic(_) | Self::TripleFault { .. } => status::GUEST_CRASHED,
            Self::Timeout => status::TIMEOUT,
            // Not ours to choose: what a shell shows for a process that a signal ended.
            Self::Interrupted(number) => 128_u8.saturating_add(*number as u8),
            Self::EngineDifference { .. } | Self::EngineFailure { .. } | Self::Failed(_) => status::SETUP,
        }
    }

    /// The word for programs.
    pub const fn outcome(&self) -> &'static str {
        match self {
            Self::Exited { .. } | Self::Ended | Self::TestExit(_) => "exited",
            Self::Panic(_) | Self::TripleFault { .. } => "panic",
            Self::Timeout => "timeout",
            Self::Interrupted(_) => "interrupted",
            Self::EngineDifference { .. } | Self::EngineFailure { .. } | Self::Failed(_) => "vmm_error",
        }
    }

    /// The guest's own status, where it had one.
    pub const fn guest_status(&self) -> Option<i32> {
        match self {
            Self::Exited { status, .. } => Some(*status),
            Self::TestExit(status) => Some(*status as i32),
            _ => None,
        }
    }

    /// What went wrong, for the user; `None` where nothing did that the guest itself has not said.
    pub fn complaint(&self) -> Option<String> {
        match self {
            Self::Exited { error, .. } => error.clone(),
            Self::Ended | Self::TestExit(_) => None,
            Self::Panic(reason) => Some(format!("the guest's kernel panicked: {reason}")),
            Self::TripleFault { vcpu, rip } => {
                Some(format!("the guest crashed: triple fault on vCPU {vcpu} at RIP {rip:#x}"))
            }
            Self::EngineDifference { vcpu, rip } => Some(format!(
                "the engine's translation of the code at {rip:#x} on vCPU {vcpu} does not do what its interpreter does; \
                 please report this with the lines above"
            )),
            Self::EngineFailure { vcpu, rip } => Some(format!(
                "the kvm engine could not go on with vCPU {vcpu} at RIP {rip:#x}: the lines above say why; \
                 --engine translate runs the guest without the host's KVM"
            )),
            Self::Timeout => Some("the machine was stopped: --timeout ran out".into()),
            Self::Interrupted(0) => Some("ended by the user".into()),
            Self::Interrupted(number) => Some(format!("ended by signal {number}")),
            Self::Failed(what) => Some(what.clone()),
        }
    }

    /// True where the guest's console is worth showing.
    pub const fn wants_console(&self) -> bool {
        matches!(
            self,
            Self::Panic(_) | Self::TripleFault { .. } | Self::EngineFailure { .. } | Self::Timeout | Self::Failed(_)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_evidence_decides_on_the_status() {
        let status = |outcome, evidence: Evidence| Verdict::of(outcome, &evidence).status();
        let none = Evidence::default;
        let command = || Evidence { command: true, ..none() };
        assert_eq!(status(Outcome::PowerOff, Evidence { exit: Some((7, None)), ..command() }), 7);
        assert_eq!(status(Outcome::PowerOff, none()), 0);
        assert_eq!(status(Outcome::Reset, none()), 0);
        assert_eq!(status(Outcome::PowerOff, command()), 125);
        assert_eq!(status(Outcome::Reset, Evidence { panic: Some("x".into()), ..command() }), 123);
        assert_eq!(status(Outcome::Shutdown { vcpu: 0, rip: 1 }, none()), 123);
        assert_eq!(status(Outcome::EngineDifference { vcpu: 0, rip: 1 }, none()), 125);
        let exited = Evidence { exit: Some((0, None)), ..none() };
        assert_eq!(status(Outcome::EngineDifference { vcpu: 0, rip: 1 }, exited), 125);
        assert_eq!(status(Outcome::EngineFailure { vcpu: 0, rip: 1 }, none()), 125);
        assert_eq!(status(Outcome::TestExit { status: 33 }, none()), 33);
        let stopped = |stop| Evidence { stopped: Some(stop), ..none() };
        assert_eq!(status(Outcome::Stopped, stopped(Stop::Timeout)), 124);
        assert_eq!(status(Outcome::Stopped, stopped(Stop::Signal(2))), 130);
        assert_eq!(status(Outcome::Stopped, stopped(Stop::Nonsense("x".into()))), 125);
        // A guest that hangs on its way out has still said how its command ended.
        assert_eq!(status(Outcome::Stopped, Evidence { exit: Some((0, None)), ..stopped(Stop::Timeout) }), 0);
    }
}
