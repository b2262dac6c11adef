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
mod kernel;
pub mod ledger;
pub mod profile;
mod signal;
pub mod state;
mod tsc;

pub use cpu_model::{Cpuid, CpuidTable, HostCpu};
pub use exit::{Doze, Exit};
pub use io::{Answer, CpuIo, HypercallArgs, MsrRefused};
pub use kernel::{Doorbells, KernelState, LocalApics, PendingEvent};
pub use ledger::{Cause, Ledger};
pub use profile::{Phase, Profile};
pub use signal::{Signal, Signals};
pub use state::CpuState;
pub use tsc::GuestTsc;

use std::sync::Arc;

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
    pub cpuid: Arc<CpuidTable>,
    /// How others reach it.
    pub signal: Arc<Signal>,
    /// Where its exits are counted.
    pub ledger: Arc<Ledger>,
    /// Its time-stamp counter.
    pub tsc: Arc<GuestTsc>,
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

    /// What a guest's processor can have on this engine.
    fn host_cpu(&self) -> HostCpu {
        HostCpu::read()
    }

    /// The local APICs, where the engine has its own: the machine makes none then, start-up IPIs and HLT included.
    fn local_apics(&self) -> Option<Arc<dyn LocalApics>> {
        None
    }

    /// Stores that are told without a callback, where the engine can do that.
    fn doorbells(&self) -> Option<Arc<dyn Doorbells>> {
        None
    }

    /// The port whose stores are hypercalls, on an engine that has no instruction to give away for them: the registers are
    /// those of a VMCALL.
    fn hypercall_port(&self) -> Option<u16> {
        None
    }

    /// Whether vCPUs sleep by [`Vcpu::doze`] while a hypercall waits. Asked only of an engine with local APICs of its own.
    fn dozes(&self) -> bool {
        false
    }

    /// The features of the kvm dialect (leaf 0x4000_0001, EAX) that the engine serves by itself; `None` where the machine
    /// has to.
    fn kvm_dialect(&self) -> Option<u32> {
        None
    }
}

/// One virtual processor: state that a thread can run. It may move between threads, but never runs on two.
pub trait Vcpu: Send {
    /// Runs guest code until something that the caller must decide on.
    fn run(&mut self, io: &mut dyn CpuIo) -> Exit;

    /// The value for RAX that a hypercall waited for. After [`Exit::Waiting`], before the next run; not where the state
    /// has been loaded anew meanwhile.
    fn answer(&mut self, value: u64);

    /// Sleeps while a hypercall waits, on an engine that has the local APIC, and so alone knows what can be delivered. After
    /// [`Exit::Waiting`], as often as needed before [`Vcpu::answer`]; no guest code runs. Looks before it sleeps.
    fn doze(&mut self, _io: &mut dyn CpuIo) -> Doze {
        Doze::Again
    }

    /// What [`Exit::Difference`] was about, for people; once.
    fn difference(&mut self) -> Option<String> {
        None
    }

    /// Why the engine could not go on, for people: what [`Exit::Failed`] was about; once.
    fn failure(&mut self) -> Option<String> {
        None
    }

    /// What the engine keeps of the vCPU beside its [`CpuState`]: `None` where it keeps nothing. Only between runs.
    fn save_kernel_state(&mut self) -> Option<KernelState> {
        None
    }

    /// Replaces that. Only between runs, after [`Vcpu::load`].
    ///
    /// # Errors
    /// [`Error::State`] where no processor could be in that state, or the engine keeps nothing.
    fn load_kernel_state(&mut self, _state: &KernelState) -> Result<(), Error> {
        Err(Error::State("this engine keeps nothing beside the processor's state".into()))
    }

    /// The vCPU has stood still, and time has not: an engine that serves the guest's clock by itself tells the guest. Only
    /// between runs.
    fn stopped(&mut self) {}

    /// The architectural state. Only between runs.
    fn save(&mut self) -> Box<CpuState>;

    /// Replaces the architectural state. Only between runs.
    ///
    /// # Errors
    /// [`Error::State`] where no processor could be in that state.
    fn load(&mut self, state: &CpuState) -> Result<(), Error>;
}
