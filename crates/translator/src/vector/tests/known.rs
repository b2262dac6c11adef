//! Known answers: what each kind of instruction does to registers, memory, flags and exceptions.

use engine::cpu_model::Feature;
use engine::state::{cr0, cr4, rflags};

use super::*;
use crate::cpu::vector::{GP, MF, NM, UD, XM};

/// Four single-precision numbers.
fn singles(values: [f32; 4]) -> u128 {
    values.iter().rev().fold(0, |all, value| all << 32 | u128::from(value.to_bits()))
}

const UPPER: u128 = 0x1111_2222_3333_4444_5555_6666_7777_8888;

#[test]
fn moves_keep_or_clear_the_upper_half() {
    let mut bench = Bench::new();
    bench.put(DATA, &[0xaa; 32]);
    bench.cpu.state.gpr[0] = DATA;
    let all = u128::from_le_bytes([0xaa; 16]);
    bench.set(3, 1, UPPER);
    bench.run(&[0x0f, 0x10, 0x18]).unwrap(); // movups xmm3, [rax]
    assert_eq!(bench.vector(3), (all, UPPER));
    bench.run(&[0xc5, 0xf8, 0x10, 0x18]).unwrap(); // vmovups xmm3, [rax]
    assert_eq!(bench.vector(3), (all, 0));
    bench.run(&[0xc5, 0xfc, 0x10, 0x18]).unwrap(); // vmovups ymm3, [rax]
    assert_eq!(bench.vector(3), (all, all));
    bench.run(&[0xf3, 0x0f, 0x10, 0x18]).unwrap(); // movss xmm3, [rax]
    assert_eq!(bench.vector(3), (0xaaaa_aaaa, all));
    bench.set(1, 7, 0);
    bench.run(&[0xf2, 0x0f, 0x10, 0xd9]).unwrap(); // movsd xmm3, xmm1
    assert_eq!(bench.vector(3), (7, all));
    bench.cpu.state.gpr[2] = u64::MAX;
    bench.set(3, 0x1234_5678_9abc_def0, 0);
    bench.run(&[0x66, 0x0f, 0x7e, 0xda]).unwrap(); // movd edx, xmm3
    assert_eq!(bench.cpu.state.gpr[2], 0x9abc_def0);
    bench.run(&[0xc4, 0xe1, 0xf9, 0x7e, 0xda]).unwrap(); // vmovq rdx, xmm3
    assert_eq!(bench.cpu.state.gpr[2], 0x1234_5678_9abc_def0);
    bench.set(9, UPPER, UPPER);
    bench.run(&[0x66, 0x45, 0x0f, 0xef, 0xc9]).unwrap(); // pxor xmm9, xmm9
    assert_eq!(bench.vector(9), (0, UPPER));
    bench.run(&[0xc5, 0xf8, 0x77]).unwrap(); // vzeroupper
    assert_eq!(bench.vector(9), (0, 0));
}

#[test]
fn arithmetic_on_registers_and_memory() {
    let mut bench = Bench::new();
    bench.cpu.state.gpr[0] = DATA;
    bench.put(DATA, &singles([1.0, 2.0, 3.0, 4.0]).to_le_bytes());
    bench.set(11, singles([0.5; 4]), UPPER);
    bench.run(&[0x44, 0x0f, 0x58, 0x18]).unwrap(); // addps xmm11, [rax]
    assert_eq!(bench.vector(11), (singles([1.5, 2.5, 3.5, 4.5]), UPPER));
    assert_eq!(bench.mxcsr(), 0x1f80);
    bench.run(&[0xc4, 0x41, 0x20, 0x58, 0xc3]).unwrap(); // vaddps xmm8, xmm11, xmm11
    assert_eq!(bench.vector(8), (singles([3.0, 5.0, 7.0, 9.0]), 0));
    bench.set(1, 5, 6);
    bench.set(2, 10, 20);
    bench.run(&[0xc5, 0xed, 0xd4, 0xc1]).unwrap(); // vpaddq ymm0, ymm2, ymm1
    assert_eq!(bench.vector(0), (15, 26));
}

