//! The named models.
//!
//! A name means the same processor on every host and engine, so it can be written down, snapshotted and migrated; a
//! host that lacks part of it is refused by name. Only [`DEFAULT`] follows the host. The levels v1..v3 are those of
//! the x86-64 psABI, section 3.1.1, with the system features that Cordial's engine gives on any host.

use super::{CpuidTable, Feature, HostCpu, leaves};

/// The model used where nobody asks for one: everything that the engine and the host can do.
pub const DEFAULT: &str = "max";

/// What every x86-64 processor has.
const BASELINE: &[Feature] = {
    use Feature::*;
    &[
        Fpu, De, Pse, Tsc, Msr, Pae, Mce, Cx8, Apic, Sep, Mtrr, Pge, Mca, Cmov, Pat, Pse36, Clflush, Mmx, Fxsr, Sse,
        Sse2, Syscall, Nx, Mmxext, Lm,
    ]
};

/// What the engine provides by itself, and Linux is better off with.
const SYSTEM: &[Feature] = {
    use Feature::*;
    &[
        Hypervisor,
        X2apic,
        TscDeadline,
        TscAdjust,
        Arat,
        Pcid,
        Invpcid,
        Pdpe1gb,
        Fsgsbase,
        Rdtscp,
        Rdpid,
        Erms,
        Fsrm,
        Serialize,
        LahfLm,
        Cr8Legacy,
        Prefetchw,
        Topoext,
        LfenceRdtsc,
        NullSelBase,
    ]
};

/// Processor faults that the guest need not work around: its branches do not run on predictors that other privilege
/// levels train in the way these faults need. What isolation a guest may and may not expect: docs/security.md.
const NOT_VULNERABLE: &[Feature] = {
    use Feature::*;
    &[SsbNo, BtcNo, AutoIbrs, SrsoNo, TsaSqNo, TsaL1No]
};

/// Protection of the kernel against itself.
const HARDENING: &[Feature] = {
    use Feature::*;
    &[Smep, Smap, Umip]
};

/// psABI level 2 beyond [`BASELINE`] and [`SYSTEM`].
const LEVEL_2: &[Feature] = {
    use Feature::*;
    &[Cx16, Popcnt, Sse3, Ssse3, Sse41, Sse42]
};

/// psABI level 3 beyond level 2.
const LEVEL_3: &[Feature] = {
    use Feature::*;
    &[Xsave, Avx, Avx2, Bmi1, Bmi2, F16c, Fma, Abm, Movbe]
};

/// What no level asks for.
const BEYOND: &[Feature] = {
    use Feature::*;
    &[Aes, Pclmulqdq, Sha, Gfni, Vaes, Vpclmulqdq, Adx, Rdrand, Rdseed, Clflushopt, Xsaveopt, Xsavec, Xgetbv1]
};

/// Facts about the host that change no instruction's result.
const HOST_FACTS: &[Feature] = &[Feature::Invtsc, Feature::Xsaveerptr];

/// True where a guest that runs on the processor itself has what that has, whatever the model: how vulnerable it is, what
/// only its kernel uses, and what only AMD's processors tell. Programs rely on the rest.
fn is_the_hosts(feature: Feature) -> bool {
    let system = SYSTEM.contains(&feature) && feature != Feature::LahfLm; // which psABI level 2 has
    system || NOT_VULNERABLE.contains(&feature) || feature == Feature::Mmxext
}

/// A processor with a name.
#[derive(Debug, PartialEq, Eq)]
pub struct Model {
    /// How users ask for it.
    pub name: &'static str,
    /// What it is, in a few words.
    pub summary: &'static str,
    /// The vendor string of leaves 0 and 0x80000000.
    pub vendor: [u8; 12],
    /// Display family: base plus extended.
    pub family: u8,
    /// Display model: extended and base.
    pub model: u8,
    /// Stepping, 0..=15.
    pub stepping: u8,
    /// Features that it always has.
    pub requires: &'static [&'static [Feature]],
    /// Features that it has where the host does.
    pub offers: &'static [&'static [Feature]],
}

/// What all models share. Linux knows family 19h model 11h as Zen 4: it expects AutoIBRS there, and knows no erratum
/// that needs an MSR of ours.
const ZEN: Model = Model {
    name: "",
    summary: "",
    vendor: *b"AuthenticAMD",
    family: 0x19,
    model: 0x11,
    stepping: 1,
    requires: &[],
    offers: &[],
};

