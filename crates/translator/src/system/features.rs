//! What the CPU model offers, resolved once per vCPU: what it does not offer is refused on use.

use engine::CpuidTable;

/// Features handlers ask about.
#[derive(Clone, Debug, Default)]
pub(crate) struct Features {
    /// 1 GiB pages.
    pub pages_1g: bool,
}

impl Features {
    pub(crate) fn new(cpuid: &CpuidTable) -> Self {
        let extended = cpuid.get(0x8000_0001, 0).unwrap_or_default();
        Self { pages_1g: extended.edx & 1 << 26 != 0 }
    }
}