#[test]
fn general_registers_and_flags() {
    let mut bench = Bench::new();
    bench.set(1, u128::MAX << 120, 0);
    bench.cpu.state.gpr[13] = u64::MAX;
    bench.run(&[0x66, 0x44, 0x0f, 0xd7, 0xe9]).unwrap(); // pmovmskb r13d, xmm1
    assert_eq!(bench.cpu.state.gpr[13], 0x8000);
    bench.cpu.state.gpr[7] = -3_i64 as u64;
    bench.run(&[0xf2, 0x48, 0x0f, 0x2a, 0xd7]).unwrap(); // cvtsi2sd xmm2, rdi
    assert_eq!(bench.vector(2).0 as u64, (-3.0_f64).to_bits());
    bench.cpu.flags.set_status(rflags::STATUS);
    bench.run(&[0x66, 0x0f, 0x2e, 0xd2]).unwrap(); // ucomisd xmm2, xmm2
    assert_eq!(bench.cpu.flags.status(), rflags::ZF);
    bench.set(3, f64::NAN.to_bits().into(), 0);
    bench.run(&[0x66, 0x0f, 0x2e, 0xd3]).unwrap(); // ucomisd xmm2, xmm3
    assert_eq!(bench.cpu.flags.status(), rflags::ZF | rflags::PF | rflags::CF);
    // pcmpestri xmm1, xmm2, 0: implicit lengths in, ECX out.
    bench.set(1, u128::from_le_bytes(*b"xyz............."), 0);
    bench.set(2, u128::from_le_bytes(*b"abcz............"), 0);
    bench.cpu.state.gpr[0] = 3;
    bench.cpu.state.gpr[2] = 4;
    bench.cpu.state.gpr[1] = u64::MAX;
    bench.run(&[0x66, 0x0f, 0x3a, 0x61, 0xca, 0x00]).unwrap();
    assert_eq!(bench.cpu.state.gpr[1], 3);
    assert_eq!(bench.cpu.flags.status() & rflags::CF, rflags::CF);
}

#[test]
fn implicit_xmm0_is_a_mask() {
    let mut bench = Bench::new();
    bench.set(0, 0x80, 0);
    bench.set(4, 0x1111, 0);
    bench.set(5, 0x2222, 0);
    bench.run(&[0x66, 0x0f, 0x38, 0x10, 0xe5]).unwrap(); // pblendvb xmm4, xmm5, xmm0
    assert_eq!(bench.vector(4).0, 0x1122);
}

#[test]
fn alignment_is_checked_before_anything_else() {
    let mut bench = Bench::new();
    bench.cpu.state.gpr[0] = DATA + 1;
    bench.set(3, 9, 9);
    assert_eq!(bench.run(&[0x0f, 0x28, 0x18]), exception(GP)); // movaps xmm3, [rax]
    assert_eq!(bench.run(&[0x0f, 0x58, 0x18]), exception(GP)); // addps xmm3, [rax]
    assert_eq!(bench.run(&[0xc5, 0xfd, 0x6f, 0x18]), exception(GP)); // vmovdqa ymm3, [rax]
    assert_eq!(bench.vector(3), (9, 9));
    bench.run(&[0x0f, 0x10, 0x18]).unwrap(); // movups
    bench.run(&[0xc5, 0xe0, 0x58, 0x18]).unwrap(); // vaddps xmm3, xmm3, [rax]
    bench.cpu.state.gpr[0] = DATA + 16;
    assert_eq!(bench.run(&[0xc5, 0xfd, 0x6f, 0x18]), exception(GP)); // vmovdqa ymm wants 32
}

#[test]
fn a_fault_on_the_second_page_leaves_the_first_alone() {
    let mut bench = Bench::new();
    bench.cpu.state.gpr[0] = HOLE - 8;
    bench.put(HOLE - 8, &[0x77; 8]);
    bench.set(3, 1, 2);
    assert_eq!(bench.run(&[0x0f, 0x11, 0x18]), page_fault(HOLE, 2)); // movups [rax], xmm3
    assert_eq!(bench.get::<8>(HOLE - 8), [0x77; 8]);
    assert_eq!(bench.run(&[0x0f, 0x10, 0x18]), page_fault(HOLE, 0));
    assert_eq!(bench.vector(3), (1, 2));
    bench.cpu.state.gpr[0] = DATA + 0xff8;
    bench.run(&[0x0f, 0x11, 0x18]).unwrap();
    bench.run(&[0xc5, 0xf8, 0x10, 0x20]).unwrap(); // vmovups xmm4, [rax]
    assert_eq!(bench.vector(4), (1, 0));
}

