//! Trap and emulate, where that is asked for ([`Config::classic`](crate::Config::classic)): each sensitive instruction of a
//! kernel is an exit to the monitor, as on a processor whose guest kernels run without privileges.
//!
//! ```text
//!   translated code ──callback: leave──> registers to CpuState ──> loop ──> handler, counted by its cause ──> boundary
//!                                                                                       back into translated code
//! ```
//!
//! What for: to measure what such exits cost beside hypercalls and shared memory. Nothing is made slower than that takes;
//! and where it is not asked for, no instruction has a cause, and no code looks for one.

use engine::Cause;
use iced_x86::{Instruction, Mnemonic};

use crate::cpu::Cpu;
use crate::op::{Done, Leave, Op};

/// Where the cause is in [`Op::prefixes`], one more than its number; 0 for none.
const SHIFT: u32 = 3;
const _: () = assert!(Cause::ALL.len() < 1 << (u8::BITS - SHIFT));

/// What a sensitive instruction leaves for, where it is one (Intel SDM vol. 3A, 2.8.2, and what hides or shows privilege).
pub(crate) fn cause(instruction: &Instruction) -> Option<Cause> {
    let moves = |register: fn(iced_x86::Register) -> bool| {
        register(instruction.op0_register()) || register(instruction.op1_register())
    };
    Some(match instruction.mnemonic() {
        Mnemonic::Cli | Mnemonic::Sti => Cause::InterruptFlag,
        Mnemonic::Pushf | Mnemonic::Pushfd | Mnemonic::Pushfq => Cause::InterruptFlag,
        Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq => Cause::InterruptFlag,
        Mnemonic::Mov if moves(iced_x86::Register::is_cr) => Cause::ControlRegister,
        Mnemonic::Mov if moves(iced_x86::Register::is_dr) => Cause::DebugRegister,
        Mnemonic::Clts | Mnemonic::Lmsw => Cause::ControlRegister,
        Mnemonic::Lgdt | Mnemonic::Lidt | Mnemonic::Lldt | Mnemonic::Ltr => Cause::DescriptorTable,
        Mnemonic::Invlpg | Mnemonic::Invpcid => Cause::Tlb,
        Mnemonic::Rdmsr => Cause::MsrRead,
        Mnemonic::Wrmsr => Cause::MsrWrite,
        Mnemonic::Rdtsc | Mnemonic::Rdtscp => Cause::Tsc,
        Mnemonic::Cpuid => Cause::Cpuid,
        Mnemonic::Hlt => Cause::Halt,
        Mnemonic::In | Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd => Cause::PortRead,
        Mnemonic::Out | Mnemonic::Outsb | Mnemonic::Outsw | Mnemonic::Outsd => Cause::PortWrite,
        Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq => Cause::Iret,
        Mnemonic::Swapgs => Cause::Swapgs,
        Mnemonic::Sysret | Mnemonic::Sysretq | Mnemonic::Sysexit | Mnemonic::Sysexitq => Cause::Sysret,
        _ => return None,
    })
}

/// Has translated code leave for the loop before the instruction.
pub(crate) fn leave(_cpu: &mut Cpu, _op: &Op) -> Done {
    Err(Leave::Monitor)
}

impl Op {
    /// Notes why the instruction leaves.
    pub(crate) fn note_cause(&mut self, cause: Cause) {
        self.prefixes |= (cause as u8 + 1) << SHIFT;
    }

    /// Why the instruction leaves, where it does.
    pub(crate) fn cause(&self) -> Option<Cause> {
        usize::from(self.prefixes >> SHIFT).checked_sub(1).map(|number| Cause::ALL[number])
    }
}

impl Cpu {
    /// How many of a block's operations come before the first that leaves, and why that one does.
    pub(crate) fn first_trap(&self, ops: &[Op]) -> Option<(usize, Cause)> {
        if self.mode.cpl != 0 {
            return None;
        }
        ops.iter().enumerate().find_map(|(position, op)| Some((position, op.cause()?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bare::{Bare, CODE};
    use crate::config::Config;

    /// Each kind of sensitive instruction once, in a kernel of 64-bit code; then HLT.
    fn kernel() -> Vec<u8> {
        let pieces: [&[u8]; 12] = [
            &[0xfb, 0xfa],                   // sti, cli
            &[0x9c, 0x9d],                   // pushfq, popfq
            &[0x0f, 0x20, 0xd8],             // mov rax, cr3
            &[0x0f, 0x22, 0xd8],             // mov cr3, rax
            &[0x0f, 0x21, 0xf8],             // mov rax, dr7
            &[0x0f, 0x01, 0x3c, 0x24],       // invlpg [rsp]
            &[0x0f, 0x31],                   // rdtsc
            &[0x0f, 0x01, 0xf8],             // swapgs
            &[0x0f, 0x01, 0xf8],             // swapgs
            &[0xb9, 0x80, 0, 0, 0xc0],       // mov ecx, EFER
            &[0x0f, 0x32, 0x0f, 0x30, 0x90], // rdmsr, wrmsr, nop
            &[0xf4],                         // hlt
        ];
        pieces.concat()
    }

    #[test]
    fn each_sensitive_instruction_of_a_kernel_is_one_exit_and_only_on_request() {
        for (classic, translate) in [(true, true), (true, false), (false, true), (false, false)] {
            let mut bare = Bare::new(&kernel(), Config { classic, translate, ..Config::default() });
            let (exit, state) = bare.run();
            assert_eq!((exit, state.rip), (engine::Exit::Halted, CODE + kernel().len() as u64));
            let expected = [
                (Cause::InterruptFlag, 4),
                (Cause::ControlRegister, 2),
                (Cause::DebugRegister, 1),
                (Cause::Tlb, 1),
                (Cause::Tsc, 1),
                (Cause::Swapgs, 2),
                (Cause::MsrRead, 1),
                (Cause::MsrWrite, 1),
                (Cause::Iret, 0),
            ];
            for (cause, count) in expected {
                let count = if classic { count } else { 0 };
                assert_eq!(
                    bare.ledger.count(cause),
                    count,
                    "{} where classic is {classic}, translate {translate}",
                    cause.name()
                );
            }
        }
    }
}
