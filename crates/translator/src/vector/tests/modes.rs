//! What differs outside 64-bit mode.

use super::*;
use crate::cpu::vector::UD;

#[test]
fn eight_registers_and_32_bit_addresses() {
    let mut bench = Bench::new();
    for number in 0..16 {
        bench.set(number, 1, 1);
    }
    bench.leave_long_mode(true);
    bench.cpu.state.gpr[0] = 0xffff_ffff_0000_0000 | DATA;
    bench.put(DATA, &5_u64.to_le_bytes());
    bench.run(&[0x66, 0x0f, 0xd4, 0x08]).unwrap(); // paddq xmm1, [eax]
    assert_eq!(bench.vector(1).0 as u64, 6);
    bench.run(&[0xc5, 0xfc, 0x77]).unwrap(); // vzeroall
    assert_eq!((bench.vector(7), bench.vector(8)), ((0, 0), (1, 1)));
    bench.run(&[0x0f, 0xae, 0x00]).unwrap(); // fxsave [eax]
    assert_eq!(bench.get::<16>(DATA + 288), [0; 16], "XMM8 is not there");
}

#[test]
fn no_vex_in_real_mode() {
    let mut bench = Bench::new();
    bench.leave_long_mode(false);
    assert_eq!(bench.run(&[0xc5, 0xf0, 0x58, 0xc1]), exception(UD)); // vaddps
    bench.run(&[0x0f, 0x58, 0xc1]).unwrap(); // addps
}

#[test]
fn environments_in_four_formats() {
    let mut bench = Bench::new();
    bench.leave_long_mode(true);
    bench.cpu.state.gpr[3] = DATA;
    bench.put(DATA, &0x3f80_0000_u32.to_le_bytes());
    bench.run(&[0xd8, 0x03]).unwrap(); // fadd dword [ebx]: a stack underflow
    bench.run(&[0xd9, 0x73, 0x40]).unwrap(); // fnstenv [ebx+64]
    let words = |bench: &Bench| bench.get::<28>(DATA + 64);
    let image = words(&bench);
    assert_eq!(image[..4], [0x7f, 0x03, 0xff, 0xff]);
    assert_eq!(image[12..16], (CODE as u32).to_le_bytes());
    assert_eq!(image[16..20], [0, 0, 3, 0], "selector zero, opcode above");
    assert_eq!(image[20..24], (DATA as u32).to_le_bytes());
    bench.run(&[0xd9, 0x63, 0x40]).unwrap(); // fldenv
    bench.run(&[0xd9, 0x73, 0x40]).unwrap();
    assert_eq!(words(&bench), image);
    bench.run(&[0x66, 0xd9, 0x73, 0x40]).unwrap(); // fnstenv, 14 bytes
    assert_eq!(words(&bench)[..2], [0x7f, 0x03]);
    assert_eq!(words(&bench)[6..14], [0; 8], "the low 16 bits of both pointers, and selectors");

    bench.leave_long_mode(false);
    bench.cpu.state.gpr[3] = DATA;
    bench.run(&[0x67, 0x66, 0xd9, 0x73, 0x40]).unwrap(); // real mode, 28 bytes
    let image = words(&bench);
    assert_eq!(image[12..16], [0; 4]);
    assert_eq!(image[16..20], (0x1000_u32 | 3).to_le_bytes(), "linear address bits 31:16, opcode");
    assert_eq!(image[24..28], 0x2000_u32.to_le_bytes());
    bench.run(&[0x67, 0x66, 0xd9, 0x63, 0x40]).unwrap();
    assert_eq!(bench.cpu.state.xsave.u64(8), CODE);
}