#[test]
fn control_registers_gate_instructions() {
    let addps: &[u8] = &[0x0f, 0x58, 0xc1];
    let vaddps: &[u8] = &[0xc5, 0xf0, 0x58, 0xc1];
    let paddb: &[u8] = &[0x0f, 0xfc, 0xc1];
    let fld1: &[u8] = &[0xd9, 0xe8];
    type Case = (fn(&mut Cpu), [Option<u8>; 4]);
    let cases: [Case; 7] = [
        (|_| {}, [None; 4]),
        (|cpu| cpu.state.cr0 |= cr0::TS, [Some(NM); 4]),
        (|cpu| cpu.state.cr0 |= cr0::EM, [Some(UD), None, Some(UD), Some(NM)]),
        (|cpu| cpu.state.cr0 |= cr0::EM | cr0::TS, [Some(UD), Some(NM), Some(UD), Some(NM)]),
        (|cpu| cpu.state.cr4 &= !cr4::OSFXSR, [Some(UD), None, None, None]),
        (|cpu| cpu.state.cr4 &= !cr4::OSXSAVE, [None, Some(UD), None, None]),
        (|cpu| cpu.state.xcr0 = 3, [None, Some(UD), None, None]),
    ];
    for (number, (change, expected)) in cases.into_iter().enumerate() {
        for (bytes, expected) in [addps, vaddps, paddb, fld1].into_iter().zip(expected) {
            let mut bench = Bench::new();
            change(&mut bench.cpu);
            let expected = expected.map_or(Ok(()), exception);
            assert_eq!(bench.run(bytes), expected, "case {number}: {bytes:x?}");
        }
    }
}

#[test]
fn what_the_model_lacks_is_undefined() {
    let mut bench = Bench::with(|feature| !matches!(feature, Feature::Avx | Feature::Sse42 | Feature::Xsave));
    assert_eq!(bench.run(&[0xc5, 0xf0, 0x58, 0xc1]), exception(UD)); // vaddps
    assert_eq!(bench.run(&[0x66, 0x0f, 0x38, 0x37, 0xc1]), exception(UD)); // pcmpgtq
    assert_eq!(bench.run(&[0x0f, 0x01, 0xd0]), exception(UD)); // xgetbv
    let mut bench = Bench::new();
    assert_eq!(bench.run(&[0x62, 0xf1, 0x7c, 0x48, 0x58, 0xc1]), exception(UD)); // vaddps zmm
    assert_eq!(bench.run(&[0x0f, 0x0e]), exception(UD)); // femms
    assert_eq!(bench.run(&[0x66, 0x0f, 0x79, 0xc1]), exception(UD)); // extrq
}

/// Each SIMD exception, masked and unmasked, with an instruction on XMM0 (XMM1) that raises it.
#[test]
fn each_simd_exception() {
    let (add, mul, div): (&[u8], &[u8], &[u8]) =
        (&[0xf3, 0x0f, 0x58, 0xc1], &[0xf3, 0x0f, 0x59, 0xc1], &[0xf3, 0x0f, 0x5e, 0xc1]);
    let tiny = f32::from_bits(1);
    let cases = [
        (0, add, f32::INFINITY, f32::NEG_INFINITY, 0x01),
        (1, add, tiny, 1.0, 0x22),
        (2, div, 1.0, 0.0, 0x04),
        (3, mul, f32::MAX, f32::MAX, 0x28),
        (4, mul, f32::MIN_POSITIVE, 0.3, 0x30),
        (5, div, 1.0, 3.0, 0x20),
    ];
    for (flag, bytes, a, b, raised) in cases {
        let mut bench = Bench::new();
        bench.set(0, a.to_bits().into(), UPPER);
        bench.set(1, b.to_bits().into(), 0);
        bench.run(bytes).unwrap();
        assert_eq!(bench.mxcsr(), 0x1f80 | raised, "flag {flag}");
        assert_ne!(bench.vector(0).0, a.to_bits().into());

        for (enabled, vector) in [(cr4::OSXMMEXCPT, XM), (0, UD)] {
            bench.cpu.state.cr4 = bench.cpu.state.cr4 & !cr4::OSXMMEXCPT | enabled;
            bench.set(0, a.to_bits().into(), UPPER);
            let unmasked = 0x1f80 & !(0x80 << flag);
            bench.set_mxcsr(unmasked);
            assert_eq!(bench.run(bytes), exception(vector), "flag {flag}");
            assert_eq!(bench.vector(0), (a.to_bits().into(), UPPER), "flag {flag}: nothing is written");
            let flags = if flag < 3 { 1 << flag } else { raised };
            assert_eq!(bench.mxcsr(), unmasked | flags, "flag {flag}");
        }
    }
}

#[test]
fn an_unmasked_underflow_needs_no_inexactness() {
    let mut bench = Bench::new();
    bench.set(0, f32::MIN_POSITIVE.to_bits().into(), 0);
    bench.set(1, 0.5_f32.to_bits().into(), 0);
    bench.set_mxcsr(0x1f80 & !0x800);
    assert_eq!(bench.run(&[0xf3, 0x0f, 0x59, 0xc1]), exception(XM)); // mulss: exactly half of the smallest normal
}

