//! The native oracle: random instructions on this processor and on the interpreter, compared.
//!
//! ```text
//!   classes ─ template ─> generate ─ Case ─┬─> native: a child process ──> Outcome ─┐
//!                                          └─> engine: Cpu in user mode ─> Outcome ─┴─> compare
//! ```
//!
//! `cargo test -p translator oracle` runs some cases of each class; `cargo xtask fuzz` runs them for long. Every case has
//! a number; class, number and seed give the case again.

mod case;
mod classes;
mod compare;
mod engine;
mod generate;
mod native;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::random::Random;
use case::{Case, Code, Outcome};
use classes::{CLASSES, Class};
use engine::Guest;
use native::{BATCH, Native};

/// Cases of each class in an ordinary test run; a class takes two or three seconds.
const CASES: u64 = 12_000;
/// Where ordinary test runs begin.
const SEED: u64 = 1;
/// Failures printed in full.
const SHOWN: usize = 12;

/// Whose outcome is compared with the processor's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tier {
    Interpreter,
    Translator,
    /// With what is accessed in the window.
    Near,
}

/// What the environment asks for: `CORDIAL_ORACLE_{CASES,SEED,MINUTES,CLASS}`.
struct Wish {
    cases: u64,
    seed: u64,
    deadline: Option<Instant>,
    class: Option<String>,
}

impl Wish {
    fn read() -> Self {
        let number = |name: &str| {
            let text = std::env::var(format!("CORDIAL_ORACLE_{name}")).ok()?;
            Some(text.parse::<u64>().unwrap_or_else(|_| panic!("CORDIAL_ORACLE_{name}={text} is not a number")))
        };
        let deadline = number("MINUTES").map(|minutes| Instant::now() + Duration::from_secs(minutes * 60));
        Self {
            cases: number("CASES").unwrap_or(if deadline.is_some() { u64::MAX } else { CASES }),
            seed: number("SEED").unwrap_or(SEED),
            deadline,
            class: std::env::var("CORDIAL_ORACLE_CLASS").ok(),
        }
    }
}

/// The case with a number: the same on every run.
fn case_of(class: &Class, seed: u64, number: u64, case: &mut Case) -> iced_x86::Instruction {
    let mut random = Random::new(seed.wrapping_mul(0x1_0000_0001).wrapping_add(number << 1));
    case.vector = class.vector;
    case.code = class.code;
    generate::generate(&mut random, class.template(number), case)
}

fn run(name: &str) {
    let class = CLASSES.iter().find(|class| class.name == name).unwrap();
    let wish = Wish::read();
    if wish.class.as_ref().is_some_and(|wanted| wanted != name) {
        return;
    }
    let mut native = Native::start();
    let mut guest = Guest::new();
    let mut ours = Box::new(Outcome::new());
    let mut failures: BTreeMap<String, (u64, String)> = BTreeMap::new();
    let mut number = 0;
    while number < wish.cases && wish.deadline.is_none_or(|deadline| Instant::now() < deadline) {
        let count = (wish.cases - number).min(BATCH as u64) as usize;
        let slots = native.slots();
        let instructions: Vec<_> =
            (0..count).map(|index| case_of(class, wish.seed, number + index as u64, &mut slots[index].case)).collect();
        if let Err(index) = native.run(count) {
            let bytes = native.slots()[index].case.bytes().to_vec();
            panic!("class {name}, seed {}, case {}: {bytes:02x?} ended the child", wish.seed, number + index as u64);
        }
        for (index, instruction) in instructions.iter().enumerate() {
            let slot = &native.slots()[index];
            for tier in [Tier::Interpreter, Tier::Translator, Tier::Near] {
                match tier {
                    Tier::Interpreter => guest.interpret(&slot.case, &mut ours),
                    _ if slot.case.code != Code::Bits64 || !guest.translates() => continue,
                    Tier::Translator => guest.translate(&slot.case, &mut ours, false),
                    Tier::Near => guest.translate(&slot.case, &mut ours, true),
                }
                if let Some(difference) = compare::compare(tier, instruction, &slot.case, &slot.outcome, &ours) {
                    let place = format!("{tier:?}, class {name}, seed {}, case {}", wish.seed, number + index as u64);
                    let what = format!("{tier:?} {:?} {}", instruction.code(), difference.what);
                    let entry = failures.entry(what).or_default();
                    if entry.0 == 0 {
                        entry.1 = format!("{place}\n{}", difference.report);
                    }
                    entry.0 += 1;
                }
            }
        }
        number += count as u64;
    }
    if failures.is_empty() {
        return;
    }
    for (_, report) in failures.values().take(SHOWN) {
        eprintln!("{report}");
    }
    for (what, (times, _)) in &failures {
        eprintln!("{times:8} x {what}");
    }
    panic!("{} kinds of difference in {number} cases of class {name}", failures.len());
}

macro_rules! tests {
    ($($name:ident),*) => {
        $(#[test] fn $name() { run(stringify!($name)); })*

        #[test]
        fn every_class_has_a_test() {
            let names = [$(stringify!($name)),*];
            assert!(CLASSES.iter().map(|class| class.name).eq(names));
        }
    };
}

tests!(
    arithmetic,
    moves,
    shifts,
    multiplication,
    exchanges,
    bits,
    stack,
    branches,
    strings,
    hints,
    compatibility,
    compatibility_16,
    vectors
);
