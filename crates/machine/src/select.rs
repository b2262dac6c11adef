//! Which CPU engine runs the guest, and why.

use std::sync::OnceLock;

use contract::native::msr;
use engine::Engine;
use kvm::Kvm;
use memory::GuestRam;
use serde::Serialize;
use translator::Translator;

use crate::dialects::HYPERCALL_PORT;
use crate::plan::{EngineCheck, EngineChoice, Invalid, TimePolicy};
use crate::{Error, Plan};

pub use kvm::probe::{Report as KvmReport, Step as KvmStep};

/// The engine a plan gets, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SelectedEngine {
    /// "translate" or "kvm".
    pub name: &'static str,
    /// Why this one, in a few words for the first line of output.
    pub reason: String,
}

const TRANSLATE: &str = "translate";
const KVM: &str = "kvm";

/// Whether guests run on this host's KVM, found out by running one: once a process, a few milliseconds.
pub fn probe_kvm() -> &'static KvmReport {
    static REPORT: OnceLock<KvmReport> = OnceLock::new();
    REPORT.get_or_init(kvm::probe::run)
}

/// Says which engine `choice` means on this host, with what the translating engine is to check of itself and how finely the
/// guest may measure time.
///
/// # Errors
/// [`Error::Engine`] where the engine asked for does not work here, [`Error::Plan`] where it cannot keep to `time`.
pub fn select_engine(choice: EngineChoice, check: EngineCheck, time: TimePolicy) -> Result<SelectedEngine, Error> {
    decide(choice, check, time, || probe_kvm().verdict())
}

fn decide(
    choice: EngineChoice,
    check: EngineCheck,
    time: TimePolicy,
    kvm: impl FnOnce() -> Result<(), engine::Error>,
) -> Result<SelectedEngine, Error> {
    let selected = |name, reason: String| Ok(SelectedEngine { name, reason });
    match choice {
        EngineChoice::Translate => selected(TRANSLATE, "as asked".into()),
        EngineChoice::Auto if check != EngineCheck::Off => selected(TRANSLATE, "it is to be checked".into()),
        EngineChoice::Auto if time != TimePolicy::Exact => {
            selected(TRANSLATE, "time is to be coarse: on kvm, RDTSC cannot be made to exit".into())
        }
        EngineChoice::Auto => match kvm() {
            Ok(()) => selected(KVM, "a probe guest ran".into()),
            Err(engine::Error::Unusable { reason, .. }) => selected(TRANSLATE, format!("no kvm: {reason}")),
            Err(error) => selected(TRANSLATE, error.to_string()),
        },
        EngineChoice::Kvm | EngineChoice::KvmUnprobed if time != TimePolicy::Exact => Err(Invalid::TimePolicy.into()),
        EngineChoice::Kvm => {
            kvm()?;
            selected(KVM, "as asked; a probe guest ran".into())
        }
        EngineChoice::KvmUnprobed => selected(KVM, "as asked, whatever a probe guest would say".into()),
    }
}

impl SelectedEngine {
    /// Makes the engine.
    pub(crate) fn make(&self, plan: &Plan, ram: GuestRam) -> Result<Box<dyn Engine>, Error> {
        if self.name == KVM {
            return Ok(Box::new(Kvm::new(ram, kvm_config(plan))?));
        }
        Ok(Box::new(Translator::new(ram, plan.translator())))
    }
}

/// What of the native dialect the kernel has to leave to us.
fn kvm_config(plan: &Plan) -> kvm::Config {
    if !plan.dialects.cordial {
        return kvm::Config::default();
    }
    kvm::Config {
        machine_msrs: vec![msr::BASE..=msr::BASE + msr::COUNT - 1],
        hypercall_port: Some(HYPERCALL_PORT.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unusable() -> Result<(), engine::Error> {
        Err(engine::Error::Unusable { engine: "kvm", reason: "SSE: no such instruction".into() })
    }

    #[test]
    fn auto_takes_kvm_where_a_guest_ran_and_says_why_not_elsewhere() {
        let exact = TimePolicy::Exact;
        let auto =
            |kvm: fn() -> Result<(), engine::Error>| decide(EngineChoice::Auto, EngineCheck::Off, exact, kvm).unwrap();
        assert_eq!((auto(|| Ok(())).name, auto(|| Ok(())).reason.as_str()), ("kvm", "a probe guest ran"));
        let fallen_back = auto(unusable);
        assert_eq!((fallen_back.name, fallen_back.reason.as_str()), ("translate", "no kvm: SSE: no such instruction"));
    }

    #[test]
    fn kvm_asked_for_fails_with_the_reason_and_the_other_looks_at_nothing() {
        let exact = TimePolicy::Exact;
        let error = decide(EngineChoice::Kvm, EngineCheck::Off, exact, unusable).unwrap_err().to_string();
        assert_eq!(error, "the kvm engine is not usable here: SSE: no such instruction");
        assert_eq!(decide(EngineChoice::Kvm, EngineCheck::Off, exact, || Ok(())).unwrap().name, "kvm");
        let unprobed = decide(EngineChoice::KvmUnprobed, EngineCheck::Off, exact, || panic!("not asked for")).unwrap();
        assert_eq!(unprobed.name, "kvm");
        for (choice, check) in
            [(EngineChoice::Translate, EngineCheck::Off), (EngineChoice::Auto, EngineCheck::Lockstep)]
        {
            assert_eq!(decide(choice, check, exact, || panic!("not asked for")).unwrap().name, "translate");
        }
    }

    #[test]
    fn coarse_time_is_the_translators_and_nobody_else_is_run_instead() {
        let decide = |choice| decide(choice, EngineCheck::Off, TimePolicy::Coarse(1000), || panic!("not asked for"));
        let auto = decide(EngineChoice::Auto).unwrap();
        assert_eq!(auto.name, "translate");
        assert_eq!(auto.reason, "time is to be coarse: on kvm, RDTSC cannot be made to exit");
        assert_eq!(decide(EngineChoice::Translate).unwrap().reason, "as asked");
        for choice in [EngineChoice::Kvm, EngineChoice::KvmUnprobed] {
            let error = decide(choice).unwrap_err().to_string();
            assert!(error.contains("a coarse time policy cannot be kept on KVM"), "{error}");
        }
    }

    #[test]
    fn this_host_gets_an_engine() {
        let selected = select_engine(EngineChoice::Auto, EngineCheck::Off, TimePolicy::Exact).unwrap();
        assert_eq!(selected.name == KVM, probe_kvm().verdict().is_ok(), "{selected:?}");
    }
}
