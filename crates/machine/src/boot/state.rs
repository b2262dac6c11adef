//! Processor states in which kernels are entered.

use engine::CpuState;
use engine::state::{Segment, TableRegister, cr0, cr4, efer, seg};

use super::error::Fault;
use super::image::Space;
use crate::layout;

const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

// Bits 23:8 of a descriptor's high word (Intel SDM vol. 3A, 3.4.5): granularity, size, present, type.
const CODE_64: u16 = 0xa09b;
const CODE_32: u16 = 0xc09b;
const DATA_32: u16 = 0xc093;
const TSS_BUSY: u16 = 0x008b;

/// Page-table entry: present, writable.
const TABLE: u64 = 0x003;
/// Page-directory entry of a 2 MiB page: present, writable, accessed, dirty, page size.
const LARGE_PAGE: u64 = 0x0e3;
const LARGE_PAGE_BYTES: u64 = 2 << 20;
const PAGE: u64 = memory::PAGE_SIZE;

/// 32-bit protected mode without paging, flat segments (Multiboot 0.6.96, 3.2; PVH, docs/misc/pvh.pandoc).
pub(super) fn protected(space: &mut Space<'_>, entry: u64) -> Result<CpuState, Fault> {
    let mut state = CpuState { cr0: cr0::PE | cr0::ET, rip: entry, ..CpuState::reset() };
    flat_segments(space, &mut state, CODE_32)?;
    Ok(state)
}

/// Long mode with the first 4 GiB mapped to themselves (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol").
pub(super) fn long(space: &mut Space<'_>, entry: u64) -> Result<CpuState, Fault> {
    let tables = space.lowest(6 * PAGE, 0..layout::LOW_MEMORY_END, "page tables")?;
    let (directory_pointers, directories) = (tables + PAGE, tables + 2 * PAGE);
    space.write(tables, &(directory_pointers | TABLE).to_le_bytes())?;
    for gigabyte in 0..4 {
        let directory = directories + gigabyte * PAGE;
        space.write(directory_pointers + 8 * gigabyte, &(directory | TABLE).to_le_bytes())?;
        let entries: Vec<u8> = (0..512)
            .flat_map(|index| (((gigabyte * 512 + index) * LARGE_PAGE_BYTES) | LARGE_PAGE).to_le_bytes())
            .collect();
        space.write(directory, &entries)?;
    }
    let mut state = CpuState {
        cr0: cr0::PE | cr0::PG | cr0::ET,
        cr3: tables,
        cr4: cr4::PAE,
        efer: efer::LME | efer::LMA,
        rip: entry,
        ..CpuState::reset()
    };
    flat_segments(space, &mut state, CODE_64)?;
    Ok(state)
}

/// Loads flat segments, and a GDT that holds the same descriptors so that reloading them works.
fn flat_segments(space: &mut Space<'_>, state: &mut CpuState, code: u16) -> Result<(), Fault> {
    let data = Segment { selector: DATA, attributes: DATA_32, limit: u32::MAX, base: 0 };
    state.segments = [data; 6];
    state.segments[seg::CS] = Segment { selector: CODE, attributes: code, limit: u32::MAX, base: 0 };
    state.tr = Segment { selector: TASK, attributes: TSS_BUSY, limit: 0x67, base: 0 };
    let table = [
        0,
        0,
        descriptor(&state.segments[seg::CS]),
        descriptor(&data),
        descriptor(&state.tr),
        0, // the upper half of a 64-bit TSS descriptor
    ];
    let bytes: Vec<u8> = table.iter().flat_map(|descriptor| descriptor.to_le_bytes()).collect();
    let base = space.lowest(bytes.len() as u64, 0..layout::LOW_MEMORY_END, "a descriptor table")?;
    space.write(base, &bytes)?;
    state.gdtr = TableRegister { base, limit: bytes.len() as u16 - 1 };
    state.idtr = TableRegister { base: 0, limit: 0 };
    Ok(())
}

/// The eight bytes of a segment descriptor (Intel SDM vol. 3A, figure 3-8).
fn descriptor(segment: &Segment) -> u64 {
    let attributes = u64::from(segment.attributes);
    let limit = u64::from(if segment.attributes & 0x8000 != 0 { segment.limit >> 12 } else { segment.limit });
    (limit & 0xffff)
        | (segment.base & 0xff_ffff) << 16
        | (attributes & 0xff) << 40
        | (limit >> 16 & 0xf) << 48
        | (attributes >> 12) << 52
        | (segment.base >> 24 & 0xff) << 56
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Layout, Plan};
    use memory::{Gpa, GuestRam};

    #[test]
    fn descriptors_are_the_well_known_ones() {
        let flat = |attributes| Segment { selector: 0, attributes, limit: u32::MAX, base: 0 };
        assert_eq!(descriptor(&flat(CODE_64)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&flat(CODE_32)), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&flat(DATA_32)), 0x00cf_9300_0000_ffff);
        let odd = Segment { selector: 0, attributes: 0x008b, limit: 0x1_2345, base: 0x89ab_cdef };
        assert_eq!(descriptor(&odd), 0x8901_8bab_cdef_2345);
    }

    #[test]
    fn the_first_four_gigabytes_map_to_themselves() {
        let layout = Layout::new(&Plan::new("vmlinuz"));
        let ram = GuestRam::new(&layout.ram).unwrap();
        let state = long(&mut Space::new(&ram, &layout), 0x100_0000).unwrap();
        let entry = |table: u64, index: u64| ram.read_value::<u64>(Gpa((table & !0xfff) + 8 * index)).unwrap();
        for address in [0, 0x1f_ffff, 0x20_0000, 0x100_0000, 0xbfff_ffff, 0xfee0_0000, 0xffff_ffff_u64] {
            let pointers = entry(state.cr3, address >> 39);
            let directory = entry(pointers, address >> 30 & 0x1ff);
            let page = entry(directory, address >> 21 & 0x1ff);
            assert_eq!(pointers & directory & 3, 3);
            assert_eq!((page & !0x1f_ffff, page & 0xff), (address & !0x1f_ffff, 0xe3), "{address:#x}");
        }
        assert_eq!(entry(state.cr3, 1), 0);
        assert!(state.segments[seg::CS].long() && state.cpl() == 0);
        assert_eq!((state.gdtr.limit, state.rip), (47, 0x100_0000));
    }
}
