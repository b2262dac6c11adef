//! FXSAVE, the XSAVE family and XCR0.

use engine::cpu_model::Feature;
use engine::state::{XsaveArea, cr0, cr4, gpr};

use super::*;
use crate::cpu::vector::{GP, NM, UD};

const FXSAVE: &[u8] = &[0x0f, 0xae, 0x03]; // fxsave [rbx]
const FXSAVE64: &[u8] = &[0x48, 0x0f, 0xae, 0x03];
const FXRSTOR64: &[u8] = &[0x48, 0x0f, 0xae, 0x0b];
const XSAVE64: &[u8] = &[0x48, 0x0f, 0xae, 0x23];
const XSAVEOPT64: &[u8] = &[0x48, 0x0f, 0xae, 0x33];
const XSAVEC64: &[u8] = &[0x48, 0x0f, 0xc7, 0x23];
const XRSTOR64: &[u8] = &[0x48, 0x0f, 0xae, 0x2b];
const XGETBV: &[u8] = &[0x0f, 0x01, 0xd0];
const XSETBV: &[u8] = &[0x0f, 0x01, 0xd1];

/// Every register different from every other.
fn filled() -> Bench {
    let mut bench = Bench::new();
    for number in 0..16 {
        bench.set(number, 0x100 + u128::from(number), 0x200 + u128::from(number));
    }
    bench.run(&[0xd9, 0xeb]).unwrap(); // fldpi
    bench.set_mxcsr(0x1fa0);
    bench.cpu.state.gpr[gpr::RBX] = DATA;
    bench.cpu.state.gpr[gpr::RAX] = u64::MAX;
    bench.cpu.state.gpr[gpr::RDX] = u64::MAX;
    bench.put(DATA, &[0; 0x1000]);
    bench
}

fn header(bench: &Bench) -> (u64, u64) {
    (u64::from_le_bytes(bench.get(DATA + 512)), u64::from_le_bytes(bench.get(DATA + 520)))
}

#[test]
fn fxsave_lays_registers_out_as_documented() {
    let mut bench = filled();
    bench.put(DATA, &[0xee; 0x1000]);
    bench.run(FXSAVE64).unwrap();
    let image = bench.get::<520>(DATA);
    assert_eq!(image[..6], [0x7f, 0x03, 0x00, 0x38, 0x80, 0x00], "FCW, FSW with TOP 7, FTW");
    assert_eq!(image[6..8], [0xeb, 0x01], "FOP");
    assert_eq!(image[8..16], CODE.to_le_bytes(), "FIP is the guest's");
    assert_eq!(image[24..32], [0xa0, 0x1f, 0, 0, 0xff, 0xff, 0, 0], "MXCSR and its mask");
    assert_eq!(image[32..42], [0x35, 0xc2, 0x68, 0x21, 0xa2, 0xda, 0x0f, 0xc9, 0x00, 0x40], "pi");
    assert_eq!(image[160..168], 0x100_u64.to_le_bytes());
    assert_eq!(image[400..408], 0x10f_u64.to_le_bytes());
    assert_eq!(image[416..], [0xee; 104], "the rest is not the processor's");

    bench.cpu.state.xsave.set_u64(8, 0x1234_5678_9abc);
    bench.run(FXSAVE).unwrap();
    assert_eq!(bench.get::<8>(DATA + 8), 0x5678_9abc_u64.to_le_bytes(), "32-bit pointer, selector zero");
}

