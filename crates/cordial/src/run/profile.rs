//! The profile: where the vCPUs' time went, what was translated, what was executed.

use engine::ledger::{Ledger, Work};
use engine::profile::{Figures, Phase, Profile as Times};
use serde::Serialize;
use std::sync::Arc;

/// What the vCPUs spent processor time on.
#[derive(Debug, Serialize)]
pub struct Row {
    /// The phase's name.
    pub phase: &'static str,
    /// Processor time, milliseconds: the phase's share of the samples, of all processor time.
    pub time_ms: f64,
    /// Of all samples, per cent.
    pub share: f64,
    #[serde(skip)]
    meaning: &'static str,
}

/// What the translator made.
#[derive(Debug, Serialize)]
pub struct Translated {
    /// Blocks.
    pub blocks: u64,
    /// Guest instructions in them.
    pub instructions: u64,
    /// Bytes of host code made of these.
    pub bytes: u64,
    /// Time of phase `translating` for each of the instructions, nanoseconds; `null` where nothing was translated.
    pub ns_per_instruction: Option<f64>,
}

/// Guest instructions executed.
#[derive(Debug, Serialize)]
pub struct Executed {
    /// By translated code.
    pub translated: u64,
    /// By the interpreter.
    pub interpreted: u64,
    /// Of both, for each second of the vCPUs' processor time.
    pub per_second: Option<f64>,
}

/// The whole profile, over all vCPUs.
#[derive(Debug, Serialize)]
pub struct Profile {
    engine: &'static str,
    /// How many vCPUs.
    pub vcpus: usize,
    /// How many samples all shares are made of.
    pub samples: u64,
    /// Processor time of the vCPUs' threads, milliseconds.
    pub processor_ms: f64,
    /// How much of it went to the host's kernel.
    pub host_kernel_ms: f64,
    /// Time by the clock that vCPUs slept: halted, or not started yet.
    pub asleep_ms: f64,
    /// Time by the clock that they neither slept nor ran: for want of a processor of the host's, or of a lock.
    pub waiting_ms: f64,
    /// All phases.
    pub phases: Vec<Row>,
    /// What was translated.
    pub translated: Translated,
    /// What was executed.
    pub executed: Executed,
}

impl Profile {
    /// Reads the ledgers of a machine that `engine` ran.
    pub fn of(engine: &'static str, ledgers: &[Arc<Ledger>]) -> Self {
        let figures = Times::sum(ledgers.iter().map(|ledger| &ledger.profile));
        let worked = |work: Work| ledgers.iter().map(|ledger| ledger.worked(work)).sum::<u64>();
        Self::made_of(engine, ledgers.len(), &figures, worked)
    }

    fn made_of(engine: &'static str, vcpus: usize, figures: &Figures, worked: impl Fn(Work) -> u64) -> Self {
        let ms = |ns: u64| ns as f64 / 1e6;
        let (samples, processor_ms) = (figures.samples.iter().sum::<u64>(), ms(figures.processor_ns));
        let row = |(phase, count): (Phase, u64)| {
            let part = count as f64 / samples.max(1) as f64;
            Row { phase: phase.name(), time_ms: part * processor_ms, share: part * 100.0, meaning: meaning(phase) }
        };
        let phases: Vec<Row> = Phase::ALL.into_iter().zip(figures.samples).map(row).collect();
        let (blocks, instructions, bytes) =
            (worked(Work::Translate), worked(Work::TranslateInstructions), worked(Work::TranslateBytes));
        let translating = phases.iter().find(|row| row.phase == Phase::Translating.name()).map(|row| row.time_ms * 1e6);
        let per = |whole: f64, parts: u64| (parts > 0).then(|| whole / parts as f64);
        let (native, interpreted) = (worked(Work::NativeInstructions), worked(Work::Instructions));
        let per_second = (native + interpreted) as f64 / processor_ms * 1e3;
        Self {
            engine,
            vcpus,
            samples,
            processor_ms,
            host_kernel_ms: ms(figures.kernel_ns),
            asleep_ms: ms(figures.asleep_ns),
            waiting_ms: ms(figures.wall_ns.saturating_sub(figures.processor_ns + figures.asleep_ns)),
            phases,
            translated: Translated {
                blocks,
                instructions,
                bytes,
                ns_per_instruction: translating.and_then(|ns| per(ns, instructions)),
            },
            executed: Executed {
                translated: native,
                interpreted,
                per_second: per_second.is_finite().then_some(per_second),
            },
        }
    }

