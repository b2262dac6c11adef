//! CPUID as data.

use std::collections::BTreeMap;

use super::{Feature, Register};

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

impl Cpuid {
    /// One of the registers.
    pub(super) fn register(&mut self, register: Register) -> &mut u32 {
        match register {
            Register::Eax => &mut self.eax,
            Register::Ebx => &mut self.ebx,
            Register::Ecx => &mut self.ecx,
            Register::Edx => &mut self.edx,
        }
    }
}

/// Leaves that look at ECX; all others answer the same for every subleaf.
const WITH_SUBLEAVES: [u32; 5] = [0x4, 0x7, TOPOLOGY, 0xd, 0x8000_001d];

/// The leaf that returns the subleaf and the x2APIC id whatever the subleaf.
const TOPOLOGY: u32 = 0xb;

/// Everything CPUID answers on one vCPU. Leaves the guest's own control bits change (OSXSAVE, APIC, the XSAVE sizes)
/// are corrected by the engine when it answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuidTable {
    leaves: BTreeMap<(u32, u32), Cpuid>,
}

impl CpuidTable {
    /// Sets one leaf. Leaves without subleaves are stored at subleaf 0.
    pub fn set(&mut self, leaf: u32, subleaf: u32, value: Cpuid) {
        self.leaves.insert((leaf, subleaf), value);
    }

    /// Changes one leaf, which is all zero where it was not there.
    pub(super) fn update(&mut self, leaf: u32, subleaf: u32, change: impl FnOnce(&mut Cpuid)) {
        change(self.leaves.entry((leaf, subleaf)).or_default());
    }

    /// Takes a leaf out, with all its subleaves.
    pub fn remove(&mut self, leaf: u32) {
        self.leaves.retain(|key, _| key.0 != leaf);
    }

    /// One leaf exactly as stored.
    pub fn get(&self, leaf: u32, subleaf: u32) -> Option<Cpuid> {
        self.leaves.get(&(leaf, subleaf)).copied()
    }

    /// True where `leaf` answers by subleaf.
    pub fn has_subleaves(leaf: u32) -> bool {
        WITH_SUBLEAVES.contains(&leaf)
    }

    /// What the instruction returns for EAX = `leaf` and ECX = `subleaf`. Leaves nobody set are all zero, as on AMD.
    pub fn answer(&self, leaf: u32, subleaf: u32) -> Cpuid {
        let stored = if Self::has_subleaves(leaf) { subleaf } else { 0 };
        match self.get(leaf, stored) {
            Some(value) => value,
            // Intel SDM vol. 2A, CPUID, leaf 0Bh: ECX[7:0] and EDX are valid past the last level too.
            None if leaf == TOPOLOGY => {
                let x2apic_id = self.get(TOPOLOGY, 0).unwrap_or_default().edx;
                Cpuid { ecx: subleaf & 0xff, edx: x2apic_id, ..Cpuid::default() }
            }
            None => Cpuid::default(),
        }
    }

    /// True where the table shows the feature.
    pub fn has(&self, feature: Feature) -> bool {
        let bit = feature.bit();
        let mut leaf = self.get(bit.leaf, bit.subleaf).unwrap_or_default();
        *leaf.register(bit.register) >> bit.bit & 1 != 0
    }

    /// Shows or hides a feature.
    pub fn set_feature(&mut self, feature: Feature, present: bool) {
        let bit = feature.bit();
        self.update(bit.leaf, bit.subleaf, |leaf| {
            let register = leaf.register(bit.register);
            *register = *register & !(1 << bit.bit) | u32::from(present) << bit.bit;
        });
    }

    /// Bits of a physical address, 32..=52: those above are reserved in page tables. 36 where nothing says it.
    pub fn physical_bits(&self) -> u32 {
        self.get(0x8000_0008, 0).map_or(36, |leaf| (leaf.eax & 0xff).clamp(32, 52))
    }

    /// All leaves in order, `(leaf, subleaf)` first.
    pub fn iter(&self) -> impl Iterator<Item = ((u32, u32), Cpuid)> + '_ {
        self.leaves.iter().map(|(key, value)| (*key, *value))
    }
}

#[cfg(test)]
mod tests {
    use super::super::FEATURES;
    use super::*;

    #[test]
    fn features_come_and_go_alone() {
        for bit in FEATURES {
            let mut table = CpuidTable::default();
            table.set_feature(bit.feature, true);
            let shown: Vec<_> = FEATURES.iter().filter(|other| table.has(other.feature)).collect();
            assert_eq!(shown, [bit]);
            table.set_feature(bit.feature, false);
            assert!(!table.has(bit.feature));
        }
    }

    #[test]
    fn leaves_without_subleaves_ignore_ecx() {
        let mut table = CpuidTable::default();
        table.set(1, 0, Cpuid { eax: 5, ..Cpuid::default() });
        table.set(7, 0, Cpuid { eax: 6, ..Cpuid::default() });
        assert_eq!(table.answer(1, 9).eax, 5);
        assert_eq!(table.answer(7, 9).eax, 0);
        assert_eq!(table.answer(0x1234, 0), Cpuid::default());
    }

    #[test]
    fn topology_echoes_unknown_levels() {
        let mut table = CpuidTable::default();
        table.set(0xb, 0, Cpuid { edx: 3, ..Cpuid::default() });
        assert_eq!(table.answer(0xb, 0x107), Cpuid { ecx: 7, edx: 3, ..Cpuid::default() });
    }

    #[test]
    fn address_width_is_always_possible() {
        let mut table = CpuidTable::default();
        assert_eq!(table.physical_bits(), 36);
        table.set(0x8000_0008, 0, Cpuid { eax: 0xff, ..Cpuid::default() });
        assert_eq!(table.physical_bits(), 52);
    }
}
