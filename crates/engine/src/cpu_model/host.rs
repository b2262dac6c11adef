//! What the host's processor can execute for a guest.

use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::collections::BTreeSet;

use super::{Cpuid, CpuidTable, FEATURES, Feature, Provider};

/// Features that need the host's operating system to have turned XSAVE on.
const XSAVE_FAMILY: [Feature; 4] = [Feature::Xsave, Feature::Xsaveopt, Feature::Xsavec, Feature::Xgetbv1];

/// Features that need the host's operating system to keep the upper halves of the YMM registers.
const AVX_FAMILY: [Feature; 6] =
    [Feature::Avx, Feature::Avx2, Feature::Fma, Feature::F16c, Feature::Vaes, Feature::Vpclmulqdq];

/// The leaves that hold features of [`Provider::Host`] and of the engine.
const LEAVES: [(u32, u32); 8] =
    [(0x1, 0), (0x6, 0), (0x7, 0), (0xd, 1), (0x8000_0001, 0), (0x8000_0007, 0), (0x8000_0008, 0), (0x8000_0021, 0)];

/// The part of the host's processor that models depend on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostCpu {
    features: BTreeSet<Feature>,
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
        Self { features }
    }

    /// True where guests can be given the feature on this host.
    pub fn can(&self, feature: Feature) -> bool {
        feature.bit().provider == Provider::Engine || self.features.contains(&feature)
    }
}

#[cfg(test)]
impl HostCpu {
    /// A host that has `features` and nothing else.
    pub(super) fn of(features: impl IntoIterator<Item = Feature>) -> Self {
        Self { features: features.into_iter().collect() }
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
    fn this_host_is_an_x86_64() {
        assert!(HostCpu::read().can(Feature::Cx16));
    }
}