    /// For a person.
    pub fn print(&self) -> String {
        if self.engine == "kvm" {
            return "profile: the kvm engine has the processor run guest code; there is nothing of its own to tell apart\n"
                .into();
        }
        let line = |name: &str, ms: f64, share: String, meaning: &str| {
            format!("{name:<16} {ms:>10.1} {share:>6}  {meaning}\n")
        };
        let mut text = format!("{:<16} {:>10} {:>6}\n", "PROFILE", "TIME ms", "%");
        for row in &self.phases {
            text += &line(row.phase, row.time_ms, format!("{:.1}", row.share), row.meaning);
        }
        let all = if self.samples > 0 { "100.0" } else { "-" };
        let made_of = format!("processor time of {} vCPUs, {} samples", self.vcpus, self.samples);
        text += &line("total", self.processor_ms, all.into(), &made_of);
        text += &line("  host's kernel", self.host_kernel_ms, String::new(), "of the total: page faults, system calls");
        text += &line("asleep", self.asleep_ms, String::new(), "by the clock: halted, or not started yet");
        text += &line("waiting", self.waiting_ms, String::new(), "by the clock: for the host, a processor or a lock");
        let Translated { blocks, instructions, bytes, ns_per_instruction } = &self.translated;
        if let Some(ns) = ns_per_instruction {
            let each = *bytes as f64 / *instructions as f64;
            text += &format!(
                "translated: {blocks} blocks, {instructions} guest instructions, {bytes} bytes of code \
                 ({each:.1} bytes and {ns:.0} ns an instruction)\n"
            );
        }
        let Executed { translated, interpreted, per_second } = &self.executed;
        text += &format!(
            "executed: {translated} guest instructions translated, {interpreted} interpreted \
             ({:.1} million a second of processor time)\n",
            per_second.unwrap_or(0.0) / 1e6
        );
        text
    }
}

/// What a phase is, in a few words.
const fn meaning(phase: Phase) -> &'static str {
    match phase {
        Phase::Translated => "guest code, and the checks of its memory accesses",
        Phase::Switching => "into translated code and out of it",
        Phase::Translating => "guest code into host code",
        Phase::TlbFill => "page walks after misses of the soft TLB",
        Phase::Handlers => "instructions that translated code calls the interpreter for",
        Phase::Interpreting => "what the translator is not for",
        Phase::Devices => "ports, device memory, MSRs, hypercalls",
        Phase::Other => "interrupts, falling asleep, waking up",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(engine: &'static str) -> Profile {
        // In the order of the phases: translated code 60, translating 30, other 10.
        let samples = [60, 0, 30, 0, 0, 0, 0, 10];
        let figures = Figures {
            samples,
            processor_ns: 2_000_000_000,
            kernel_ns: 500_000_000,
            wall_ns: 6_000_000_000,
            asleep_ns: 3_000_000_000,
        };
        let worked = |work| match work {
            Work::Translate => 1000,
            Work::TranslateInstructions => 10_000,
            Work::TranslateBytes => 150_000,
            Work::NativeInstructions => 9_000_000,
            Work::Instructions => 1_000_000,
            _ => 0,
        };
        Profile::made_of(engine, 2, &figures, worked)
    }

    #[test]
    fn shares_add_up_and_time_is_shared_out() {
        let profile = profile("translate");
        assert!((profile.phases.iter().map(|row| row.share).sum::<f64>() - 100.0).abs() < 1e-9);
        assert!((profile.phases.iter().map(|row| row.time_ms).sum::<f64>() - 2000.0).abs() < 1e-9);
        assert_eq!((profile.phases[0].phase, profile.phases[0].time_ms), ("translated-code", 1200.0));
        assert_eq!(profile.waiting_ms, 1000.0);
        assert_eq!(profile.translated.ns_per_instruction, Some(60_000.0));
        assert_eq!(profile.executed.per_second, Some(5e6));
        let text = profile.print();
        assert!(text.contains("translating           600.0   30.0  guest code into host code\n"), "{text}");
        assert!(
            text.contains("total                2000.0  100.0  processor time of 2 vCPUs, 100 samples\n"),
            "{text}"
        );
        assert!(text.contains("(15.0 bytes and 60000 ns an instruction)"), "{text}");
        assert!(text.contains("9000000 guest instructions translated, 1000000 interpreted (5.0 million"), "{text}");
    }

    #[test]
    fn a_run_too_short_for_samples_has_no_shares() {
        let profile = Profile::of("translate", &[Arc::default()]);
        assert!(profile.phases.iter().all(|row| row.share == 0.0 && row.time_ms == 0.0));
        assert_eq!((profile.translated.ns_per_instruction, profile.executed.per_second), (None, None));
        assert!(profile.print().contains("total                   0.0      -  processor time of 1 vCPUs, 0 samples"));
    }

    #[test]
    fn on_the_processor_itself_there_is_nothing_to_tell_apart() {
        let text = profile("kvm").print();
        assert!(text.starts_with("profile: the kvm engine ") && text.lines().count() == 1, "{text}");
    }
}
