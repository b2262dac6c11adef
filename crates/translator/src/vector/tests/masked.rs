//! Faults in the middle of masked moves and gathers.

use super::*;
use crate::cpu::vector::UD;

const ON: u128 = 0x8000_0000;

/// A mask for four 32-bit elements, the first given first.
fn mask(elements: [bool; 4]) -> u128 {
    elements.iter().rev().fold(0, |all, &on| all << 32 | if on { ON } else { 0 })
}

#[test]
fn masked_out_elements_do_not_fault() {
    let mut bench = Bench::new();
    bench.cpu.state.gpr[0] = HOLE - 8;
    bench.put(HOLE - 8, &[1, 0, 0, 0, 2, 0, 0, 0]);
    bench.set(2, mask([true, true, false, false]), 0);
    bench.set(1, u128::MAX, u128::MAX);
    bench.run(&[0xc4, 0xe2, 0x69, 0x8c, 0x08]).unwrap(); // vpmaskmovd xmm1, xmm2, [rax]
    assert_eq!(bench.vector(1), (2 << 32 | 1, 0));
    bench.set(2, mask([false, true, false, true]), 0);
    bench.set(1, 7, 8);
    assert_eq!(bench.run(&[0xc4, 0xe2, 0x69, 0x8c, 0x08]), page_fault(HOLE + 4, 0));
    assert_eq!(bench.vector(1), (7, 8));
    bench.set(1, u128::MAX, 0);
    assert_eq!(bench.run(&[0xc4, 0xe2, 0x69, 0x8e, 0x08]), page_fault(HOLE + 4, 2)); // vpmaskmovd [rax], xmm2, xmm1
    assert_eq!(bench.get::<8>(HOLE - 8), [1, 0, 0, 0, 2, 0, 0, 0], "nothing is stored");
    bench.set(2, mask([false, true, false, false]), 0);
    bench.run(&[0xc4, 0xe2, 0x69, 0x8e, 0x08]).unwrap();
    assert_eq!(bench.get::<8>(HOLE - 8), [1, 0, 0, 0, 255, 255, 255, 255]);
}

#[test]
fn byte_masks_store_where_rdi_points_and_all_of_it_is_checked() {
    let mut bench = Bench::new();
    bench.cpu.state.gpr[7] = HOLE - 16;
    bench.put(HOLE - 16, &[0; 16]);
    bench.set(1, u128::MAX, 0);
    bench.set(2, 0x8000, 0);
    bench.run(&[0x66, 0x0f, 0xf7, 0xca]).unwrap(); // maskmovdqu xmm1, xmm2
    assert_eq!(bench.get::<16>(HOLE - 16), [0, 255, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    bench.cpu.state.gpr[7] = HOLE - 15;
    assert_eq!(bench.run(&[0x66, 0x0f, 0xf7, 0xca]), page_fault(HOLE, 2), "though no byte goes there");
    assert_eq!(bench.get::<2>(HOLE - 15), [255, 0], "nothing is written");
}

#[test]
fn a_gather_keeps_what_it_has_when_one_element_faults() {
    let mut bench = Bench::new();
    bench.cpu.state.gpr[0] = HOLE - 16;
    bench.put(HOLE - 16, &[1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0]);
    let indices = |values: [i32; 4]| values.iter().rev().fold(0, |all, &index| all << 32 | u128::from(index as u32));
    bench.set(3, indices([3, -1, 4, 0]), 0);
    bench.put(HOLE - 20, &[9, 0, 0, 0]);
    bench.set(1, u128::MAX, u128::MAX);
    bench.set(2, mask([true; 4]), u128::MAX);
    let gather = &[0xc4, 0xe2, 0x69, 0x90, 0x0c, 0x98]; // vpgatherdd xmm1, [rax+xmm3*4], xmm2
    assert_eq!(bench.run(gather), page_fault(HOLE, 0));
    assert_eq!(bench.vector(1).0, 0xffff_ffff_ffff_ffff_0000_0009_0000_0004);
    assert_eq!(bench.vector(2).0, mask([false, false, true, true]));
    bench.set(3, indices([0, 0, 2, 1]), 0);
    bench.run(gather).unwrap();
    assert_eq!(bench.vector(1), (0x0000_0002_0000_0003_0000_0009_0000_0004, 0));
    assert_eq!(bench.vector(2), (0, 0));
    for same in [[0xc4, 0xe2, 0x71, 0x90, 0x0c, 0x98], [0xc4, 0xe2, 0x69, 0x90, 0x1c, 0x98]] {
        assert_eq!(bench.run(&same), exception(UD), "registers must differ");
    }
}