#[test]
fn fxrstor_takes_back_what_fxsave_stored() {
    let mut bench = filled();
    bench.run(FXSAVE64).unwrap();
    let before = bench.cpu.state.xsave.clone();
    bench.cpu.state.xsave = XsaveArea::reset();
    bench.run(FXRSTOR64).unwrap();
    assert_eq!(bench.cpu.state.xsave.0[..416], before.0[..416]);
    bench.put(DATA + 24, &[0, 0, 1, 0]);
    assert_eq!(bench.run(FXRSTOR64), exception(GP), "reserved MXCSR bit");
    bench.cpu.state.gpr[gpr::RBX] = DATA + 8;
    assert_eq!(bench.run(FXSAVE64), exception(GP), "alignment");
    bench.cpu.state.gpr[gpr::RBX] = HOLE - 256;
    assert_eq!(bench.run(FXSAVE64), page_fault(HOLE, 2));
    assert_eq!(bench.get::<8>(HOLE - 256), [0; 8], "nothing is stored");
    bench.cpu.state.cr0 |= cr0::EM;
    assert_eq!(bench.run(FXSAVE64), exception(NM));
}

#[test]
fn xsave_and_xrstor_round_trip() {
    for save in [XSAVE64, XSAVEOPT64, XSAVEC64] {
        let mut bench = filled();
        bench.run(save).unwrap();
        let compact = if save == XSAVEC64 { 1 << 63 | 7 } else { 0 };
        assert_eq!(header(&bench), (7, compact));
        let before = bench.cpu.state.xsave.clone();
        bench.cpu.state.xsave = XsaveArea::reset();
        bench.run(XRSTOR64).unwrap();
        assert_eq!(bench.cpu.state.xsave, before);
    }
}

#[test]
fn components_are_chosen_by_mask_and_xcr0() {
    let mut bench = filled();
    bench.cpu.state.gpr[gpr::RAX] = 6;
    bench.put(DATA + 512, &1_u64.to_le_bytes());
    bench.run(XSAVE64).unwrap();
    assert_eq!(header(&bench).0, 7, "bits not asked for stay");
    assert_eq!(bench.get::<24>(DATA), [0; 24], "x87 was not asked for");
    bench.put(DATA, &[0; 0x1000]);
    bench.cpu.state.xcr0 = 3;
    bench.cpu.state.gpr[gpr::RAX] = 7;
    bench.run(XSAVE64).unwrap();
    assert_eq!(header(&bench).0, 3);
    assert_eq!(bench.get::<16>(DATA + 576), [0; 16], "AVX is not enabled");
}

#[test]
fn initial_components_are_skipped_and_restored_as_such() {
    let mut bench = filled();
    for number in 0..16 {
        bench.set(number, 5, 0);
    }
    bench.put(DATA + 576, &[0x55; 256]);
    bench.run(XSAVEOPT64).unwrap();
    assert_eq!(header(&bench).0, 3);
    assert_eq!(bench.get::<4>(DATA + 576), [0x55; 4], "not written");
    bench.run(XSAVE64).unwrap();
    assert_eq!(header(&bench).0, 3);
    assert_eq!(bench.get::<4>(DATA + 576), [0; 4], "XSAVE writes it all the same");
    bench.set(3, 1, 2);
    bench.put(DATA + 512, &0_u64.to_le_bytes());
    bench.put(DATA + 24, &0x1f00_u32.to_le_bytes());
    bench.run(XRSTOR64).unwrap();
    assert_eq!(bench.vector(3), (0, 0));
    assert_eq!(bench.cpu.state.xsave.u16(0), 0x037f);
    assert_eq!(bench.mxcsr(), 0x1f00, "the standard format always loads MXCSR");
    bench.put(DATA + 520, &(1_u64 << 63 | 7).to_le_bytes());
    bench.run(XRSTOR64).unwrap();
    assert_eq!(bench.mxcsr(), 0x1f80, "the compacted one as part of SSE");
}

