//! The machine and its run loop.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use engine::Ledger;
use serde::Serialize;

use crate::plan::EngineChoice;
use crate::{Attachments, Error, Plan, Report};

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

/// A machine that has not run yet.
pub struct Machine {
    handle: Handle,
}

impl Machine {
    /// Lays the plan out, loads the kernel, and puts devices and vCPUs together.
    ///
    /// # Errors
    /// [`Error`], before anything of the guest has run.
    pub fn assemble(plan: &Plan, _ends: Attachments) -> Result<Self, Error> {
        plan.check()?;
        select_engine(plan.engine)?;
        let ledgers = (0..plan.cpus).map(|_| Arc::default()).collect();
        Ok(Self { handle: Handle { stop: Arc::default(), ledgers } })
    }

    /// A way to reach the machine from other threads.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Runs the guest until it ends or is stopped.
    ///
    /// # Errors
    /// [`Error::Engine`] where the engine gives up.
    pub fn run(self) -> Result<Report, Error> {
        let reason = "no engine is part of this build yet".into();
        Err(Error::Engine(engine::Error::Unusable { engine: "translate", reason }))
    }
}

/// Reaches a running machine from any thread.
#[derive(Clone)]
pub struct Handle {
    stop: Arc<AtomicBool>,
    ledgers: Vec<Arc<Ledger>>,
}

impl Handle {
    /// Ends the run with [`Outcome::Stopped`](crate::Outcome::Stopped).
    pub fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
    }

    /// One ledger a vCPU, readable while they run.
    pub fn ledgers(&self) -> &[Arc<Ledger>] {
        &self.ledgers
    }
}
