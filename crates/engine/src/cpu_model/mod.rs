//! CPU models: what CPUID answers, as a table a person can read.

mod table;

pub use table::{Cpuid, CpuidTable};