#[test]
fn xrstor_checks_the_header() {
    let cases: [(u64, &[u8], bool); 10] = [
        (512, &[7], true),
        (512, &[8], false),                                                 // not in XCR0
        (520, &[1], false),                                                 // XCOMP_BV without the compacted bit
        (528, &[1], false),                                                 // reserved in both formats
        (536, &[1], true),                                                  // reserved in the compacted format only
        (520, &[7, 0, 0, 0, 0, 0, 0, 0x80], true),                          //
        (520, &[7, 0, 0, 0, 0, 0, 0, 0x80, 0, 0, 1], false),                // reserved
        (520, &[15, 0, 0, 0, 0, 0, 0, 0x80], false),                        // not in XCR0
        (512, &[4, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0x80], false), // present but not in the layout
        (512, &[2, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0x80], true),
    ];
    for (number, (at, bytes, good)) in cases.into_iter().enumerate() {
        let mut bench = filled();
        bench.put(DATA + 24, &0x1f80_u32.to_le_bytes());
        bench.put(DATA + at, bytes);
        let before = bench.cpu.state.xsave.clone();
        let expected = if good { Ok(()) } else { exception(GP) };
        assert_eq!(bench.run(XRSTOR64), expected, "case {number}");
        assert!(good || bench.cpu.state.xsave == before, "case {number}");
    }
    let mut bench = filled();
    bench.put(DATA + 26, &[1]);
    assert_eq!(bench.run(XRSTOR64), exception(GP), "MXCSR");
    bench.cpu.state.gpr[gpr::RBX] = DATA + 16;
    assert_eq!(bench.run(XRSTOR64), exception(GP), "alignment");
    assert_eq!(bench.run(XSAVE64), exception(GP), "alignment");
    bench.cpu.state.cr0 |= cr0::TS;
    assert_eq!(bench.run(XSAVE64), exception(NM));
    bench.cpu.state.cr4 &= !cr4::OSXSAVE;
    assert_eq!(bench.run(XSAVE64), exception(UD));
}

#[test]
fn a_save_across_pages_is_all_or_nothing() {
    let mut bench = filled();
    bench.cpu.state.gpr[gpr::RBX] = HOLE - 640;
    assert_eq!(bench.run(XSAVE64), page_fault(HOLE, 2));
    assert_eq!(bench.get::<640>(HOLE - 640), [0; 640]);
    bench.cpu.state.gpr[gpr::RAX] = 3;
    bench.run(XSAVE64).unwrap(); // without AVX it ends before the hole
}

#[test]
fn xcr0_takes_what_is_offered() {
    let mut bench = Bench::new();
    let mut set = |index: u64, value: u64, cpl: u8| {
        bench.cpu.state.gpr[gpr::RCX] = index;
        bench.cpu.state.gpr[gpr::RAX] = value;
        bench.cpu.state.gpr[gpr::RDX] = 0;
        bench.cpu.mode.cpl = cpl;
        let result = bench.run(XSETBV);
        bench.cpu.mode.cpl = 0;
        (result, bench.cpu.state.xcr0)
    };
    assert_eq!(set(0, 3, 0), (Ok(()), 3));
    for (index, value, cpl) in [(0, 0, 0), (0, 2, 0), (0, 5, 0), (0, 15, 0), (1, 3, 0), (0, 7, 3)] {
        assert_eq!(set(index, value, cpl), (exception(GP), 3), "{index} {value} {cpl}");
    }
    assert_eq!(set(0, 7, 0), (Ok(()), 7));
    bench.cpu.state.gpr[gpr::RCX] = 0;
    bench.run(XGETBV).unwrap();
    assert_eq!((bench.cpu.state.gpr[gpr::RAX], bench.cpu.state.gpr[gpr::RDX]), (7, 0));
    bench.set(1, 1, 0);
    bench.cpu.state.gpr[gpr::RCX] = 1;
    bench.run(XGETBV).unwrap();
    assert_eq!(bench.cpu.state.gpr[gpr::RAX], 2, "only SSE is in use");
    bench.cpu.state.gpr[gpr::RCX] = 2;
    assert_eq!(bench.run(XGETBV), exception(GP));
    let mut plain = Bench::with(|feature| feature != Feature::Xsavec);
    plain.cpu.state.gpr[gpr::RBX] = DATA;
    assert_eq!(plain.run(XSAVEC64), exception(UD));
    plain.put(DATA + 520, &(1_u64 << 63).to_le_bytes());
    assert_eq!(plain.run(XRSTOR64), exception(GP), "no compacted format without XSAVEC");
}