static MODELS: [Model; 4] = [
    Model {
        name: DEFAULT,
        summary: "everything that this host and the engine can do",
        requires: &[BASELINE, SYSTEM, NOT_VULNERABLE, HARDENING],
        offers: &[LEVEL_2, LEVEL_3, BEYOND, HOST_FACTS],
        ..ZEN
    },
    Model {
        name: "x86-64-v1",
        summary: "any 64-bit processor: SSE2",
        requires: &[BASELINE, SYSTEM, NOT_VULNERABLE],
        offers: &[HOST_FACTS],
        ..ZEN
    },
    Model {
        name: "x86-64-v2",
        summary: "2009 and later: SSE4.2, POPCNT, CMPXCHG16B",
        requires: &[BASELINE, SYSTEM, NOT_VULNERABLE, LEVEL_2],
        offers: &[HOST_FACTS],
        ..ZEN
    },
    Model {
        name: "x86-64-v3",
        summary: "2013 and later: AVX2, BMI, FMA",
        requires: &[BASELINE, SYSTEM, NOT_VULNERABLE, LEVEL_2, LEVEL_3],
        offers: &[HOST_FACTS],
        ..ZEN
    },
];

/// A model asks for what the host's processor does not have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("CPU model {model} needs {} that this host's processor does not have; {DEFAULT} fits every host", features.join(", "))]
pub struct MissingFeatures {
    /// The model.
    pub model: &'static str,
    /// Names of the missing features.
    pub features: Vec<&'static str>,
}

/// The model called `name`.
pub fn lookup(name: &str) -> Option<&'static Model> {
    MODELS.iter().find(|model| model.name == name)
}

/// The names of all models, the default first.
pub fn names() -> impl Iterator<Item = &'static str> {
    MODELS.iter().map(|model| model.name)
}

