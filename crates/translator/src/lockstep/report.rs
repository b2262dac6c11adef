//! A difference, said so that a person can act on it.

use std::fmt::Write as _;

use engine::CpuState;
use engine::state::rflags;
use iced_x86::{Formatter as _, GasFormatter};

use super::COMPARED;
use super::rehearsal::Memory;
use crate::jit::Plain;

const NAMES: [&str; 16] =
    ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];

/// Bytes of memory that are listed.
const MOST_BYTES: usize = 32;

/// Two outcomes of a block that should be one.
pub(super) struct Finding {
    /// The interpreter's.
    pub ours: CpuState,
    /// The translation's.
    pub theirs: CpuState,
    /// The status flags that were compared.
    pub flags: u64,
    pub memory: Vec<Memory>,
}

/// The block, and what came of it.
pub(super) fn report(plain: &Plain, before: &CpuState, finding: &Finding) -> String {
    let mut text = String::new();
    let (rip, gpa, privilege) = (before.rip, plain.gpa, if plain.user { 3 } else { 0 });
    let _ = writeln!(text, "block at {rip:#x} (guest-physical {gpa:#x}, CPL {privilege}):");
    let mut formatter = GasFormatter::new();
    for step in &plain.steps {
        let mut instruction = String::new();
        formatter.format(&step.instruction, &mut instruction);
        let bytes = step.bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ");
        let _ = writeln!(text, "  {:#018x}  {bytes:<32}  {instruction}", step.instruction.ip());
    }
    let _ = writeln!(text, "{:10} {:>18}  {:>18}  {:>18}", "", "before", "interpreter", "translation");
    for (name, before, ours, theirs) in fields(before, finding) {
        let mark = if ours == theirs { "" } else { "  <- differs" };
        let _ = writeln!(text, "{name:10} {before:#018x}  {ours:#018x}  {theirs:#018x}{mark}");
    }
    for at in COMPARED.into_iter().flatten() {
        let [before, ours, theirs] = [before, &finding.ours, &finding.theirs].map(|state| state.xsave.0[at]);
        if ours != theirs {
            let _ =
                writeln!(text, "XSAVE area byte {at}: before {before:#04x}, {ours:#04x}, {theirs:#04x}  <- differs");
        }
    }
    for Memory { gpa, before, interpreter, translator } in finding.memory.iter().take(MOST_BYTES) {
        let values = format!("before {before:#04x}, {interpreter:#04x}, {translator:#04x}");
        let _ = writeln!(text, "memory {:#x}: {values}  <- differs", gpa.0);
    }
    if finding.memory.len() > MOST_BYTES {
        let _ = writeln!(text, "and {} more bytes of memory", finding.memory.len() - MOST_BYTES);
    }
    text
}

type Field = (&'static str, u64, u64, u64);

fn fields(before: &CpuState, finding: &Finding) -> Vec<Field> {
    let (ours, theirs) = (&finding.ours, &finding.theirs);
    let mut fields: Vec<Field> =
        (0..16).map(|index| (NAMES[index], before.gpr[index], ours.gpr[index], theirs.gpr[index])).collect();
    fields.push(("rip", before.rip, ours.rip, theirs.rip));
    let mask = !rflags::STATUS | finding.flags;
    fields.push(("rflags", before.rflags & mask, ours.rflags & mask, theirs.rflags & mask));
    for (name, index) in ["es", "cs", "ss", "ds", "fs", "gs"].into_iter().zip(0..) {
        let base = |state: &CpuState| state.segments[index].base;
        if base(ours) != base(theirs) {
            fields.push((name, base(before), base(ours), base(theirs)));
        }
    }
    fields
}
