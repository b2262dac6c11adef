//! The leaves that are not feature bits: identity, caches, topology, XSAVE layout. AMD's way (APM vol. 3, appendix E).
//!
//! All vCPUs are cores of one package, one thread each; initial APIC ids are vCPU numbers. Leaves that AMD does not
//! have (2, 4, 0x15, 0x16) are absent: their readers look at the vendor first, and guests learn the TSC's rate from
//! the paravirtual clock or by calibration.

use super::{Cpuid, CpuidTable, Feature, HostCpu, Model};

/// Highest basic and extended leaf.
const MAX_BASIC: u32 = 0xd;
const MAX_EXTENDED: u32 = 0x8000_0021;

/// Address widths in bits; the engine takes reserved page-table bits from the table, not from here.
const PHYSICAL_BITS: u32 = 48;
const LINEAR_BITS: u32 = 48;

/// What leaves 0x80000002..=0x80000004 spell.
const BRAND: &[u8; 19] = b"Cordial virtual CPU";

/// Bits of leaf 1 EDX that AMD repeats in leaf 0x80000001 EDX: 0..=9, 12..=17, 23, 24.
const REPEATED: u32 = 0x0183_f3ff;

/// Bytes of a cache line, all levels.
const LINE: u32 = 64;

/// The legacy and header part of an XSAVE area (Intel SDM vol. 1, 13.4.1 and 13.4.2).
const XSAVE_LEGACY: u32 = 512 + 64;
/// The AVX part: upper halves of sixteen registers, directly behind the header (Intel SDM vol. 1, 13.5.3).
const XSAVE_AVX: u32 = 256;

/// One cache.
struct Cache {
    /// 1 data, 2 instruction, 3 unified.
    kind: u32,
    level: u32,
    kib: u32,
    ways: u32,
    /// All vCPUs together, or each its own.
    shared: bool,
}

/// Small and plain; guests size buffers by them, nothing depends on their truth.
const CACHES: [Cache; 4] = [
    Cache { kind: 1, level: 1, kib: 32, ways: 8, shared: false },
    Cache { kind: 2, level: 1, kib: 32, ways: 8, shared: false },
    Cache { kind: 3, level: 2, kib: 512, ways: 8, shared: false },
    Cache { kind: 3, level: 3, kib: 16384, ways: 16, shared: true },
];

/// Translation buffers of one level, as AMD describes them: entries, and how associative they are.
struct Tlb {
    data: u32,
    data_ways: u32,
    instruction: u32,
    instruction_ways: u32,
}

impl Tlb {
    /// A register of leaf 0x80000005: fields of eight bits, ways as a number.
    const fn in_bytes(&self) -> u32 {
        self.data_ways << 24 | self.data << 16 | self.instruction_ways << 8 | self.instruction
    }

    /// A register of leaves 0x80000006 and 0x80000019: twelve bits of entries, ways as a code.
    const fn in_codes(&self) -> u32 {
        self.data_ways << 28 | self.data << 16 | self.instruction_ways << 12 | self.instruction
    }
}

/// Leaf 0x80000005's word for fully associative; the code for it elsewhere; the codes for 4, 6 and 8 ways.
const FULLY: u32 = 0xff;
const FULLY_CODE: u32 = 0xf;
const WAYS_4: u32 = 4;
const WAYS_6: u32 = 5;
const WAYS_8: u32 = 6;

/// The translation buffers of a Zen 4. The engine's own are others; guests only print these, or weigh by them whether to
/// flush pages one by one.
const L1_TLB: Tlb = Tlb { data: 72, data_ways: FULLY, instruction: 64, instruction_ways: FULLY };
const L2_TLB_4K: Tlb = Tlb { data: 3072, data_ways: WAYS_8, instruction: 512, instruction_ways: WAYS_4 };
const L2_TLB_2M: Tlb = Tlb { data: 3072, data_ways: WAYS_6, instruction: 512, instruction_ways: 2 };
const L1_TLB_1G: Tlb = Tlb { data_ways: FULLY_CODE, instruction_ways: FULLY_CODE, ..L1_TLB };
const L2_TLB_1G: Tlb = Tlb { data: 64, data_ways: FULLY_CODE, instruction: 0, instruction_ways: 0 };

