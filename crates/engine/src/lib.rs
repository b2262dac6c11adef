//! What a CPU engine is, whichever way it runs guest code.
//!
//! ```text
//!                  ┌───────────────── CpuIo (port, mmio, msr, hypercall: answered, the vCPU carries on)
//!   Vcpu::run ─────┤
//!                  └──> Exit (halted, waiting, yielded, stopped, reset, shutdown: the scheduler decides)
//!
//!   Signal: how everyone else reaches a running or sleeping vCPU (interrupt, NMI, INIT, SIPI, stop)
//! ```
//!
//! Engines (`translator`, `kvm`) implement [`Engine`] and [`Vcpu`]; `machine` implements [`CpuIo`]. Engines never see
//! devices.

pub mod cpu_model;
mod exit;
mod io;
pub mod ledger;
pub mod profile;
mod signal;
pub mod state;
mod tsc;

pub use cpu_model::{Cpuid, CpuidTable};
pub use exit::Exit;
pub use io::{Answer, CpuIo, HypercallArgs, MsrRefused};
pub use ledger::{Cause, Ledger};
pub use profile::{Phase, Profile};
pub use signal::{Signal, Signals};
pub use state::CpuState;
pub use tsc::GuestTsc;

/// Which vCPU of a VM, counted from 0; also its initial x2APIC id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VcpuId(pub u32);

/// Why an engine could not do what was asked of it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The engine does not work on this host.
    #[error("the {engine} engine is not usable here: {reason}")]
    Unusable {
        /// The engine's name.
        engine: &'static str,
        /// What is missing, and what to do.
        reason: String,
    },
    /// The host refused a resource.
    #[error("the host refused {what}: {source}")]
    Host {
        /// The resource.
        what: &'static str,
        /// What the host said.
        source: std::io::Error,
    },
    /// The state handed to a vCPU cannot exist on a processor.
    #[error("impossible processor state: {0}")]
    State(String),
}

/// What every vCPU is made with.
#[derive(Clone)]
pub struct VcpuConfig {
    /// Which one it is.
    pub id: VcpuId,
    /// What CPUID answers; features absent here are refused on use.
    pub cpuid: std::sync::Arc<CpuidTable>,
    /// How others reach it.
    pub signal: std::sync::Arc<Signal>,
    /// Where its exits are counted.
    pub ledger: std::sync::Arc<Ledger>,
    /// Its time-stamp counter.
    pub tsc: std::sync::Arc<GuestTsc>,
}

/// A way of running guest code.
pub trait Engine: Send + Sync {
    /// "translate" or "kvm".
    fn name(&self) -> &'static str;

    /// Makes a vCPU in the state after RESET (Intel SDM vol. 3A, table 10-1).
    ///
    /// # Errors
    /// [`Error::Host`] where the host refuses what the engine needs for it.
    fn vcpu(&self, config: VcpuConfig) -> Result<Box<dyn Vcpu>, Error>;
}

/// One virtual processor: state that a thread can run. It may move between threads, but never runs on two.
pub trait Vcpu: Send {
    /// Runs guest code until something that the caller must decide on.
    fn run(&mut self, io: &mut dyn CpuIo) -> Exit;

    /// The value for RAX that a hypercall waited for. After [`Exit::Waiting`], before the next run; not where the state
    /// has been loaded anew meanwhile.
    fn answer(&mut self, value: u64);

    /// What [`Exit::Difference`] was about, for people; once.
    fn difference(&mut self) -> Option<String> {
        None
    }

    /// The architectural state. Only between runs.
    fn save(&mut self) -> Box<CpuState>;

    /// Replaces the architectural state. Only between runs.
    ///
    /// # Errors
    /// [`Error::State`] where no processor could be in that state.
    fn load(&mut self, state: &CpuState) -> Result<(), Error>;
}
