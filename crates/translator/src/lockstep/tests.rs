//! Programs in lockstep, and mistakes that must be found.

use engine::ledger::Work;
use engine::{Exit, Vcpu};
use memory::Gpa;

use crate::bare::{Bare, CODE};
use crate::config::{Check, Config};

/// Where the program has its array, and room behind it.
const DATA: u64 = 0x10_0000;

const CONFIG: Config =
    Config { code_cache: 1 << 20, check: Check::Lockstep, translate: true, count: false, classic: false };

/// Fills an array, adds it up by a function, with the stack, an access across two pages and vectors.
const PROGRAM: [u8; 84] = [
    0xbf, 0x00, 0x00, 0x10, 0x00, // mov edi, DATA
    0x31, 0xc9, // xor ecx, ecx
    0x89, 0x0c, 0x8f, // fill: mov [rdi+rcx*4], ecx
    0xff, 0xc1, // inc ecx
    0x81, 0xf9, 0x00, 0x08, 0x00, 0x00, // cmp ecx, 2048
    0x75, 0xf3, // jne fill
    0x31, 0xc0, // xor eax, eax
    0xe8, 0x2e, 0x00, 0x00, 0x00, // call sum
    0x48, 0xff, 0xc0, // inc rax
    0x48, 0xff, 0x07, // inc qword [rdi]
    0x48, 0x89, 0x87, 0xfc, 0x0f, 0x00, 0x00, // mov [rdi+0xffc], rax
    0x66, 0x48, 0x0f, 0x6e, 0xc0, // movq xmm0, rax
    0xc5, 0xfd, 0x58, 0xc8, // vaddpd ymm1, ymm0, ymm0
    0xc5, 0xfe, 0x7f, 0x4f, 0x60, // vmovdqu [rdi+0x60], ymm1
    0x9c, // pushfq
    0x5a, // pop rdx
    0xf0, 0x0f, 0xc1, 0x47, 0x40, // lock xadd [rdi+0x40], eax
    0x48, 0x8d, 0x1d, 0x02, 0x00, 0x00, 0x00, // lea rbx, end
    0xff, 0xe3, // jmp rbx
    0xf4, // end: hlt
    0xf4, 0xf4, // padding
    0x51, // sum: push rcx
    0x03, 0x44, 0x8f, 0xfc, // again: add eax, [rdi+rcx*4-4]
    0xff, 0xc9, // dec ecx
    0x75, 0xf8, // jne again
    0x59, // pop rcx
    0xc3, // ret
];

/// What the program leaves in RAX, by its arithmetic: the sum, and then what was in memory.
const SUM: u64 = 2047 * 2048 / 2;

fn ends_well(bare: &mut Bare) {
    let (exit, state) = bare.run();
    assert_eq!(exit, Exit::Halted, "{}", bare.vcpu.difference().unwrap_or_default());
    assert_eq!(state.gpr[0], 16, "what stood in memory before XADD");
    let mut bytes = [0; 8];
    bare.ram.read(Gpa(DATA + 0xffc), &mut bytes).unwrap();
    assert_eq!(u64::from_le_bytes(bytes), SUM + 1);
}

#[test]
fn a_program_in_lockstep_does_what_it_does_without() {
    let mut alone = Bare::new(&PROGRAM, Config::default());
    ends_well(&mut alone);
    let mut bare = Bare::new(&PROGRAM, CONFIG);
    ends_well(&mut bare);
    assert!(bare.ledger.worked(Work::Compared) > 4000, "each round of both loops");
    let mut memory = [vec![0; 0x4000], vec![0; 0x4000]];
    for (bare, memory) in [&alone, &bare].into_iter().zip(&mut memory) {
        bare.ram.read(Gpa(DATA), memory).unwrap();
    }
    assert!(memory[0] == memory[1]);
}

#[test]
fn a_wrong_register_is_found_and_named() {
    let mut bare = Bare::new(&PROGRAM, CONFIG);
    bare.vcpu.jit.as_mut().unwrap().wrong = true;
    let (exit, state) = bare.run();
    assert_eq!(exit, Exit::Difference);
    // The block after the call; its first instruction is the wrong one, and nothing of it has happened.
    assert_eq!((state.rip, state.gpr[0]), (CODE + 0x1b, SUM));
    let report = bare.vcpu.difference().unwrap();
    let field = |name: &str| report.lines().find(|line| line.starts_with(name)).unwrap_or_default();
    assert!(report.starts_with("block at 0x1001b (guest-physical 0x1001b, CPL 0):\n"), "{report}");
    assert!(report.contains("48 ff c0") && report.contains("inc"), "{report}");
    assert!(field("rax").ends_with("<- differs"), "{report}");
    assert!(!field("rcx").contains("differs"), "{report}");
    assert!(report.contains("memory 0x100000: before 0x00, 0x01, 0xff  <- differs"), "{report}");
    assert_eq!(bare.vcpu.difference(), None);
    let mut byte = [7];
    bare.ram.read(Gpa(DATA), &mut byte).unwrap();
    assert_eq!(byte, [0], "memory is as before, too");
}