/// Adds everything else to a table that holds a model's feature bits.
pub(super) fn complete(table: &mut CpuidTable, model: &Model, host: &HostCpu, vcpu: u32, vcpus: u32) {
    identity(table, model, host);
    caches(table, vcpus);
    topology(table, vcpu, vcpus);
    if table.has(Feature::Xsave) {
        xsave(table);
    }
    let repeated = table.answer(1, 0).edx & REPEATED;
    table.update(0x8000_0001, 0, |r| r.edx |= repeated);
}

fn identity(table: &mut CpuidTable, model: &Model, host: &HostCpu) {
    let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| model.vendor[at + i]));
    let own = Cpuid { eax: 0, ebx: word(0), edx: word(4), ecx: word(8) };
    let (vendor, signature) =
        host.identity().unwrap_or_else(|| (own, signature(model.family, model.model, model.stepping)));
    table.set(0, 0, Cpuid { eax: MAX_BASIC, ..vendor });
    table.set(0x8000_0000, 0, Cpuid { eax: MAX_EXTENDED, ..vendor });

    table.update(1, 0, |r| r.eax = signature);
    table.update(0x8000_0001, 0, |r| r.eax = signature);

    let mut brand = [0; 48];
    brand[..BRAND.len()].copy_from_slice(BRAND);
    for (leaf, chunk) in (0x8000_0002..).zip(brand.chunks_exact(16)) {
        let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| chunk[at + i]));
        table.set(leaf, 0, Cpuid { eax: word(0), ebx: word(4), ecx: word(8), edx: word(12) });
    }
    let physical = PHYSICAL_BITS.min(host.physical_bits());
    table.update(0x8000_0008, 0, |r| r.eax = physical | LINEAR_BITS << 8);
    // Leaf 1 EBX 15:8: CLFLUSH line in units of 8 bytes.
    table.update(1, 0, |r| r.ebx |= (LINE / 8) << 8);
}

/// Leaf 1 EAX: families above 15 spill into the extended family.
fn signature(family: u8, model: u8, stepping: u8) -> u32 {
    let base = u32::from(family.min(0xf));
    let extended = u32::from(family) - base;
    let model = u32::from(model);
    extended << 20 | (model >> 4) << 16 | base << 8 | (model & 0xf) << 4 | u32::from(stepping)
}

fn caches(table: &mut CpuidTable, vcpus: u32) {
    for (subleaf, cache) in (0..).zip(&CACHES) {
        let sharers = if cache.shared { vcpus.min(1 << 12) } else { 1 };
        let sets = cache.kib * 1024 / LINE / cache.ways;
        // Self-initialising (bit 8); one partition a line.
        let eax = cache.kind | cache.level << 5 | 1 << 8 | (sharers - 1) << 14;
        let value = Cpuid { eax, ebx: (LINE - 1) | (cache.ways - 1) << 22, ecx: sets - 1, edx: 0 };
        table.set(0x8000_001d, subleaf, value);
    }
    let [l1d, l1i, l2, l3] = &CACHES;
    // Leaf 0x80000005: 2 MiB pages, 4 KiB pages; KiB, ways, lines a tag, bytes a line.
    let l1 = |cache: &Cache| cache.kib << 24 | cache.ways << 16 | 1 << 8 | LINE;
    let tlb = L1_TLB.in_bytes();
    table.set(0x8000_0005, 0, Cpuid { eax: tlb, ebx: tlb, ecx: l1(l1d), edx: l1(l1i) });
    // Leaf 0x80000006: associativity is a code, 6 for 8 ways and 8 for 16; L3 in units of 512 KiB.
    let ecx = l2.kib << 16 | 6 << 12 | 1 << 8 | LINE;
    let edx = (l3.kib / 512) << 18 | 8 << 12 | 1 << 8 | LINE;
    table.set(0x8000_0006, 0, Cpuid { eax: L2_TLB_2M.in_codes(), ebx: L2_TLB_4K.in_codes(), ecx, edx });
    if table.has(Feature::Pdpe1gb) {
        let (eax, ebx) = (L1_TLB_1G.in_codes(), L2_TLB_1G.in_codes());
        table.set(0x8000_0019, 0, Cpuid { eax, ebx, ..Cpuid::default() });
    }
}

