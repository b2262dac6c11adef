//! Single flags, hints, fences, cache lines, random numbers, and the instructions that are never valid.

use std::sync::atomic::{Ordering, fence};

use engine::cpu_model::Feature;
use engine::state::rflags::{CF, DF, OF, STATUS};
use engine::{Cause, Exit};
use iced_x86::{Instruction, Mnemonic};

use super::{by_width, offered, operand_bytes};
use crate::cpu::Cpu;
use crate::decode::raise_ud;
use crate::op::{Done, Handler, Op};
use crate::width::Width;

const AH: u8 = 1;

/// After this many PAUSEs somebody else may run.
const PAUSES_PER_YIELD: u64 = 32;

pub(super) fn select(instruction: &Instruction, cpu: &Cpu) -> Option<Handler> {
    let has = |feature| offered(cpu, feature);
    Some(match instruction.mnemonic() {
        Mnemonic::Lahf | Mnemonic::Sahf if cpu.mode.is_64() && !has(Feature::LahfLm) => raise_ud,
        Mnemonic::Lahf => lahf,
        Mnemonic::Sahf => sahf,
        Mnemonic::Clc => clc,
        Mnemonic::Stc => stc,
        Mnemonic::Cmc => cmc,
        Mnemonic::Cld => cld,
        Mnemonic::Std => std,
        Mnemonic::Pause => pause,
        // Without CET, ENDBR and RDSSP are reserved NOPs.
        Mnemonic::Nop
        | Mnemonic::Reservednop
        | Mnemonic::Endbr32
        | Mnemonic::Endbr64
        | Mnemonic::Rdsspd
        | Mnemonic::Rdsspq
        | Mnemonic::Prefetch
        | Mnemonic::Prefetchw
        | Mnemonic::Prefetchnta
        | Mnemonic::Prefetcht0
        | Mnemonic::Prefetcht1
        | Mnemonic::Prefetcht2
        // Hints of later processors lie where earlier ones do nothing.
        | Mnemonic::Prefetchwt1
        | Mnemonic::Prefetchit0
        | Mnemonic::Prefetchit1
        | Mnemonic::Cldemote => nop,
        Mnemonic::Clflushopt if !has(Feature::Clflushopt) => raise_ud,
        Mnemonic::Clflush | Mnemonic::Clflushopt => flush_line,
        Mnemonic::Serialize if !has(Feature::Serialize) => raise_ud,
        // Code that has been written to is decoded again before it runs in any case.
        Mnemonic::Serialize | Mnemonic::Mfence | Mnemonic::Lfence | Mnemonic::Sfence => full_fence,
        Mnemonic::Rdrand if has(Feature::Rdrand) && is_x86_feature_detected!("rdrand") => {
            by_width!(operand_bytes(instruction, 0), rdrand)
        }
        Mnemonic::Rdseed if has(Feature::Rdseed) && is_x86_feature_detected!("rdseed") => {
            by_width!(operand_bytes(instruction, 0), rdseed)
        }
        // CLWB is in no CPU model.
        Mnemonic::Rdrand | Mnemonic::Rdseed | Mnemonic::Clwb | Mnemonic::Ud0 | Mnemonic::Ud1 | Mnemonic::Ud2 => {
            raise_ud
        }
        _ => return None,
    })
}

/// AH is SF:ZF:0:AF:0:PF:1:CF.
fn lahf(cpu: &mut Cpu, _op: &Op) -> Done {
    cpu.set(AH, cpu.rflags() as u8);
    Ok(())
}

fn sahf(cpu: &mut Cpu, _op: &Op) -> Done {
    let ah = cpu.get::<u8>(AH).into();
    cpu.flags.change(STATUS & !OF, ah);
    Ok(())
}

fn clc(cpu: &mut Cpu, _op: &Op) -> Done {
    cpu.flags.set_cf(false);
    Ok(())
}

fn stc(cpu: &mut Cpu, _op: &Op) -> Done {
    cpu.flags.set_cf(true);
    Ok(())
}

fn cmc(cpu: &mut Cpu, _op: &Op) -> Done {
    cpu.flags.set_cf(!cpu.flags.cf());
    Ok(())
}

fn cld(cpu: &mut Cpu, _op: &Op) -> Done {
    cpu.state.rflags &= !DF;
    Ok(())
}

fn std(cpu: &mut Cpu, _op: &Op) -> Done {
    cpu.state.rflags |= DF;
    Ok(())
}

fn nop(_cpu: &mut Cpu, _op: &Op) -> Done {
    Ok(())
}

fn pause(cpu: &mut Cpu, _op: &Op) -> Done {
    cpu.config.ledger.record(Cause::Pause, 0);
    if cpu.config.ledger.count(Cause::Pause).is_multiple_of(PAUSES_PER_YIELD) {
        cpu.leaving = Some(Exit::Yielded);
        cpu.recheck = true;
    }
    Ok(())
}

/// Guest caches are the host's, which are coherent; what remains of CLFLUSH is that its address must be readable.
fn flush_line(cpu: &mut Cpu, op: &Op) -> Done {
    cpu.load::<u8>(&op.mem).map(drop)
}

fn full_fence(_cpu: &mut Cpu, _op: &Op) -> Done {
    fence(Ordering::SeqCst);
    Ok(())
}

/// CF says whether there was a number; without one the destination is 0. The other flags are cleared.
fn deliver_random<W: Width>(cpu: &mut Cpu, op: &Op, number: Option<u64>) -> Done {
    cpu.set(op.reg[0], W::of(number.unwrap_or(0)));
    cpu.flags.set_status(if number.is_some() { CF } else { 0 });
    Ok(())
}

fn rdrand<W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let mut number = 0;
    // SAFETY: `select` saw that the host has it.
    let got = unsafe { std::arch::x86_64::_rdrand64_step(&mut number) };
    deliver_random::<W>(cpu, op, (got != 0).then_some(number))
}

fn rdseed<W: Width>(cpu: &mut Cpu, op: &Op) -> Done {
    let mut number = 0;
    // SAFETY: `select` saw that the host has it.
    let got = unsafe { std::arch::x86_64::_rdseed64_step(&mut number) };
    deliver_random::<W>(cpu, op, (got != 0).then_some(number))
}
