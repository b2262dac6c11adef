//! What the host's processor can execute for a guest.

use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::collections::BTreeSet;

use super::{Cpuid, CpuidTable, FEATURES, Feature, Provider, Register};

/// Features that need the host's operating system to have turned XSAVE on.
const XSAVE_FAMILY: [Feature; 4] = [Feature::Xsave, Feature::Xsaveopt, Feature::Xsavec, Feature::Xgetbv1];

/// Features that need the host's operating system to keep the upper halves of the YMM registers.
const AVX_FAMILY: [Feature; 6] =
    [Feature::Avx, Feature::Avx2, Feature::Fma, Feature::F16c, Feature::Vaes, Feature::Vpclmulqdq];

/// The leaves that hold features of [`Provider::Host`] and of the engine.
const LEAVES: [(u32, u32); 8] =
    [(0x1, 0), (0x6, 0), (0x7, 0), (0xd, 1), (0x8000_0001, 0), (0x8000_0007, 0), (0x8000_0008, 0), (0x8000_0021, 0)];

/// Speculation controls, and what a processor says of its being open to speculative attacks: `(leaf, subleaf, register,
/// bits)`. Intel SDM vol. 2A, CPUID; AMD APM vol. 3, appendix E; Linux, arch/x86/include/asm/cpufeatures.h.
const SPECULATION: [(u32, u32, Register, u32); 3] = [
    // MD_CLEAR, IBRS and IBPB, STIBP, L1D_FLUSH, ARCH_CAPABILITIES, SSBD.
    (0x7, 0, Register::Edx, 1 << 10 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 29 | 1 << 31),
    // IBPB, IBRS, STIBP, their always-on and preferred forms, SSBD, VIRT_SSBD, PSFD, IBPB_RET.
    (0x8000_0008, 0, Register::Ebx, 1 << 12 | 0x1f << 14 | 3 << 24 | 1 << 28 | 1 << 30),
    // VERW clears, SBPB, IBPB_BRTYPE.
    (0x8000_0021, 0, Register::Eax, 1 << 5 | 3 << 27),
];

/// The part of the host's processor that models depend on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostCpu {
    features: BTreeSet<Feature>,
    /// What CPUID can answer at most, where guest code runs on the processor itself.
    hardware: Option<CpuidTable>,
}

impl HostCpu {
    /// Asks the processor this runs on.
    pub fn read() -> Self {
        let mut table = CpuidTable::default();
        let (basic, extended) = (__cpuid(0).eax, __cpuid(0x8000_0000).eax);
        for (leaf, subleaf) in LEAVES {
            let highest = if leaf < 0x8000_0000 { basic } else { extended };
            if leaf <= highest {
                let r = __cpuid_count(leaf, subleaf);
                table.set(leaf, subleaf, Cpuid { eax: r.eax, ebx: r.ebx, ecx: r.ecx, edx: r.edx });
            }
        }
        // The standard library also looks at XCR0: has the operating system turned the registers on?
        Self::with(&table, std::is_x86_feature_detected!("xsave"), std::is_x86_feature_detected!("avx"))
    }

    /// A host that answers CPUID with `table` and whose operating system keeps `xsave` and `avx` state.
    fn with(table: &CpuidTable, xsave: bool, avx: bool) -> Self {
        let kept =
            |feature| (xsave || !XSAVE_FAMILY.contains(&feature)) && ((xsave && avx) || !AVX_FAMILY.contains(&feature));
        let features = FEATURES
            .iter()
            .filter(|bit| bit.provider == Provider::Host && table.has(bit.feature) && kept(bit.feature))
            .map(|bit| bit.feature)
            .collect();
        Self { features, hardware: None }
    }

    /// A processor that guest code runs on itself: it has what CPUID shows in `table`, and an engine adds nothing.
    pub fn hardware(table: CpuidTable) -> Self {
        let features = FEATURES.iter().map(|bit| bit.feature).filter(|&feature| table.has(feature)).collect();
        Self { features, hardware: Some(table) }
    }

    /// True where guests can be given the feature on this host.
    pub fn can(&self, feature: Feature) -> bool {
        let by_engine = self.hardware.is_none() && feature.bit().provider == Provider::Engine;
        by_engine || self.features.contains(&feature)
    }

    /// True where guest code runs on the processor itself.
    pub fn is_hardware(&self) -> bool {
        self.hardware.is_some()
    }

