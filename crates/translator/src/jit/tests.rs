//! Whole runs of translated code.

use engine::ledger::Work;
use engine::state::rflags;
use engine::{Exit, Phase, Profile, Vcpu as _};
use memory::Gpa;

use crate::bare::{Bare, CODE, DATA, LARGE, PRESENT_WRITABLE, TABLES};
use crate::config::{Config, LEAST_CODE_CACHE};

/// Links of a chain of blocks: direct and indirect jumps, and calls that never return.
const LINKS: u64 = 3000;
const ROUNDS: u64 = 5;

/// A loop over the chain; each link adds one to RAX.
fn chain() -> Vec<u8> {
    let mut code = vec![0xbb, ROUNDS as u8, 0, 0, 0]; // mov ebx, ROUNDS
    let start = code.len();
    for link in 0..LINKS {
        code.extend([0x48, 0xff, 0xc0]); // inc rax
        match link % 3 {
            0 => code.extend([0xeb, 0]),                                  // jmp on
            1 => code.extend([0x48, 0x8d, 0x15, 2, 0, 0, 0, 0xff, 0xe2]), // lea rdx, on; jmp rdx
            _ => code.extend([0xe8, 0, 0, 0, 0, 0x59]),                   // call on; pop rcx
        }
    }
    code.extend([0x48, 0xff, 0xcb, 0x0f, 0x85]); // dec rbx; jnz start
    let back = start as i32 - (code.len() as i32 + 4);
    code.extend(back.to_le_bytes());
    code.push(0xf4); // hlt
    code
}

#[test]
fn a_full_code_cache_is_emptied_and_filled_again() {
    for (code_cache, emptied) in [(LEAST_CODE_CACHE, true), (Config::default().code_cache, false)] {
        let mut bare = Bare::new(&chain(), Config { code_cache, ..Config::default() });
        let (exit, state) = bare.run();
        assert_eq!((exit, state.gpr[0], state.gpr[3]), (Exit::Halted, LINKS * ROUNDS, 0));
        assert_eq!(bare.ledger.worked(Work::CacheEmptied) > 0, emptied);
        let translated = bare.ledger.worked(Work::Translate);
        assert!(if emptied { translated > LINKS } else { (LINKS / 3..LINKS).contains(&translated) }, "{translated}");
    }
}

#[test]
fn without_translation_nothing_is_translated() {
    let mut bare = Bare::new(&chain(), Config { translate: false, ..Config::default() });
    let (exit, state) = bare.run();
    assert_eq!((exit, state.gpr[0]), (Exit::Halted, LINKS * ROUNDS));
    assert_eq!(bare.ledger.worked(Work::Translate), 0);
    assert!(bare.ledger.worked(Work::Instructions) > LINKS * ROUNDS);
}

#[test]
fn a_handlers_return_with_rf_costs_nothing_without_code_breakpoints() {
    // mov eax, 1; hlt
    let run = |rf: u64, dr7: u64| {
        let mut bare = Bare::new(&[0xb8, 1, 0, 0, 0, 0xf4], Config::default());
        let mut state = bare.vcpu.save();
        (state.rflags, state.dr7, state.dr[0]) = (state.rflags | rf, dr7, state.rip);
        bare.vcpu.load(&state).unwrap();
        let (exit, state) = bare.run();
        (exit, state.rflags & rflags::RF, bare.ledger.worked(Work::Instructions))
    };
    let without = run(0, 0);
    assert_eq!((without.0, without.1), (Exit::Halted, 0));
    assert_eq!(run(rflags::RF, 0), without, "the same, interpreted instructions too");
    assert_eq!(run(0, 1).0, Exit::Shutdown, "a breakpoint, and nobody to handle it");
    assert_eq!(run(rflags::RF, 1).0, Exit::Halted, "held back");
}

#[test]
fn blocks_whose_bytes_are_overwritten_are_dropped_and_counted() {
    // mov eax, 1; hlt; jmp back
    let mut bare = Bare::new(&[0xb8, 1, 0, 0, 0, 0xf4, 0xeb, 0xf8], Config::default());
    assert_eq!(bare.run().1.gpr[0], 1);
    assert_eq!(bare.ledger.worked(Work::SelfModified), 0);
    bare.ram.write(Gpa(CODE + 1), &[2]).unwrap();
    assert_eq!(bare.run().1.gpr[0], 1, "halted");
    let mut state = bare.run().1;
    (state.halted, state.rip) = (false, CODE);
    engine::Vcpu::load(&mut bare.vcpu, &state).unwrap();
    assert_eq!(bare.run().1.gpr[0], 2);
    assert!(bare.ledger.worked(Work::SelfModified) > 0);
}