#[test]
fn x87_arithmetic_and_pointers() {
    let mut bench = Bench::new();
    bench.cpu.state.gpr[3] = DATA;
    bench.put(DATA, &2.5_f64.to_le_bytes());
    bench.run(&[0xdb, 0xe3]).unwrap(); // fninit
    bench.run(&[0xd9, 0xe8]).unwrap(); // fld1
    bench.run(&[0xdc, 0x03]).unwrap(); // fadd qword [rbx]
    let area = &bench.cpu.state.xsave;
    assert_eq!((area.u64(8), area.u64(16), area.u16(6)), (CODE, DATA, 0x403), "the guest's pointers");
    bench.run(&[0xdd, 0x5b, 0x08]).unwrap(); // fstp qword [rbx+8]
    assert_eq!(f64::from_le_bytes(bench.get(DATA + 8)), 3.5);
    assert_eq!(bench.cpu.state.xsave.u64(16), DATA + 8);
    assert_eq!(bench.cpu.state.xsave.0[4], 0, "the stack is empty again");
    bench.run(&[0xd9, 0xe8]).unwrap();
    bench.run(&[0xdb, 0xf0]).unwrap(); // fcomi st0, st0
    assert_eq!(bench.cpu.flags.status(), rflags::ZF);
    bench.run(&[0xd9, 0xee]).unwrap(); // fldz
    bench.cpu.flags.set_status(rflags::CF);
    bench.run(&[0xda, 0xc1]).unwrap(); // fcmovb st0, st1
    bench.run(&[0xd9, 0x1b]).unwrap(); // fstp dword [rbx]
    assert_eq!(f32::from_le_bytes(bench.get(DATA)), 1.0);
}

#[test]
fn x87_exceptions_wait_for_the_next_instruction() {
    let mut bench = Bench::new();
    bench.cpu.state.gpr[3] = DATA;
    bench.put(DATA, &0x037b_u16.to_le_bytes()); // divide by zero unmasked
    bench.run(&[0xd9, 0x2b]).unwrap(); // fldcw [rbx]
    bench.run(&[0xd9, 0xe8]).unwrap(); // fld1
    bench.run(&[0xd9, 0xee]).unwrap(); // fldz
    bench.run(&[0xdc, 0xf9]).unwrap(); // fdiv st1, st0
    assert_eq!(bench.cpu.state.xsave.u16(2) & 0x8084, 0x8084);
    assert_eq!(bench.run(&[0xd9, 0xe8]), exception(MF));
    assert_eq!(bench.run(&[0x9b]), exception(MF));
    assert_eq!(bench.run(&[0x0f, 0xfc, 0xc1]), exception(MF)); // paddb mm0, mm1
    bench.run(&[0xdf, 0xe0]).unwrap(); // fnstsw ax
    assert_eq!(bench.cpu.state.gpr[0] & 0x84, 0x84);
    bench.cpu.state.cr0 &= !cr0::NE;
    bench.run(&[0xd9, 0xe8]).unwrap();
    assert_eq!(bench.cpu.state.xsave.u16(2) & 0x8084, 0x8084, "still pending, still not delivered");
    bench.cpu.state.cr0 |= cr0::NE;
    bench.run(&[0xdb, 0xe2]).unwrap(); // fnclex
    bench.run(&[0x9b]).unwrap();
}

#[test]
fn mmx_turns_the_stack_to_its_top() {
    let mut bench = Bench::new();
    bench.run(&[0xd9, 0xe8]).unwrap(); // fld1: TOP 7, ST(0) is physical register 7
    bench.run(&[0x0f, 0x6f, 0xc7]).unwrap(); // movq mm0, mm7
    let area = &bench.cpu.state.xsave;
    assert_eq!((area.top(), area.0[4]), (0, 0xff));
    assert_eq!((area.u64(32), area.u16(40)), (1 << 63, 0xffff));
    bench.run(&[0x0f, 0x77]).unwrap(); // emms
    assert_eq!(bench.cpu.state.xsave.0[4], 0);
}

#[test]
fn mxcsr_takes_the_bits_that_fxsave_names() {
    let mut bench = Bench::new();
    bench.cpu.state.gpr[0] = DATA;
    bench.run(&[0x0f, 0xae, 0x00]).unwrap(); // fxsave
    let mask = u32::from_le_bytes(bench.get(DATA + 28));
    for bit in 0..32 {
        bench.put(DATA, &(0x1f80 | 1_u32 << bit).to_le_bytes());
        let wanted = if mask >> bit & 1 == 0 { exception(GP) } else { Ok(()) };
        assert_eq!(bench.run(&[0x0f, 0xae, 0x10]), wanted, "bit {bit}"); // ldmxcsr
    }
    bench.put(DATA, &0x9fc0_u32.to_le_bytes());
    bench.run(&[0x0f, 0xae, 0x10]).unwrap();
    bench.run(&[0x0f, 0xae, 0x58, 0x04]).unwrap(); // stmxcsr [rax+4]
    assert_eq!(bench.get::<4>(DATA + 4), 0x9fc0_u32.to_le_bytes());
}