    /// Vendor (leaf 0) and signature (leaf 1, EAX) that guests see whatever the model: those of the processor that guest
    /// code runs on, by which a guest's kernel knows which faults to work around.
    pub(super) fn identity(&self) -> Option<(Cpuid, u32)> {
        self.hardware.as_ref().map(|table| (table.answer(0, 0), table.answer(1, 0).eax))
    }

    /// Bits of a physical address at most.
    pub(super) fn physical_bits(&self) -> u32 {
        self.hardware.as_ref().map_or(52, CpuidTable::physical_bits)
    }

    /// Passes on how the processor's speculation is held back: a fact about the host, whatever the model.
    pub(super) fn show_speculation(&self, table: &mut CpuidTable) {
        let Some(hardware) = &self.hardware else { return };
        for (leaf, subleaf, register, bits) in SPECULATION {
            let shown = *hardware.answer(leaf, subleaf).register(register) & bits;
            table.update(leaf, subleaf, |answer| *answer.register(register) |= shown);
        }
    }
}

#[cfg(test)]
impl HostCpu {
    /// A host that has `features` and nothing else.
    pub(super) fn of(features: impl IntoIterator<Item = Feature>) -> Self {
        Self { features: features.into_iter().collect(), hardware: None }
    }

    /// A host that has everything.
    pub(super) fn full() -> Self {
        Self::of(FEATURES.iter().map(|bit| bit.feature))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_feature_is_read() {
        for bit in FEATURES {
            assert!(LEAVES.contains(&(bit.leaf, bit.subleaf)), "{} is in a leaf that is never read", bit.name);
        }
    }

    #[test]
    fn the_engine_needs_nothing_of_the_host_for_system_features() {
        let bare = HostCpu::of([]);
        assert!(bare.can(Feature::Pcid));
        assert!(!bare.can(Feature::Avx2));
    }

    #[test]
    fn registers_the_operating_system_does_not_keep_are_not_offered() {
        let mut table = CpuidTable::default();
        for bit in FEATURES {
            table.set_feature(bit.feature, true);
        }
        let all = HostCpu::with(&table, true, true);
        assert!(all.can(Feature::Xsave) && all.can(Feature::Avx) && all.can(Feature::Sse42));
        let no_avx = HostCpu::with(&table, true, false);
        assert!(no_avx.can(Feature::Xsave) && !no_avx.can(Feature::Fma) && no_avx.can(Feature::Sse42));
        let neither = HostCpu::with(&table, false, false);
        assert!(!neither.can(Feature::Xsavec) && !neither.can(Feature::Avx2) && neither.can(Feature::Sse42));
    }

    #[test]
    fn an_engine_adds_nothing_to_hardware() {
        let mut table = CpuidTable::default();
        table.set_feature(Feature::Avx2, true);
        let host = HostCpu::hardware(table);
        assert!(host.is_hardware() && host.can(Feature::Avx2) && !host.can(Feature::Pcid));
    }

    #[test]
    fn speculation_is_told_as_the_hardware_tells_it_and_nothing_else_is() {
        let mut table = CpuidTable::default();
        let all = Cpuid { eax: !0, ebx: !0, ecx: !0, edx: !0 };
        [0x7, 0x8000_0008, 0x8000_0021].into_iter().for_each(|leaf| table.set(leaf, 0, all));
        let mut shown = CpuidTable::default();
        HostCpu::hardware(table).show_speculation(&mut shown);
        assert_eq!(shown.answer(7, 0), Cpuid { edx: 0xbc00_0400, ..Cpuid::default() });
        assert_eq!(shown.answer(0x8000_0008, 0), Cpuid { ebx: 0x5307_d000, ..Cpuid::default() });
        assert_eq!(shown.answer(0x8000_0021, 0), Cpuid { eax: 0x1800_0020, ..Cpuid::default() });
        let known = FEATURES.iter().filter(|bit| shown.has(bit.feature)).count();
        assert_eq!(known, 0, "features of models are the models' to show");
        let mut translated = CpuidTable::default();
        HostCpu::read().show_speculation(&mut translated);
        assert_eq!(translated, CpuidTable::default());
    }

    #[test]
    fn this_host_is_an_x86_64() {
        assert!(HostCpu::read().can(Feature::Cx16));
    }
}