/// Entries of the page directory that have the first 2 MiB of memory once more.
const AGAIN: [u64; 2] = [1, 128];
const HIGHER: u64 = AGAIN[0] << 21;

/// Calls a function at `function` from the code's start, and once more where its page is a second time; it adds an address
/// relative to its own to RAX.
fn twice(function: usize) -> Vec<u8> {
    let mut code = vec![0xbb, ROUNDS as u8, 0, 0, 0, 0x48, 0x8d, 0x15]; // mov ebx, ROUNDS; again: lea rdx, function
    code.extend((function as i32 - 12).to_le_bytes());
    code.extend([0xff, 0xd2, 0x48, 0x81, 0xc2, 0, 0, 0x20, 0, 0xff, 0xd2]); // call rdx; add rdx, HIGHER; call rdx
    code.extend([0x48, 0xff, 0xcb, 0x75, 0xe9, 0xf4]); // dec rbx; jnz again; hlt
    code.resize(function, 0xcc);
    code.extend([0x48, 0x8d, 0x0d, 0, 0, 0, 0, 0x48, 0x01, 0xc8, 0xc3]); // lea rcx, [rip]; add rax, rcx; ret
    code
}

fn with_memory_again(code: &[u8]) -> Bare {
    let bare = Bare::new(code, Config::default());
    for entry in AGAIN {
        bare.ram.write_value(Gpa(TABLES + 0x2000 + 8 * entry), &(PRESENT_WRITABLE | LARGE)).unwrap();
    }
    bare
}

#[test]
fn code_is_translated_once_wherever_it_is() {
    for function in [0x40, 0x1040, 0xffc] {
        let mut bare = with_memory_again(&twice(function));
        let sum = |moved: u64| ROUNDS * (2 * (CODE + function as u64 + 7 + moved) + HIGHER);
        assert_eq!(bare.run().1.gpr[0], sum(0), "{function:#x}");
        let translated = bare.ledger.worked(Work::Translate);
        let mut state = bare.run().1;
        (state.halted, state.rip, state.gpr[0]) = (false, CODE + HIGHER, 0);
        engine::Vcpu::load(&mut bare.vcpu, &state).unwrap();
        bare.ram.write_value(Gpa(TABLES + 0x2000 + 16), &(PRESENT_WRITABLE | LARGE)).unwrap();
        assert_eq!(bare.run().1.gpr[0], sum(HIGHER), "{function:#x}, moved");
        // Once more, but for what ended a block the first time.
        assert!(bare.ledger.worked(Work::Translate) <= translated + 1, "{function:#x}");
    }
}

#[test]
fn a_page_that_is_nowhere_is_not_found_by_the_address_that_says_so() {
    // Of this address the landing table's slot is that of `wild`, which a page that is nowhere seems to have.
    let (function, linear) = (0x2_f100_usize, (AGAIN[1] << 21) + 0x3_f100);
    let wild = 0x100_u64.wrapping_sub(crate::home::NOWHERE);
    assert_eq!(super::thunk::landing_of(linear), super::thunk::landing_of(wild));
    let mut code = vec![0x48, 0xba]; // mov rdx, linear
    code.extend(linear.to_le_bytes());
    code.extend([0xff, 0xd2, 0xff, 0xd2]); // call rdx, twice
    code.extend([0x0f, 0x20, 0xd9, 0x0f, 0x22, 0xd9, 0x48, 0xba]); // mov rcx, cr3; mov cr3, rcx; mov rdx, wild
    code.extend(wild.to_le_bytes());
    code.extend([0xff, 0xd2, 0xf4]); // call rdx; hlt
    code.resize(function, 0xcc);
    code.extend([0x48, 0xff, 0xc0, 0xc3]); // inc rax; ret
    let mut bare = with_memory_again(&code);
    let (exit, state) = bare.run();
    assert_eq!((exit, state.gpr[0]), (Exit::Shutdown, 2));
}

/// Pushes 1 to 4, pops them in order into R15, R9, RBX and RAX, and halts. The stack pointer is `stack`.
fn pushes_and_pops(stack: u64) -> Vec<u8> {
    let mut code = vec![0x48, 0xbc]; // mov rsp, stack
    code.extend(stack.to_le_bytes());
    code.extend([0x6a, 1, 0x6a, 2, 0x6a, 3, 0x6a, 4, 0x41, 0x5f, 0x41, 0x59, 0x5b, 0x58, 0xf4]);
    code
}