fn topology(table: &mut CpuidTable, vcpu: u32, vcpus: u32) {
    let id_bits = vcpus.next_power_of_two().trailing_zeros();
    // Fields of eight bits saturate; leaf 0xb has the whole truth.
    let count = vcpus.min(255);
    table.update(1, 0, |r| {
        r.ebx |= count << 16 | (vcpu & 0xff) << 24;
        if vcpus > 1 {
            r.edx |= 1 << 28; // HTT: the count in EBX means something.
        }
    });
    table.set_feature(Feature::CmpLegacy, vcpus > 1);
    table.update(0x8000_0008, 0, |r| r.ecx = (count - 1) | id_bits << 12);

    let level = |subleaf: u32, kind: u32, shift: u32, below: u32| Cpuid {
        eax: shift,
        ebx: below,
        ecx: subleaf | kind << 8,
        edx: vcpu,
    };
    table.set(0xb, 0, level(0, 1, 0, 1));
    table.set(0xb, 1, level(1, 2, id_bits, vcpus));
    table.set(0xb, 2, level(2, 0, 0, 0));
    // Extended APIC id; core id with one thread; node 0 of one.
    table.set(0x8000_001e, 0, Cpuid { eax: vcpu, ebx: vcpu & 0xff, ecx: 0, edx: 0 });
}

/// Leaf 0xd. Its EBX values depend on XCR0 and hold for the one after RESET; the engine corrects them.
fn xsave(table: &mut CpuidTable) {
    let (components, size) =
        if table.has(Feature::Avx) { (0b111, XSAVE_LEGACY + XSAVE_AVX) } else { (0b011, XSAVE_LEGACY) };
    table.set(0xd, 0, Cpuid { eax: components, ebx: XSAVE_LEGACY, ecx: size, edx: 0 });
    table.update(0xd, 1, |r| {
        if r.eax != 0 {
            r.ebx = XSAVE_LEGACY;
        }
    });
    if table.has(Feature::Avx) {
        table.set(0xd, 2, Cpuid { eax: XSAVE_AVX, ebx: XSAVE_LEGACY, ecx: 0, edx: 0 });
    }
}

#[cfg(test)]
mod tests {
    use super::super::{HostCpu, lookup, names};
    use super::*;
    use std::arch::x86_64::__cpuid_count;

    fn table(name: &str, vcpu: u32, vcpus: u32) -> CpuidTable {
        lookup(name).unwrap().table(&HostCpu::full(), vcpu, vcpus).unwrap()
    }

    #[test]
    fn no_leaf_is_above_the_highest() {
        for name in names() {
            let table = table(name, 0, 1);
            assert_eq!(table.answer(0, 0).eax, MAX_BASIC);
            assert_eq!(table.answer(0x8000_0000, 0).eax, MAX_EXTENDED);
            for ((leaf, _), _) in table.iter() {
                assert!(leaf <= MAX_BASIC || (0x8000_0000..=MAX_EXTENDED).contains(&leaf), "{name}: {leaf:#x}");
            }
        }
    }

    #[test]
    fn it_is_a_zen_4_called_cordial() {
        let table = table("max", 0, 1);
        let bytes = |r: Cpuid| [r.eax, r.ebx, r.ecx, r.edx].map(u32::to_le_bytes).concat();
        let zero = table.answer(0, 0);
        assert_eq!([zero.ebx, zero.edx, zero.ecx].map(u32::to_le_bytes).concat(), b"AuthenticAMD");
        assert_eq!(table.answer(1, 0).eax, 0x00a1_0f11);
        assert_eq!(table.answer(0x8000_0001, 0).eax, 0x00a1_0f11);
        let brand: Vec<u8> = (0x8000_0002..=0x8000_0004).flat_map(|leaf| bytes(table.answer(leaf, 0))).collect();
        assert_eq!(brand.len(), 48);
        assert_eq!(String::from_utf8(brand).unwrap().trim_end_matches('\0'), "Cordial virtual CPU");
        assert_eq!(table.physical_bits(), 48);
    }

    #[test]
    fn old_signatures_need_no_extended_family() {
        assert_eq!(signature(6, 0x3a, 9), 0x0003_06a9);
        assert_eq!(signature(0x17, 1, 2), 0x0080_0f12);
    }

