//! The engine that needs no hardware help.
//!
//! ```text
//!                ┌─translate─> host code ──┬─ the processor's registers, flags and vectors
//!   guest bytes ─┤                         └─ callbacks ─┬─> mmu: soft TLB, page walks
//!                └─decode─> Block of Ops ─run─> handlers ┴─> CpuState; CpuIo: ports, MMIO, MSRs
//! ```
//!
//! Two tiers of one engine: the translator (`jit`) runs 64-bit code, the interpreter everything else and each instruction
//! the translator leaves to it. They share state, MMU, code tracking and handlers.
//!
//! Rooms: `op` is what a decoded instruction is; `decode` makes them; `block` keeps them; `jit` translates; `home` is where
//! both find a vCPU's state; `arena` is memory for code; `mmu` is memory as the guest sees it; `exec` the integer
//! instructions; `vector` x87, SSE and AVX; `system` everything privileged; `run` the loop; `shared` what the vCPUs of
//! one VM owe each other.
#![allow(unsafe_code)] // the fence: guest memory by pointer, native stubs

mod arena;
#[cfg(test)]
mod bare;
mod block;
mod config;
mod cpu;
mod decode;
mod exec;
mod flags;
mod home;
mod jit;
mod lockstep;
mod mmu;
mod offered;
mod op;
#[cfg(test)]
mod oracle;
#[cfg(test)]
mod random;
mod run;
mod shared;
mod system;
mod trap;
mod vector;
mod width;

use std::sync::Arc;

use engine::{Engine, Error, Vcpu, VcpuConfig};
use memory::GuestRam;

use crate::shared::Shared;

pub use crate::config::{Check, Config, LEAST_CODE_CACHE, MOST_CODE_CACHE};

/// The translating engine for one VM.
pub struct Translator {
    shared: Arc<Shared>,
}

impl Translator {
    /// An engine whose vCPUs run in `ram`.
    pub fn new(ram: GuestRam, config: Config) -> Self {
        Self { shared: Arc::new(Shared::new(ram, config)) }
    }
}

impl Engine for Translator {
    fn name(&self) -> &'static str {
        "translate"
    }

    fn vcpu(&self, config: VcpuConfig) -> Result<Box<dyn Vcpu>, Error> {
        Ok(Box::new(run::Runner::new(Arc::clone(&self.shared), config)?))
    }
}
