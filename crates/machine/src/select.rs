//! Which CPU engine runs the guest, and why.

use std::sync::OnceLock;

use contract::native::msr;
use engine::Engine;
use kvm::Kvm;
use memory::GuestRam;
use serde::Serialize;
use translator::Translator;

use crate::dialects::HYPERCALL_PORT;
use crate::plan::{EngineCheck, EngineChoice, Invalid, TimePolicy, Virt};
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

/// What decides on the engine.
#[derive(Clone, Copy, Debug, Default)]
pub struct EngineWish {
    /// Which one.
    pub choice: EngineChoice,
    /// What it is to check of itself: the translating engine's.
    pub check: EngineCheck,
    /// How finely the guest may measure time: KVM cannot keep it from doing so.
    pub time: TimePolicy,
    /// Whether sensitive instructions are to trap: the translating engine's.
    pub virt: Virt,
}

impl EngineWish {
    pub(crate) fn of(plan: &Plan) -> Self {
        Self { choice: plan.engine, check: plan.engine_check, time: plan.time_policy, virt: plan.virt }
    }
}

/// Says which engine is meant on this host.
///
/// # Errors
/// [`Error::Engine`] where the engine asked for does not work here, [`Error::Plan`] where it cannot do what is wished.
pub fn select_engine(wish: EngineWish) -> Result<SelectedEngine, Error> {
    decide(wish, || probe_kvm().verdict())
}

fn decide(wish: EngineWish, kvm: impl FnOnce() -> Result<(), engine::Error>) -> Result<SelectedEngine, Error> {
    let EngineWish { choice, check, time, virt } = wish;
    let selected = |name, reason: String| Ok(SelectedEngine { name, reason });
    match choice {
        EngineChoice::Translate => selected(TRANSLATE, "as asked".into()),
        EngineChoice::Auto if check != EngineCheck::Off => selected(TRANSLATE, "it is to be checked".into()),
        EngineChoice::Auto if time != TimePolicy::Exact => {
            selected(TRANSLATE, "time is to be coarse: on kvm, RDTSC cannot be made to exit".into())
        }
        EngineChoice::Auto if virt == Virt::Classic => selected(TRANSLATE, "--virt classic is its own".into()),
        EngineChoice::Auto => match kvm() {
            Ok(()) => selected(KVM, "a probe guest ran".into()),
            Err(engine::Error::Unusable { reason, .. }) => selected(TRANSLATE, format!("no kvm: {reason}")),
            Err(error) => selected(TRANSLATE, error.to_string()),
        },
        EngineChoice::Kvm | EngineChoice::KvmUnprobed if time != TimePolicy::Exact => Err(Invalid::TimePolicy.into()),
        EngineChoice::Kvm | EngineChoice::KvmUnprobed if virt == Virt::Classic => Err(Invalid::CLASSIC_ON_KVM.into()),
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

    fn wish(choice: EngineChoice) -> EngineWish {
        EngineWish { choice, ..EngineWish::default() }
    }

    #[test]
    fn auto_takes_kvm_where_a_guest_ran_and_says_why_not_elsewhere() {
        let auto = |kvm: fn() -> Result<(), engine::Error>| decide(EngineWish::default(), kvm).unwrap();
        assert_eq!((auto(|| Ok(())).name, auto(|| Ok(())).reason.as_str()), ("kvm", "a probe guest ran"));
        let fallen_back = auto(unusable);
        assert_eq!((fallen_back.name, fallen_back.reason.as_str()), ("translate", "no kvm: SSE: no such instruction"));
    }

    #[test]
    fn kvm_asked_for_fails_with_the_reason_and_the_other_looks_at_nothing() {
        let error = decide(wish(EngineChoice::Kvm), unusable).unwrap_err().to_string();
        assert_eq!(error, "the kvm engine is not usable here: SSE: no such instruction");
        assert_eq!(decide(wish(EngineChoice::Kvm), || Ok(())).unwrap().name, "kvm");
        let unprobed = decide(wish(EngineChoice::KvmUnprobed), || panic!("not asked for")).unwrap();
        assert_eq!(unprobed.name, "kvm");
        for wish in [
            wish(EngineChoice::Translate),
            EngineWish { check: EngineCheck::Lockstep, ..EngineWish::default() },
            EngineWish { virt: Virt::Classic, ..EngineWish::default() },
        ] {
            assert_eq!(decide(wish, || panic!("not asked for")).unwrap().name, "translate", "{wish:?}");
        }
    }

    #[test]
    fn what_only_the_translator_can_do_is_refused_elsewhere() {
        let decide = |choice| {
            let wish = EngineWish { choice, time: TimePolicy::Coarse(1000), ..EngineWish::default() };
            decide(wish, || panic!("not asked for"))
        };
        let auto = decide(EngineChoice::Auto).unwrap();
        assert_eq!(auto.name, "translate");
        assert_eq!(auto.reason, "time is to be coarse: on kvm, RDTSC cannot be made to exit");
        assert_eq!(decide(EngineChoice::Translate).unwrap().reason, "as asked");
        for choice in [EngineChoice::Kvm, EngineChoice::KvmUnprobed] {
            let error = decide(choice).unwrap_err().to_string();
            assert!(error.contains("a coarse time policy cannot be kept on KVM"), "{error}");
            let classic = EngineWish { virt: Virt::Classic, ..wish(choice) };
            let error = super::decide(classic, || panic!("not asked for")).unwrap_err().to_string();
            assert!(error.contains("there the hardware decides"), "{error}");
        }
    }

    #[test]
    fn this_host_gets_an_engine() {
        let selected = select_engine(EngineWish::default()).unwrap();
        assert_eq!(selected.name == KVM, probe_kvm().verdict().is_ok(), "{selected:?}");
    }
}