#[test]
fn a_group_of_stack_accesses_may_lie_across_pages() {
    for stack in [0x18_0800, 0x18_0018, 0x18_0020] {
        let mut bare = Bare::new(&pushes_and_pops(stack), Config::default());
        for _ in 0..3 {
            let (exit, state) = bare.run();
            let popped = [15, 9, 3, 0].map(|register| state.gpr[register]);
            assert_eq!((exit, popped, state.gpr[4]), (Exit::Halted, [4, 3, 2, 1], stack));
            let mut again = state;
            (again.halted, again.rip) = (false, CODE);
            engine::Vcpu::load(&mut bare.vcpu, &again).unwrap();
        }
        assert_eq!(bare.ram.read_value::<u64>(Gpa(stack - 32)).unwrap(), 4);
    }
}

#[test]
fn stack_accesses_as_far_away_as_they_can_be_are_no_group() {
    let mut code = vec![0x48, 0xbc]; // mov rsp, ...
    code.extend((0x8000_0000_u64 + 0x10_0f00).to_le_bytes());
    for register in [0, 1, 2] {
        code.extend([0x48, 0x8b, 0x84 | register << 3, 0x24, 0, 0, 0, 0x80]); // mov register, [rsp - 0x80000000]
        code.extend([0x48, 0x81, 0xec, 0, 2, 0, 0]); // sub rsp, 0x200
    }
    code.push(0xf4);
    let mut bare = Bare::new(&code, Config::default());
    for (at, value) in [(0x10_0f00, 1_u64), (0x10_0d00, 2), (0x10_0b00, 3)] {
        bare.ram.write_value(Gpa(at), &value).unwrap();
    }
    let (exit, state) = bare.run();
    assert_eq!((exit, state.gpr[..3].to_vec()), (Exit::Halted, vec![1, 2, 3]));
}

#[test]
fn a_group_faults_at_the_access_that_does() {
    let bottom = AGAIN[1] << 21; // nothing is mapped below
    let mut bare = with_memory_again(&pushes_and_pops(bottom + 16));
    let (exit, state) = bare.run();
    assert_eq!((exit, state.cr2, state.gpr[4]), (Exit::Shutdown, bottom - 8, bottom));
    assert_eq!(state.rip, CODE + 10 + 2 * 2, "the third push");
    assert_eq!(bare.ram.read_value::<u64>(Gpa(0)).unwrap(), 2);
}

#[test]
fn a_call_returns_into_what_was_written_there_meanwhile() {
    // call function; mov eax, 1; hlt; function: mov byte [the constant], 2; ret
    let code = [0xe8, 6, 0, 0, 0, 0xb8, 1, 0, 0, 0, 0xf4, 0xc6, 5, 0xf4, 0xff, 0xff, 0xff, 2, 0xc3];
    let mut bare = Bare::new(&code, Config::default());
    let (exit, state) = bare.run();
    assert_eq!((exit, state.gpr[0]), (Exit::Halted, 2));
    assert!(bare.ledger.worked(Work::SelfModified) > 0);
}

#[test]
fn instructions_are_counted_where_that_is_asked_for() {
    // Two jumps a round: one that is taken every other time, and the loop's.
    let code = [
        0xb9, 0xe8, 0x03, 0x00, 0x00, // mov ecx, 1000
        0xf6, 0xc1, 0x01, // again: test cl, 1
        0x74, 0x03, // jz even
        0x48, 0xff, 0xc0, // inc rax
        0x48, 0xff, 0xc9, // even: dec rcx
        0x75, 0xf3, // jnz again
        0xf4, // hlt
    ];
    for (count, counted) in [(true, 1 + 1000 * 4 + 500 + 1), (false, 0)] {
        let mut bare = Bare::new(&code, Config { count, ..Config::default() });
        let (exit, state) = bare.run();
        assert_eq!((exit, state.gpr[0]), (Exit::Halted, 500));
        assert_eq!(bare.ledger.worked(Work::NativeInstructions), counted);
    }
}