impl Model {
    /// What CPUID answers on vCPU `vcpu` of `vcpus`, on this host.
    ///
    /// # Errors
    /// [`MissingFeatures`] where the host's processor lacks part of the model.
    pub fn table(&self, host: &HostCpu, vcpu: u32, vcpus: u32) -> Result<CpuidTable, MissingFeatures> {
        let required = || self.requires.iter().copied().flatten().copied();
        let spared = |feature| host.is_hardware() && (self.name == DEFAULT || is_the_hosts(feature));
        let missing = required().filter(|&feature| !host.can(feature) && !spared(feature));
        let features: Vec<_> = missing.map(Feature::name).collect();
        if !features.is_empty() {
            return Err(MissingFeatures { model: self.name, features });
        }
        let mut table = CpuidTable::default();
        let offered = required().chain(self.offers.iter().copied().flatten().copied());
        for feature in offered.filter(|&feature| host.can(feature)) {
            table.set_feature(feature, true);
        }
        host.show_speculation(&mut table);
        leaves::complete(&mut table, self, host, vcpu, vcpus);
        Ok(table)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Cpuid;
    use super::*;
    use std::collections::BTreeSet;

    fn features(model: &Model) -> BTreeSet<Feature> {
        model.requires.iter().chain(model.offers).copied().flatten().copied().collect()
    }

    #[test]
    fn names_lead_to_their_models() {
        assert_eq!(names().collect::<Vec<_>>(), ["max", "x86-64-v1", "x86-64-v2", "x86-64-v3"]);
        for name in names() {
            assert_eq!(lookup(name).map(|model| model.name), Some(name));
        }
        assert_eq!(lookup("486"), None);
    }

    #[test]
    fn a_model_names_each_feature_once() {
        for model in &MODELS {
            let listed = model.requires.iter().chain(model.offers).map(|group| group.len()).sum::<usize>();
            assert_eq!(features(model).len(), listed, "{}", model.name);
        }
    }

    #[test]
    fn max_has_every_feature_there_is() {
        let max = features(lookup(DEFAULT).unwrap());
        let missing: Vec<_> = super::super::FEATURES.iter().filter(|bit| !max.contains(&bit.feature)).collect();
        // CMP_LEGACY belongs to the topology, not to the model.
        assert_eq!(missing, [Feature::CmpLegacy.bit()]);
    }

    #[test]
    fn levels_contain_the_lower_levels() {
        let [_, v1, v2, v3] = &MODELS;
        assert!(features(v1).is_subset(&features(v2)));
        assert!(features(v2).is_subset(&features(v3)));
    }

    #[test]
    fn max_fits_every_host() {
        let table = lookup("max").unwrap().table(&HostCpu::of([]), 0, 1).unwrap();
        assert!(table.has(Feature::Smap));
        assert!(!table.has(Feature::Avx2));
        assert!(lookup("max").unwrap().table(&HostCpu::read(), 0, 1).is_ok());
    }

    /// A processor as KVM may show it: an Intel one of 39 bits, with less than any model asks for.
    fn hardware(features: impl IntoIterator<Item = Feature>) -> HostCpu {
        let mut table = CpuidTable::default();
        table.set(0, 0, Cpuid { eax: 0x1f, ebx: 0x756e_6547, ecx: 0x6c65_746e, edx: 0x4965_6e69 });
        table.set(1, 0, Cpuid { eax: 0x000a_0655, ..Cpuid::default() });
        table.set(0x8000_0008, 0, Cpuid { eax: 0x3027, ..Cpuid::default() });
        features.into_iter().for_each(|feature| table.set_feature(feature, true));
        HostCpu::hardware(table)
    }

    #[test]
    fn on_hardware_the_default_follows_the_host_in_everything() {
        let host = hardware(BASELINE.iter().copied().chain([Feature::Sse42, Feature::Smep]));
        let table = lookup("max").unwrap().table(&host, 0, 1).unwrap();
        assert!(table.has(Feature::Sse42) && table.has(Feature::Smep));
        assert!(!table.has(Feature::Smap) && !table.has(Feature::SrsoNo) && !table.has(Feature::Pcid));
        assert_eq!((table.answer(0, 0).ebx, table.answer(1, 0).eax), (0x756e_6547, 0x000a_0655));
        assert_eq!(table.answer(0x8000_0000, 0).ecx, 0x6c65_746e);
        assert_eq!(table.physical_bits(), 39);
    }

    #[test]
    fn on_hardware_a_named_model_is_whole_and_no_less_vulnerable_than_the_host() {
        let v1 = BASELINE.iter().copied().filter(|feature| *feature != Feature::Mmxext);
        let v2 = v1.clone().chain(LEVEL_2.iter().copied()).chain([Feature::LahfLm, Feature::SsbNo, Feature::Pcid]);
        let table = lookup("x86-64-v2").unwrap().table(&hardware(v2.clone()), 0, 1).unwrap();
        assert!(table.has(Feature::SsbNo) && !table.has(Feature::BtcNo));
        assert!(table.has(Feature::Pcid) && !table.has(Feature::Topoext) && !table.has(Feature::Mmxext));
        for lost in [Feature::Sse42, Feature::LahfLm, Feature::Nx] {
            let host = hardware(v2.clone().filter(|feature| *feature != lost));
            let error = lookup("x86-64-v2").unwrap().table(&host, 0, 1).unwrap_err();
            assert_eq!(error.features, [lost.name()]);
        }
    }

    #[test]
    fn a_host_that_lacks_something_is_told_what() {
        let host = HostCpu::of([LEVEL_2, LEVEL_3].into_iter().flatten().copied().filter(|f| *f != Feature::Avx2));
        let error = lookup("x86-64-v3").unwrap().table(&host, 0, 1).unwrap_err();
        assert_eq!(error, MissingFeatures { model: "x86-64-v3", features: vec!["avx2"] });
        assert_eq!(
            error.to_string(),
            "CPU model x86-64-v3 needs avx2 that this host's processor does not have; max fits every host"
        );
        assert!(lookup("x86-64-v2").unwrap().table(&host, 0, 1).is_ok());
    }

    #[test]
    fn an_explicit_model_hides_what_the_host_has_beyond_it() {
        let table = lookup("x86-64-v2").unwrap().table(&HostCpu::full(), 0, 1).unwrap();
        assert!(table.has(Feature::Sse42) && table.has(Feature::Invtsc));
        assert!(!table.has(Feature::Avx) && !table.has(Feature::Xsave) && !table.has(Feature::Smap));
    }
}
