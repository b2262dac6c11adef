//! CPU models: what CPUID answers, as tables a person can read.
//!
//! ```text
//!   features.rs  every feature bit, once: name -> leaf, register, bit, who makes it work
//!        │
//!   models.rs    named sets of features; the same name means the same processor on every engine
//!        │              host.rs  what this host's processor executes natively
//!        ▼                 │
//!   leaves.rs  ◄───────────┘   identity, caches, topology, XSAVE layout
//!        │
//!        ▼
//!   table.rs   CpuidTable: what one vCPU answers, and what its engine enforces
//! ```
//!
//! Paravirtual leaves (0x4000_0000 and up) are not part of a model: the machine adds them with [`CpuidTable::set`].

mod features;
mod host;
mod leaves;
mod models;
mod table;

pub use features::{FEATURES, Feature, FeatureBit, Provider, Register};
pub use host::HostCpu;
pub use models::{DEFAULT, MissingFeatures, Model, lookup, names};
pub use table::{Cpuid, CpuidTable};
