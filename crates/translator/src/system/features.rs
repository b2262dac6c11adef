//! What the CPU model offers, resolved once per vCPU: what it does not offer is refused on use.

use engine::CpuidTable;
use engine::cpu_model::{FEATURES, Feature};
use engine::state::{cr4, efer};

/// Features handlers ask about.
#[derive(Clone, Debug, Default)]
pub(crate) struct Features {
    /// 1 GiB pages.
    pub pages_1g: bool,
    /// IA-32e mode.
    pub long_mode: bool,
    /// STAC, CLAC and CR4.SMAP.
    pub smap: bool,
    /// INVPCID.
    pub invpcid: bool,
    /// IA32_TSC_ADJUST.
    pub tsc_adjust: bool,
    /// RDTSCP and IA32_TSC_AUX.
    pub rdtscp: bool,
    /// RDPID.
    pub rdpid: bool,
    /// SYSENTER and SYSEXIT.
    pub sysenter: bool,
    /// A hypervisor's leaves are there, so VMCALL and VMMCALL are answered.
    pub hypercalls: bool,
    /// Bits of a physical address.
    pub physical_bits: u32,
    /// CR4 bits that may be set.
    pub cr4_bits: u64,
    /// EFER bits that may be set, besides LMA.
    pub efer_bits: u64,
    /// One bit a [`Feature`], in the order of the enumeration.
    all: u128,
}

const _: () = assert!(FEATURES.len() <= 128);

impl Features {
    pub(crate) fn new(cpuid: &CpuidTable) -> Self {
        let has = |feature| cpuid.has(feature);
        let offered = FEATURES.iter().filter(|bit| has(bit.feature));
        let all = offered.fold(0, |all, bit| all | 1 << bit.feature as u32);
        let cr4_by_feature = [
            (Feature::Tsc, cr4::TSD),
            (Feature::De, cr4::DE),
            (Feature::Pse, cr4::PSE),
            (Feature::Pae, cr4::PAE),
            (Feature::Mce, cr4::MCE),
            (Feature::Pge, cr4::PGE),
            (Feature::Fxsr, cr4::OSFXSR),
            (Feature::Sse, cr4::OSXMMEXCPT),
            (Feature::Umip, cr4::UMIP),
            (Feature::Fsgsbase, cr4::FSGSBASE),
            (Feature::Pcid, cr4::PCIDE),
            (Feature::Xsave, cr4::OSXSAVE),
            (Feature::Smep, cr4::SMEP),
            (Feature::Smap, cr4::SMAP),
        ];
        let efer_by_feature = [
            (Feature::Syscall, efer::SCE),
            (Feature::Lm, efer::LME),
            (Feature::Nx, efer::NXE),
            (Feature::AutoIbrs, efer::AIBRSE),
        ];
        let bits = |table: &[(Feature, u64)]| {
            table.iter().filter(|(feature, _)| has(*feature)).fold(0, |all, (_, bits)| all | bits)
        };
        Self {
            pages_1g: has(Feature::Pdpe1gb),
            long_mode: has(Feature::Lm),
            smap: has(Feature::Smap),
            invpcid: has(Feature::Invpcid),
            tsc_adjust: has(Feature::TscAdjust),
            rdtscp: has(Feature::Rdtscp),
            rdpid: has(Feature::Rdpid),
            sysenter: has(Feature::Sep),
            hypercalls: cpuid.iter().any(|((leaf, _), _)| leaf >> 16 == 0x4000),
            physical_bits: cpuid.physical_bits(),
            cr4_bits: bits(&cr4_by_feature) | cr4::PCE,
            efer_bits: bits(&efer_by_feature),
            all,
        }
    }

    /// True where the CPU model offers the feature.
    pub(crate) fn has(&self, feature: Feature) -> bool {
        self.all >> feature as u32 & 1 != 0
    }
}
