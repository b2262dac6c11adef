//! CPUID as data.

use std::collections::BTreeMap;

/// What one CPUID leaf returns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cpuid {
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
}

/// Everything CPUID answers on one vCPU. Leaves the guest's own control bits change (OSXSAVE, the XSAVE sizes) are
/// corrected by the engine when it answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuidTable {
    leaves: BTreeMap<(u32, u32), Cpuid>,
}

impl CpuidTable {
    /// Sets one leaf. Leaves without subleaves are stored at subleaf 0.
    pub fn set(&mut self, leaf: u32, subleaf: u32, value: Cpuid) {
        self.leaves.insert((leaf, subleaf), value);
    }

    /// Takes a leaf out, with all its subleaves.
    pub fn remove(&mut self, leaf: u32) {
        self.leaves.retain(|key, _| key.0 != leaf);
    }

    /// One leaf exactly as stored.
    pub fn get(&self, leaf: u32, subleaf: u32) -> Option<Cpuid> {
        self.leaves.get(&(leaf, subleaf)).copied()
    }

    /// All leaves in order, `(leaf, subleaf)` first.
    pub fn iter(&self) -> impl Iterator<Item = ((u32, u32), Cpuid)> + '_ {
        self.leaves.iter().map(|(key, value)| (*key, *value))
    }
}
