//! What differs between two outcomes of a case, said so that a person can act on it.

use std::fmt::Write as _;

use engine::state::rflags::{IF, RF, STATUS};
use iced_x86::{Formatter as _, GasFormatter, Instruction};

use super::Tier;
use super::case::{ARENA, Case, Code, NO_VECTOR, Outcome, Xsave};
use super::classes::{either_fault, undefined_flags};

const NAMES: [&str; 16] =
    ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];

const RSP: usize = 4;

const VECTOR_GP: u64 = 13;
const VECTOR_PF: u64 = 14;

/// Linux's TASK_SIZE_MAX with four-level page tables.
const USER_END: u64 = (1 << 47) - 0x1000;

/// Parts of the XSAVE area that are compared: control and status words, tag word, MXCSR, registers, upper halves. Not
/// the last x87 instruction's addresses, nor what the signal frame keeps its own notes in.
const COMPARED: [(usize, usize); 4] = [(0, 6), (24, 28), (32, 416), (576, 832)];

pub(super) struct Difference {
    /// The fields that differ.
    pub what: String,
    /// Everything about it.
    pub report: String,
}

pub(super) fn compare(
    tier: Tier,
    instruction: &Instruction,
    case: &Case,
    native: &Outcome,
    ours: &Outcome,
) -> Option<Difference> {
    let mut fields = Vec::new();
    // What is above a 16-bit stack pointer's 32 bits is the kernel's own (its espfix) where an interrupt came between.
    let stack_mask = if case.code == Code::Bits64 { u64::MAX } else { u32::MAX.into() };
    for (index, name) in NAMES.iter().enumerate() {
        let mask = if index == RSP { stack_mask } else { u64::MAX };
        fields.push((*name, case.gpr[index], native.gpr[index] & mask, ours.gpr[index] & mask));
    }
    let ignored = RF
        | IF
        | match (native.fault, tier) {
            (NO_VECTOR, _) => undefined_flags(instruction),
            (_, Tier::Interpreter) => 0,
            // Flags that an instruction replaces when it is started again are not kept while it faults.
            (_, Tier::Translator | Tier::Near) => STATUS,
        };
    fields.push(("rflags", case.rflags, native.rflags & !ignored, ours.rflags & !ignored));
    fields.push(("rip", case.rip, native.rip, ours.rip));
    let either = native.fault != NO_VECTOR && ours.fault != NO_VECTOR && either_fault(instruction);
    if !either {
        fields.push(("vector", NO_VECTOR, native.fault, ours.fault));
    }
    if native.fault != NO_VECTOR && !either {
        // Linux says of every address above user space that it is protected.
        let hidden = u64::from(native.fault == VECTOR_PF && native.address >= USER_END);
        fields.push(("error", 0, native.error & !hidden, ours.error & !hidden));
        fields.push(("cr2", 0, native.address, ours.address));
    }
    let mut what = Vec::new();
    let mut lines = String::new();
    for (name, before, native, ours) in fields {
        if native != ours {
            what.push(name);
            let _ = writeln!(lines, "  {name:6} before {before:#018x}  processor {native:#018x}  ours {ours:#018x}");
        }
    }
    let memory = case.memory.iter().zip(&native.memory).zip(&ours.memory).enumerate();
    let wrong: Vec<_> = memory.filter(|(_, ((_, native), ours))| native != ours).take(16).collect();
    // A translated CALL has pushed its return address when its target turns out not to be canonical.
    let pushed = tier != Tier::Interpreter && native.fault == VECTOR_GP && instruction.is_call_near_indirect();
    if !wrong.is_empty() && !pushed {
        what.push("memory");
        for (offset, ((before, native), ours)) in wrong {
            let at = ARENA + offset as u64;
            let _ = writeln!(lines, "  [{at:#x}] before {before:02x}  processor {native:02x}  ours {ours:02x}");
        }
    }
    if case.vector {
        compare_vectors(&case.xsave, &native.xsave, &ours.xsave, &mut what, &mut lines);
    }
    if what.is_empty() {
        return None;
    }
    let what = what.join(" ");
    let report = format!("{}{lines}", describe(instruction, case));
    Some(Difference { what, report })
}

fn compare_vectors(before: &Xsave, native: &Xsave, ours: &Xsave, what: &mut Vec<&'static str>, lines: &mut String) {
    for (start, end) in COMPARED {
        if native.0[start..end] == ours.0[start..end] {
            continue;
        }
        what.push(if start == 0 {
            "x87"
        } else if start == 24 {
            "mxcsr"
        } else {
            "registers"
        });
        let width = (end - start).min(16);
        for at in (start..end).step_by(width) {
            let end = (at + width).min(end);
            let (before, native, ours) = (&before.0[at..end], &native.0[at..end], &ours.0[at..end]);
            if native != ours {
                let hex = |bytes: &[u8]| bytes.iter().rev().map(|byte| format!("{byte:02x}")).collect::<String>();
                let _ = writeln!(lines, "  xsave[{at}] before {}", hex(before));
                let _ = writeln!(lines, "       processor {}\n            ours {}", hex(native), hex(ours));
            }
        }
    }
}

/// Bytes, disassembly, and everything the instruction starts from.
fn describe(instruction: &Instruction, case: &Case) -> String {
    let mut assembly = String::new();
    GasFormatter::new().format(instruction, &mut assembly);
    let bytes: Vec<String> = case.bytes().iter().map(|byte| format!("{byte:02x}")).collect();
    let mut text = format!(
        "  {}  {assembly}  ({:?})\n  rip {:#x} rflags {:#x}",
        bytes.join(" "),
        case.code,
        case.rip,
        case.rflags
    );
    for (index, (name, value)) in NAMES.iter().zip(case.gpr).enumerate() {
        let _ = write!(text, "{}{name:>3} {value:#018x}", if index % 4 == 0 { "\n  " } else { "  " });
    }
    text.push('\n');
    text
}
