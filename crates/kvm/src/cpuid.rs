//! CPUID between the engine's tables and KVM's lists. Pure.

use engine::cpu_model::{FEATURES, Feature};
use engine::{Cpuid, CpuidTable};
use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// The leaf of the kvm dialect's features (Linux, Documentation/virt/kvm/x86/cpuid.rst).
const DIALECT: u32 = 0x4000_0001;
/// Caches as Intel tells them, and as AMD does.
const INTEL_CACHES: u32 = 0x4;
const AMD_CACHES: u32 = 0x8000_001d;
/// EBX of leaf 0 on Intel's processors: "Genu".
const INTEL: u32 = 0x756e_6547;

/// What the dialect's features that guests are offered on KVM are: clocks, asynchronous page faults by interrupt, steal time
/// with the preempted flag, EOI without exit, kicks, remote flushes and IPIs, polling. Not offered: bit 15, extended
/// destination ids, which machines of up to 254 vCPUs do not need, and what belongs to encrypted guests.
const DIALECT_SERVED: u32 = 1 | 1 << 1 | 1 << 3 | 1 << 4 | 7 << 5 | 1 << 9 | 1 << 11 | 7 << 12 | 1 << 24;

/// KVM's list of what it supports as a table. The deadline timer comes with the local APIC, and older kernels do not list
/// it (Linux, Documentation/virt/kvm/api.rst, `KVM_GET_SUPPORTED_CPUID`).
pub(crate) fn supported(entries: &[kvm_cpuid_entry2], tsc_deadline: bool) -> CpuidTable {
    let mut table = CpuidTable::default();
    for entry in entries {
        let value = Cpuid { eax: entry.eax, ebx: entry.ebx, ecx: entry.ecx, edx: entry.edx };
        table.set(entry.function, entry.index, value);
    }
    table.set_feature(Feature::TscDeadline, tsc_deadline);
    table
}

/// The features of the kvm dialect that this KVM serves.
pub(crate) fn dialect(supported: &CpuidTable) -> u32 {
    supported.answer(DIALECT, 0).eax & DIALECT_SERVED
}

/// What a vCPU is told to answer: `table`, without what `supported` does not have.
pub(crate) fn filtered(table: &CpuidTable, supported: &CpuidTable) -> CpuidTable {
    let mut filtered = table.clone();
    for bit in FEATURES {
        if table.has(bit.feature) && !supported.has(bit.feature) {
            filtered.set_feature(bit.feature, false);
        }
    }
    if let Some(dialect) = table.get(DIALECT, 0) {
        filtered.set(DIALECT, 0, Cpuid { eax: dialect.eax & supported.answer(DIALECT, 0).eax, ..dialect });
    }
    if table.answer(0, 0).ebx == INTEL {
        tell_caches_as_intel(&mut filtered);
    }
    filtered
}

/// Intel's leaf is AMD's with the number of cores in EAX 31:26 (Intel SDM vol. 2A, CPUID, leaf 04h).
fn tell_caches_as_intel(table: &mut CpuidTable) {
    let cores = (table.answer(1, 0).ebx >> 16 & 0xff).clamp(1, 64);
    let caches: Vec<_> = table.iter().filter(|((leaf, _), _)| *leaf == AMD_CACHES).collect();
    for ((_, subleaf), cache) in caches {
        table.set(INTEL_CACHES, subleaf, Cpuid { eax: cache.eax | (cores - 1) << 26, ..cache });
    }
}

/// A table as KVM's list. OSXSAVE, APIC and the sizes in leaf 0Dh are KVM's to correct.
pub(crate) fn entries(table: &CpuidTable) -> Vec<kvm_cpuid_entry2> {
    let entry = |((function, index), value): ((u32, u32), Cpuid)| kvm_cpuid_entry2 {
        function,
        index,
        flags: if CpuidTable::has_subleaves(function) { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
        eax: value.eax,
        ebx: value.ebx,
        ecx: value.ecx,
        edx: value.edx,
        ..kvm_cpuid_entry2::default()
    };
    table.iter().map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::HostCpu;
    use engine::cpu_model::lookup;
    use proptest::prelude::*;

    fn model() -> CpuidTable {
        lookup("max").unwrap().table(&HostCpu::read(), 1, 4).unwrap()
    }

    proptest! {
        #[test]
        fn a_guest_never_sees_more_than_kvm_supports(bits in prop::collection::vec(any::<bool>(), FEATURES.len()), eax: u32) {
            let mut table = model();
            let mut supported = CpuidTable::default();
            for (bit, &there) in FEATURES.iter().zip(&bits) {
                supported.set_feature(bit.feature, there);
            }
            table.set(DIALECT, 0, Cpuid { eax: 0xff, ..Cpuid::default() });
            supported.set(DIALECT, 0, Cpuid { eax, ..Cpuid::default() });
            let shown = filtered(&table, &supported);
            for bit in FEATURES {
                prop_assert_eq!(shown.has(bit.feature), table.has(bit.feature) && supported.has(bit.feature), "{}", bit.name);
            }
            prop_assert_eq!(shown.answer(DIALECT, 0).eax, 0xff & eax);
            prop_assert_eq!(shown.answer(0xb, 1), table.answer(0xb, 1));
        }
    }

    #[test]
    fn lists_and_tables_are_one() {
        let table = model();
        let list = entries(&table);
        assert_eq!(supported(&list, table.has(Feature::TscDeadline)), table);
        let subleaves = |leaf| list.iter().filter(|e| e.function == leaf).map(|e| e.flags).collect::<Vec<_>>();
        assert_eq!((subleaves(0xb), subleaves(1)), (vec![1; 3], vec![0]));
        assert!(!supported(&list, false).has(Feature::TscDeadline));
    }

    #[test]
    fn the_dialect_is_what_kvm_supports_of_what_is_served() {
        let mut table = CpuidTable::default();
        assert_eq!(dialect(&table), 0);
        table.set(DIALECT, 0, Cpuid { eax: !0, ..Cpuid::default() });
        assert_eq!(dialect(&table), 0x0100_7afb);
    }

    #[test]
    fn intel_guests_find_their_caches() {
        let mut table = model();
        let vendor = table.answer(0, 0);
        table.set(0, 0, Cpuid { ebx: INTEL, ..vendor });
        let shown = filtered(&table, &table);
        assert_eq!(shown.answer(4, 3).eax, table.answer(AMD_CACHES, 3).eax | 3 << 26);
        assert_eq!(shown.answer(4, 3).ecx, table.answer(AMD_CACHES, 3).ecx);
        assert_eq!(filtered(&model(), &model()).get(4, 0), None);
    }
}
