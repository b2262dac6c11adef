//! Why a guest cannot be gone on with, for people.

use std::fmt::Write as _;

use engine::CpuState;
use engine::state::seg;
use kvm_bindings as k;

use crate::leave::Leave;

/// What happened, with the numbers that belong to it. `None` where `leave` is nothing to fail of.
pub(crate) fn describe(leave: &Leave) -> Option<String> {
    Some(match leave {
        Leave::EntryFailed { reason, cpu } => {
            format!("the processor refused to enter guest code: hardware reason {reason:#x} on host CPU {cpu}")
        }
        Leave::Internal { suberror, data, instruction } => {
            let what = match *suberror {
                k::KVM_INTERNAL_ERROR_EMULATION => "KVM met an instruction that it cannot emulate",
                k::KVM_INTERNAL_ERROR_SIMUL_EX => "KVM met two exceptions at once",
                k::KVM_INTERNAL_ERROR_DELIVERY_EV => "an exit amid the delivery of an event",
                k::KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => "an exit that KVM does not know",
                _ => "KVM could not go on",
            };
            let mut text = format!("{what} (internal error {suberror}");
            if !instruction.is_empty() {
                text += &format!("; instruction {}", hex(instruction));
            } else if !data.is_empty() {
                text += &format!("; data {data:x?}");
            }
            text + ")"
        }
        Leave::Memory { gpa, bytes } => format!("the host cannot give guest memory {gpa:#x} of {bytes:#x} bytes"),
        Leave::Unknown { reason } => format!("KVM_RUN returned for reason {reason}, which this engine never asks for"),
        _ => return None,
    })
}

/// Bytes as a disassembler takes them.
pub(crate) fn hex(bytes: &[u8]) -> String {
    let bytes: Vec<_> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    bytes.join(" ")
}

/// The registers, a few a line.
pub(crate) fn registers(state: &CpuState) -> String {
    const NAMES: [&str; 16] =
        ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];
    let mut text = format!("rip {:016x} rflags {:08x} cpl {}", state.rip, state.rflags, state.cpl());
    for (index, (name, value)) in NAMES.iter().zip(state.gpr).enumerate() {
        let separator = if index % 4 == 0 { '\n' } else { ' ' };
        let _ = write!(text, "{separator}{name:<3} {value:016x}"); // writing to a string cannot fail
    }
    let (cs, ss) = (&state.segments[seg::CS], &state.segments[seg::SS]);
    for (name, segment) in [("cs ", cs), ("ss ", ss), ("tr ", &state.tr)] {
        let _ = write!(
            text,
            "\n{name} {:04x} base {:016x} limit {:08x} attributes {:04x}",
            segment.selector, segment.base, segment.limit, segment.attributes
        );
    }
    let _ = write!(
        text,
        "\ncr0 {:08x} cr2 {:016x} cr3 {:016x} cr4 {:08x} efer {:04x}\ngdt {:016x}+{:04x} idt {:016x}+{:04x}",
        state.cr0,
        state.cr2,
        state.cr3,
        state.cr4,
        state.efer,
        state.gdtr.base,
        state.gdtr.limit,
        state.idtr.base,
        state.idtr.limit
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_named_with_their_numbers() {
        let said = |leave| describe(&leave).unwrap();
        let instruction = vec![0x0f, 0x10, 0xc0];
        assert_eq!(
            said(Leave::Internal { suberror: 1, data: vec![], instruction }),
            "KVM met an instruction that it cannot emulate (internal error 1; instruction 0f 10 c0)"
        );
        assert!(said(Leave::Internal { suberror: 3, data: vec![0x1f], instruction: vec![] }).ends_with("data [1f])"));
        assert!(said(Leave::EntryFailed { reason: 0x8000_0021, cpu: 5 }).contains("0x80000021 on host CPU 5"));
        assert!(said(Leave::Memory { gpa: 0x1000, bytes: 4096 }).contains("0x1000"));
        assert!(said(Leave::Unknown { reason: 36 }).contains("36"));
        assert_eq!(describe(&Leave::Shutdown), None);
    }

    #[test]
    fn registers_are_all_there() {
        let mut state = CpuState::reset();
        state.gpr[15] = 0xdead_beef;
        let text = registers(&state);
        assert!(text.contains("rip 000000000000fff0") && text.contains("r15 00000000deadbeef"), "{text}");
        assert!(text.contains("cs  f000 base 00000000ffff0000"), "{text}");
    }
}
