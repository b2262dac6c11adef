//! Whole runs of translated code.

use engine::ledger::Work;
use engine::{Exit, Phase, Profile, Vcpu as _};
use memory::Gpa;

use crate::bare::{Bare, CODE};
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
        assert!(
            if emptied { translated > 2 * LINKS } else { (LINKS..2 * LINKS).contains(&translated) },
            "{translated}"
        );
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
fn blocks_whose_bytes_are_overwritten_are_dropped_and_counted() {
    // mov eax, 1; hlt; jmp back
    let mut bare = Bare::new(&[0xb8, 1, 0, 0, 0, 0xf4, 0xeb, 0xf8], Config::default());
    assert_eq!(bare.run().1.gpr[0], 1);
    assert_eq!(bare.ledger.worked(Work::SelfModified), 0);
    bare.ram.write(Gpa(CODE + 1), &[2]).unwrap();
    assert_eq!(bare.run().1.gpr[0], 1, "halted");
    let mut state = bare.run().1;
    (state.halted, state.rip) = (false, CODE);
    bare.vcpu.load(&state).unwrap();
    assert_eq!(bare.run().1.gpr[0], 2);
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
fn what_is_translated_is_counted_in_blocks_instructions_and_bytes() {
    let mut bare = Bare::new(&chain(), Config::default());
    bare.run();
    let [blocks, instructions, bytes] =
        [Work::Translate, Work::TranslateInstructions, Work::TranslateBytes].map(|work| bare.ledger.worked(work));
    assert!(blocks >= LINKS && instructions >= 2 * blocks && bytes > instructions, "{blocks} {instructions} {bytes}");
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
