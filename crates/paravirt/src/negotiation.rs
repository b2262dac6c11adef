//! What a guest is offered, as CPUID leaves.

use contract::kvm::{SIGNATURE, feature, leaf};
use engine::cpu_model::Feature;
use engine::{Cpuid, CpuidTable};

/// What a VM offers of the kvm dialect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features(u32);

impl Features {
    /// Nothing: the dialect is not spoken.
    pub const NONE: Self = Self(0);
    /// All that is built.
    pub const ALL: Self = Self(
        feature::CLOCKSOURCE
            | feature::NOP_IO_DELAY
            | feature::CLOCKSOURCE2
            | feature::STEAL_TIME
            | feature::PV_EOI
            | feature::PV_UNHALT
            | feature::PV_TLB_FLUSH
            | feature::PV_SEND_IPI
            | feature::POLL_CONTROL
            | feature::PV_SCHED_YIELD
            | feature::MSI_EXT_DEST_ID
            | feature::CLOCKSOURCE_STABLE,
    );

    /// These without `feature`.
    pub const fn without(self, feature: u32) -> Self {
        Self(self.0 & !feature)
    }

    /// True where every bit of `feature` is offered.
    pub const fn has(self, feature: u32) -> bool {
        self.0 & feature == feature
    }
}

/// How fast the vCPUs' counters run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rates {
    /// Time-stamp counter, kHz.
    pub tsc_khz: u64,
    /// Local APIC timer before its divider, kHz.
    pub apic_khz: u64,
}

/// Says what any dialect implies: software runs below, unless `hidden`.
///
/// The promise that the TSC counts at one rate for ever is taken back: it would not survive a move to another host, and
/// the dialects' clocks do. A guest that reads the promise prefers the bare counter to the clock.
pub fn show(table: &mut CpuidTable, hidden: bool) {
    table.set_feature(Feature::Hypervisor, !hidden);
    table.set_feature(Feature::Invtsc, false);
}

/// Adds the dialect's leaves to what CPUID answers.
pub fn offer(table: &mut CpuidTable, features: Features, rates: Rates) {
    let [ebx, ecx, edx] = signature(&SIGNATURE);
    table.set(leaf::BASE, 0, Cpuid { eax: leaf::TIMING, ebx, ecx, edx });
    table.set(leaf::FEATURES, 0, Cpuid { eax: features.0, ..Cpuid::default() });
    let khz = |rate: u64| u32::try_from(rate).unwrap_or(0); // 0 says "not known"; 2^32 kHz is 4 THz
    table.set(leaf::TIMING, 0, Cpuid { eax: khz(rates.tsc_khz), ebx: khz(rates.apic_khz), ..Cpuid::default() });
}

/// A signature as EBX, ECX and EDX spell it.
pub(crate) fn signature(text: &[u8; 12]) -> [u32; 3] {
    [0, 4, 8].map(|at| u32::from_le_bytes([0, 1, 2, 3].map(|byte| text[at + byte])))
}

/// Takes every trace of a hypervisor out of what CPUID answers: the bit, and all leaves from 0x4000_0000 to 0x4000_ffff.
pub fn hide(table: &mut CpuidTable) {
    table.set_feature(Feature::Hypervisor, false);
    let leaves: Vec<u32> = table.iter().map(|((leaf, _), _)| leaf).filter(|leaf| leaf >> 16 == 0x4000).collect();
    for leaf in leaves {
        table.remove(leaf);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_signature_and_features_are_found_and_hidden_again() {
        let mut table = CpuidTable::default();
        table.set(1, 0, Cpuid::default());
        let bare = table.clone();
        table.set_feature(Feature::Invtsc, true);
        show(&mut table, false);
        offer(&mut table, Features::ALL, Rates { tsc_khz: 3_000_000, apic_khz: 1_000_000 });
        let base = table.get(0x4000_0000, 0).unwrap();
        assert_eq!((base.eax, base.ebx, base.ecx, base.edx), (0x4000_0010, 0x4b4d_564b, 0x564b_4d56, 0x4d));
        assert_eq!(table.get(0x4000_0001, 0).unwrap().eax, 0x0100_baeb);
        assert_eq!(table.get(0x4000_0010, 0).unwrap(), Cpuid { eax: 3_000_000, ebx: 1_000_000, ecx: 0, edx: 0 });
        assert_eq!(table.get(1, 0).unwrap().ecx, 1 << 31);
        assert!(!table.has(Feature::Invtsc));
        show(&mut table, true);
        assert_eq!(table.get(1, 0).unwrap().ecx, 0);
        hide(&mut table);
        table.remove(0x8000_0007);
        assert_eq!(table, bare);
    }
}