#[test]
fn a_loop_is_entered_inside_the_block_that_leads_to_it() {
    let mut code = [
        0xb9, 0xe8, 0x03, 0x00, 0x00, // mov ecx, 1000
        0x48, 0xff, 0xc0, // again: inc rax
        0x48, 0xff, 0xc9, // dec rcx
        0x75, 0xf8, // jnz again
        0x48, 0xff, 0xc0, // inc rax
        0xf4, // hlt
    ];
    let mut bare = Bare::new(&code, Config::default());
    for (second, result, blocks) in [(0xc0, 1001, 1), (0xc8, 999, 2), (0xc8, 999, 2), (0xc0, 1001, 3)] {
        code[15] = second; // inc rax, dec rax
        // What was translated goes with all that is inside it, and comes back where the bytes are the same.
        bare.ram.write(Gpa(CODE + 5), &code[5..]).unwrap();
        let (exit, mut state) = bare.run();
        assert_eq!((exit, state.gpr[0]), (Exit::Halted, result));
        assert_eq!(bare.ledger.worked(Work::Translate), blocks, "once, and once more when it has changed");
        (state.halted, state.rip, state.gpr[0]) = (false, CODE, 0);
        bare.vcpu.load(&state).unwrap();
    }
}

#[test]
fn a_block_stays_where_its_page_is_overwritten_elsewhere() {
    // mov eax, [rsi]; jmp over 200 bytes to xor ecx, ecx, so that no flags are needed before; hlt
    let mut code = vec![0x8b, 0x06, 0xe9, 200, 0, 0, 0];
    code.resize(207, 0xcc);
    code.extend([0x31, 0xc9, 0xf4]);
    let mut bare = Bare::new(&code, Config::default());
    let mut blocks = |at: usize, byte: u8| {
        bare.ram.write(Gpa(CODE + at as u64), &[byte]).unwrap();
        let mut state = bare.vcpu.save();
        (state.halted, state.rip, state.gpr[6]) = (false, CODE, DATA);
        bare.vcpu.load(&state).unwrap();
        let before = bare.ledger.worked(Work::Translate);
        let (exit, state) = bare.run();
        (exit, state.rip - CODE, bare.ledger.worked(Work::Translate) - before)
    };
    let end = code.len() as u64;
    assert_eq!(blocks(100, 0xcc), (Exit::Halted, end, 2));
    assert_eq!(blocks(30, 0x90), (Exit::Halted, end, 0), "beside both");
    assert_eq!(
        blocks(208, 0xd2),
        (Exit::Halted, end, 2),
        "where flags were followed, and the block there: xor edx, edx"
    );
    assert_eq!(blocks(208, 0xd2), (Exit::Halted, end, 0), "the same byte");
    assert_eq!(blocks(0, 0x8a), (Exit::Halted, end, 1), "the first one's own: mov al, [rsi]");
    assert_eq!(blocks(0, 0x8a), (Exit::Halted, end, 0), "the same byte");
}

#[test]
fn what_is_translated_is_counted_in_blocks_instructions_and_bytes() {
    let mut bare = Bare::new(&chain(), Config::default());
    bare.run();
    let [blocks, instructions, bytes] =
        [Work::Translate, Work::TranslateInstructions, Work::TranslateBytes].map(|work| bare.ledger.worked(work));
    let all = blocks >= LINKS / 3 && instructions >= 2 * LINKS && bytes > instructions;
    assert!(all, "{blocks} {instructions} {bytes}");
}

#[test]
fn samples_of_a_loop_are_those_of_the_tier_that_runs_it() {
    // mov ecx, 1 << 22; again: dec rcx; jnz again; hlt
    let code = [0xb9, 0x00, 0x00, 0x40, 0x00, 0x48, 0xff, 0xc9, 0x75, 0xfb, 0xf4];
    for (translate, phase, other) in
        [(true, Phase::Translated, Phase::Interpreting), (false, Phase::Interpreting, Phase::Translated)]
    {
        let mut bare = Bare::new(&code, Config { translate, ..Config::default() });
        let mut state = bare.vcpu.save();
        let ledger = std::sync::Arc::clone(&bare.ledger);
        let samples = || Profile::sum([&ledger.profile].into_iter());
        let of = |phase: Phase| samples().samples[Phase::ALL.iter().position(|known| *known == phase).unwrap()];
        let until_sampled = || {
            while of(phase) == 0 {
                assert_eq!(bare.run().0, Exit::Halted);
                (state.rip, state.halted) = (CODE, false);
                bare.vcpu.load(&state).unwrap();
            }
        };
        ledger.profile.during(until_sampled).unwrap();
        assert_eq!(of(other), 0, "{:?}", samples());
    }
}