    #[test]
    fn what_amd_repeats_is_the_same_twice() {
        let table = table("max", 0, 1);
        let (one, extended) = (table.answer(1, 0).edx, table.answer(0x8000_0001, 0).edx);
        assert_eq!(one & REPEATED, extended & REPEATED);
        assert_ne!(extended & REPEATED, 0);
    }

    #[test]
    fn one_vcpu_is_no_multiprocessor() {
        let table = table("max", 0, 1);
        assert!(!table.has(Feature::CmpLegacy));
        assert_eq!(table.answer(1, 0).edx & 1 << 28, 0);
        assert_eq!(table.answer(0x8000_0008, 0).ecx, 0);
        assert_eq!(table.answer(0xb, 1), Cpuid { eax: 0, ebx: 1, ecx: 0x201, edx: 0 });
    }

    #[test]
    fn every_leaf_tells_the_same_topology() {
        for vcpus in [2, 3, 4, 240, 300] {
            for vcpu in [0, vcpus - 1] {
                let table = table("x86-64-v2", vcpu, vcpus);
                assert_eq!(table.answer(1, 0).ebx >> 24, vcpu & 0xff);
                assert_eq!(table.answer(1, 0).ebx >> 16 & 0xff, vcpus.min(255));
                assert!(table.has(Feature::CmpLegacy));
                let cores = table.answer(0xb, 1);
                assert_eq!((cores.ebx, cores.edx), (vcpus, vcpu));
                assert!(vcpus <= 1 << cores.eax && vcpus > 1 << (cores.eax - 1));
                assert_eq!(table.answer(0x8000_0008, 0).ecx >> 12 & 0xf, cores.eax);
                assert_eq!(table.answer(0x8000_001e, 0).eax, vcpu);
                assert_eq!(table.answer(0x8000_001d, 3).eax >> 14 & 0xfff, vcpus - 1);
            }
        }
    }

    #[test]
    fn both_cache_descriptions_agree() {
        let table = table("max", 0, 2);
        let size = |subleaf| {
            let r = table.answer(0x8000_001d, subleaf);
            ((r.ebx >> 22) + 1) * ((r.ebx >> 12 & 0x3ff) + 1) * ((r.ebx & 0xfff) + 1) * (r.ecx + 1) / 1024
        };
        assert_eq!([0, 1, 2, 3].map(size), [32, 32, 512, 16384]);
        assert_eq!(table.answer(0x8000_001d, 4), Cpuid::default());
        assert_eq!(table.answer(0x8000_0005, 0).ecx, 0x2008_0140);
        assert_eq!(table.answer(0x8000_0006, 0).ecx, 0x0200_6140);
        assert_eq!(table.answer(0x8000_0006, 0).edx, 0x0080_8140);
    }

    #[test]
    fn translation_buffers_are_those_of_a_zen_4() {
        let table = table("x86-64-v1", 0, 1);
        let (l1, l2, giant) =
            (table.answer(0x8000_0005, 0), table.answer(0x8000_0006, 0), table.answer(0x8000_0019, 0));
        assert_eq!((l1.eax, l1.ebx), (0xff48_ff40, 0xff48_ff40));
        assert_eq!((l2.eax, l2.ebx), (0x5c00_2200, 0x6c00_4200));
        assert_eq!((giant.eax, giant.ebx), (0xf048_f040, 0xf040_0000));
    }

    #[test]
    fn the_xsave_area_is_laid_out_as_on_the_host() {
        let full = table("max", 0, 1);
        assert_eq!(full.answer(0xd, 0), Cpuid { eax: 7, ebx: 576, ecx: 832, edx: 0 });
        if HostCpu::read().can(Feature::Avx) {
            let host = __cpuid_count(0xd, 2);
            let ours = full.answer(0xd, 2);
            assert_eq!((ours.eax, ours.ebx), (host.eax, host.ebx));
        }
        let sse = lookup("max").unwrap().table(&HostCpu::of([Feature::Xsave]), 0, 1).unwrap();
        assert_eq!(sse.answer(0xd, 0), Cpuid { eax: 3, ebx: 576, ecx: 576, edx: 0 });
        assert_eq!(sse.answer(0xd, 2), Cpuid::default());
        assert_eq!(table("x86-64-v2", 0, 1).answer(0xd, 0), Cpuid::default());
    }
}
