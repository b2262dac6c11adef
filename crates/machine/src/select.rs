//! Which CPU engine runs the guest, and why.

use serde::Serialize;

use crate::Error;
use crate::plan::EngineChoice;

/// The engine a plan gets, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SelectedEngine {
    /// "translate" or "kvm".
    pub name: &'static str,
    /// Why this one, in a few words for the first line of output.
    pub reason: String,
}

/// Says which engine `choice` means on this host.
///
/// # Errors
/// [`Error::Engine`] where the engine asked for does not work here.
pub fn select_engine(choice: EngineChoice) -> Result<SelectedEngine, Error> {
    let reason = match choice {
        EngineChoice::Translate => "as asked".into(),
        EngineChoice::Auto => match kvm::probe() {
            Ok(()) => "the host has KVM, but the kvm engine is not part of this version yet".into(),
            Err(engine::Error::Unusable { reason, .. }) => reason,
            Err(error) => error.to_string(),
        },
        EngineChoice::Kvm => {
            kvm::probe()?;
            let reason = "it is not part of this version yet; use --engine translate".into();
            return Err(Error::Engine(engine::Error::Unusable { engine: "kvm", reason }));
        }
    };
    Ok(SelectedEngine { name: "translate", reason })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kvm_is_refused_and_everything_else_translates() {
        assert!(select_engine(EngineChoice::Kvm).unwrap_err().to_string().starts_with("the kvm engine is not usable"));
        assert_eq!(select_engine(EngineChoice::Translate).unwrap().name, "translate");
        let auto = select_engine(EngineChoice::Auto).unwrap();
        assert!(auto.name == "translate" && !auto.reason.is_empty());
    }
}
