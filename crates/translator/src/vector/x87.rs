//! x87: arithmetic on the host's FPU, control and environments in Rust (Intel SDM vol. 1, chapter 8).
//!
//! A stub loads the guest's FPU with FXRSTOR, runs one instruction and stores it with FXSAVE. The last-instruction
//! pointers are the guest's: they are set here, never taken from the host.
//!
//! The environment that FNSTENV and FNSAVE store comes in four formats, by operand size and mode: pointers are offsets
//! with selectors (which are zero) in protected mode, and 20-bit or 32-bit linear addresses in real mode.

use engine::state::{XsaveArea, seg};
use iced_x86::{Code, Instruction, Mnemonic};

use crate::cpu::Cpu;
use crate::mmu::{Access, Rights};
use crate::op::{Done, Handler, NO_REG, Op};
use crate::vector::emit::Memory;
use crate::vector::gate::{self, Gate, X87, X87NoWait};
use crate::vector::native::{Bounce, flags_in, frame, operand, stub_of};
use crate::vector::registers::{
    FCW, FDP, FIP, FOP, FSW, FTW, MXCSR, MXCSR_MASK, Registers, ST, init_x87, leave_mmx, normalise_control, summarise,
};
use crate::vector::stub;

/// FSW: the exception flags, stack fault, summary and busy that FNCLEX clears.
const CLEARED: u16 = 0x80ff;
/// FSW: the exceptions that, unmasked, keep a result from being stored: all but precision.
const UNSTORED: u16 = 0x1f;
/// `op.size` of the handlers here: log2 of the operand size, 1 or 2.
const WIDE: u8 = 2;

/// The handler where the instruction is an x87 instruction or EMMS.
pub(super) fn select(instruction: &Instruction, bytes: &[u8], op: &mut Op) -> Option<Handler> {
    use Mnemonic::*;
    op.size = match instruction.code() {
        Code::Fldenv_m14byte | Code::Fnstenv_m14byte | Code::Fnsave_m94byte | Code::Frstor_m94byte => 1,
        _ => WIDE,
    };
    Some(match instruction.mnemonic() {
        Wait => wait,
        Emms => emms,
        Fninit => fninit,
        Fnclex => fnclex,
        Fnstcw => fnstcw,
        Fnstsw if op.reg[0] != NO_REG => fnstsw_ax,
        Fnstsw => fnstsw,
        Fldcw => fldcw,
        Fnstenv => fnstenv,
        Fldenv => fldenv,
        Fnsave => fnsave,
        Frstor => frstor,
        Fneni | Fndisi | Fnsetpm => nothing,
        _ => return arithmetic(instruction, bytes, op),
    })
}

fn arithmetic(instruction: &Instruction, bytes: &[u8], op: &mut Op) -> Option<Handler> {
    let stub = stub::get(instruction).filter(|stub| stub.x87)?;
    op.imm = stub.address();
    let opcode = opcode(bytes).to_le_bytes();
    op.reg = [0, opcode[0], opcode[1], 0];
    Some(match stub.memory {
        Memory::None => plain,
        Memory::Load => load,
        Memory::Store => store,
    })
}

/// What FOP says of an instruction: the low three bits of its first byte, and its second (SDM vol. 1, 8.1.9).
fn opcode(bytes: &[u8]) -> u16 {
    let start = bytes.iter().position(|byte| matches!(byte, 0xd8..=0xdf)).unwrap_or(0);
    let byte = |at: usize| u16::from(bytes.get(at).copied().unwrap_or(0));
    (byte(start) & 7) << 8 | byte(start + 1)
}

fn plain(cpu: &mut Cpu, op: &Op) -> Done {
    X87::check(cpu)?;
    run(cpu, op, std::ptr::null_mut(), None);
    Ok(())
}

fn load(cpu: &mut Cpu, op: &Op) -> Done {
    X87::check(cpu)?;
    let mut bounce = Bounce([0; 64]);
    let data = cpu.effective_address(&op.mem);
    let memory = operand(cpu, op, stub_of(op), &mut bounce)?;
    run(cpu, op, memory, Some(data));
    Ok(())
}

fn store(cpu: &mut Cpu, op: &Op) -> Done {
    X87::check(cpu)?;
    let bytes = usize::from(stub_of(op).bytes);
    let data = cpu.effective_address(&op.mem);
    let address = cpu.linear(&op.mem, bytes as u64, Access::Write)?;
    cpu.probe_write(address, bytes as u64, op.mem.segment, Rights::Current)?;
    let mut bounce = Bounce([0; 64]);
    run(cpu, op, bounce.0.as_mut_ptr(), Some(data));
    let area = &cpu.state.xsave;
    if area.u16(FSW) & !area.u16(FCW) & UNSTORED != 0 {
        return Ok(());
    }
    cpu.write_bytes(address, &bounce.0[..bytes], op.mem.segment, Rights::Current)
}

/// Runs the stub and notes the guest's pointers.
fn run(cpu: &mut Cpu, op: &Op, memory: *mut u8, data: Option<u64>) {
    let stub = stub_of(op);
    let pending = set_aside(&mut cpu.state.xsave);
    let data = data.map(|data| {
        if cpu.mode.real_segments() {
            data.wrapping_add(cpu.state.segments[usize::from(op.mem.segment)].base)
        } else {
            data
        }
    });
    let last_data = cpu.state.xsave.u64(FDP);
    let mut frame = frame(cpu, op, stub, memory);
    if stub.flags_in {
        frame.flags = flags_in(cpu);
    }
    // SAFETY: the stub reads and writes the frame, the first 512 bytes of the area, which FXRSTOR accepts (`adopt` and
    // LDMXCSR see to MXCSR), and `stub.bytes` at `memory`.
    unsafe { (stub.entry)(&mut frame) };
    if stub.flags_out {
        cpu.flags.set_status(frame.flags);
    }
    let mut instruction = op.address(cpu.code_mask());
    if cpu.mode.real_segments() {
        instruction = instruction.wrapping_add(cpu.state.segments[seg::CS].base);
    }
    let area = &mut cpu.state.xsave;
    if pending != 0 {
        let status = area.u16(FSW) | pending;
        area.set_u16(FSW, status);
        summarise(area);
    }
    area.set_u32(MXCSR + 4, MXCSR_MASK); // FXSAVE put the host's there
    area.set_u16(FOP, u16::from_le_bytes([op.reg[1], op.reg[2]]));
    area.set_u64(FIP, instruction);
    area.set_u64(FDP, data.unwrap_or(last_data));
}

/// Takes exceptions out that a guest without CR0.NE left pending, so that they do not strike the host.
fn set_aside(area: &mut XsaveArea) -> u16 {
    if !area.fpu_pending() {
        return 0;
    }
    let flags = area.u16(FSW) & 0x3f;
    let status = area.u16(FSW) & !0x80bf;
    area.set_u16(FSW, status);
    flags
}

fn wait(cpu: &mut Cpu, _op: &Op) -> Done {
    gate::wait(cpu)
}

fn nothing(cpu: &mut Cpu, _op: &Op) -> Done {
    X87NoWait::check(cpu)
}

fn emms(cpu: &mut Cpu, _op: &Op) -> Done {
    gate::Mmx::check(cpu)?;
    leave_mmx(&mut cpu.state.xsave);
    Ok(())
}

/// FNINIT: control, status, tags and pointers; the registers keep their contents, now empty and in physical order.
fn fninit(cpu: &mut Cpu, _op: &Op) -> Done {
    X87NoWait::check(cpu)?;
    initialise(&mut cpu.state.xsave);
    Ok(())
}

fn initialise(area: &mut XsaveArea) {
    leave_mmx(area);
    let registers = <[u8; 128]>::try_from(&area.0[ST..ST + 128]).unwrap_or([0; 128]);
    init_x87(area);
    area.0[ST..ST + 128].copy_from_slice(&registers);
}

fn fnclex(cpu: &mut Cpu, _op: &Op) -> Done {
    X87NoWait::check(cpu)?;
    let status = cpu.state.xsave.u16(FSW) & !CLEARED;
    cpu.state.xsave.set_u16(FSW, status);
    Ok(())
}

fn fnstcw(cpu: &mut Cpu, op: &Op) -> Done {
    X87NoWait::check(cpu)?;
    let control = cpu.state.xsave.u16(FCW);
    cpu.store(&op.mem, control)
}

fn fnstsw(cpu: &mut Cpu, op: &Op) -> Done {
    X87NoWait::check(cpu)?;
    let status = cpu.state.xsave.u16(FSW);
    cpu.store(&op.mem, status)
}

fn fnstsw_ax(cpu: &mut Cpu, _op: &Op) -> Done {
    X87NoWait::check(cpu)?;
    let status = cpu.state.xsave.u16(FSW);
    cpu.set_gpr(0, 1, status.into());
    Ok(())
}

fn fldcw(cpu: &mut Cpu, op: &Op) -> Done {
    X87::check(cpu)?;
    let control = cpu.load::<u16>(&op.mem)?;
    let area = &mut cpu.state.xsave;
    area.set_u16(FCW, control);
    normalise_control(area);
    summarise(area);
    Ok(())
}

/// Bytes of an environment.
fn environment_bytes(op: &Op) -> usize {
    if op.size == WIDE { 28 } else { 14 }
}

/// The environment as FNSTENV stores it (SDM vol. 1, figures 8-9 to 8-12).
fn environment(cpu: &Cpu, op: &Op) -> [u8; 28] {
    let area = &cpu.state.xsave;
    let real = cpu.mode.real_segments();
    let (ip, dp) = (area.u64(FIP) as u32, area.u64(FDP) as u32);
    let opcode = u32::from(area.u16(FOP) & 0x7ff);
    let words = [u32::from(area.u16(FCW)), u32::from(area.u16(FSW)), u32::from(full_tags(area))];
    let mut image = [0; 28];
    if op.size == WIDE {
        for (at, word) in words.iter().enumerate() {
            image[at * 4..at * 4 + 4].copy_from_slice(&(word | 0xffff_0000).to_le_bytes());
        }
        let pointers = if real {
            [ip & 0xffff, ip >> 16 << 12 | opcode, dp & 0xffff, dp >> 16 << 12]
        } else {
            [ip, opcode << 16, dp, 0xffff_0000]
        };
        for (at, word) in pointers.iter().enumerate() {
            image[12 + at * 4..16 + at * 4].copy_from_slice(&word.to_le_bytes());
        }
    } else {
        let pointers = if real {
            [ip & 0xffff, ip >> 16 << 12 | opcode, dp & 0xffff, dp >> 16 << 12]
        } else {
            [ip & 0xffff, 0, dp & 0xffff, 0]
        };
        for (at, word) in words.iter().chain(&pointers).enumerate() {
            image[at * 2..at * 2 + 2].copy_from_slice(&(*word as u16).to_le_bytes());
        }
    }
    image
}

/// Loads an environment.
fn load_environment(cpu: &mut Cpu, op: &Op, image: &[u8]) {
    let real = cpu.mode.real_segments();
    let wide = op.size == WIDE;
    let field = |at: usize| -> u32 {
        if wide {
            u32::from_le_bytes([image[at * 4], image[at * 4 + 1], image[at * 4 + 2], image[at * 4 + 3]])
        } else {
            u16::from_le_bytes([image[at * 2], image[at * 2 + 1]]).into()
        }
    };
    let area = &mut cpu.state.xsave;
    let status = field(1) as u16;
    // The area holds registers in stack order: they move when TOP does.
    let turn = (usize::from(status >> 11 & 7) + 8 - area.top()) % 8;
    area.0[ST..ST + 128].rotate_left(turn * 16);
    area.set_u16(FCW, field(0) as u16);
    normalise_control(area);
    area.set_u16(FSW, status);
    let tags = field(2);
    area.0[FTW] = (0..8).fold(0, |all, register| all | u8::from(tags >> (register * 2) & 3 != 3) << register);
    let high = |word: u32| if real { word >> 12 << 16 } else { 0 };
    let opcode = if real { field(4) } else { field(4) >> 16 };
    let (ip, dp) = if wide && !real {
        (field(3), field(5))
    } else {
        (field(3) & 0xffff | high(field(4)), field(5) & 0xffff | high(field(6)))
    };
    area.set_u64(FIP, ip.into());
    area.set_u64(FDP, dp.into());
    if wide || real {
        area.set_u16(FOP, opcode as u16 & 0x7ff);
    }
    summarise(area);
}

/// The 16-bit tag word: 0 valid, 1 zero, 2 special, 3 empty, by physical register.
fn full_tags(area: &XsaveArea) -> u16 {
    let top = area.top();
    (0..8).fold(0, |tags, physical| {
        let at = ST + (physical + 8 - top) % 8 * 16;
        let (mantissa, exponent) = (area.u64(at), area.u16(at + 8) & 0x7fff);
        let tag = match (area.0[FTW] >> physical & 1 != 0, exponent, mantissa) {
            (false, ..) => 3,
            (true, 0, 0) => 1,
            (true, 0 | 0x7fff, _) => 2,
            (true, _, mantissa) => {
                if mantissa >> 63 == 0 {
                    2
                } else {
                    0
                }
            }
        };
        tags | tag << (physical * 2)
    })
}

fn fnstenv(cpu: &mut Cpu, op: &Op) -> Done {
    X87NoWait::check(cpu)?;
    let image = environment(cpu, op);
    let bytes = environment_bytes(op);
    let address = cpu.linear(&op.mem, bytes as u64, Access::Write)?;
    cpu.write_bytes(address, &image[..bytes], op.mem.segment, Rights::Current)?;
    // All exceptions are masked then.
    let area = &mut cpu.state.xsave;
    let control = area.u16(FCW) | 0x3f;
    area.set_u16(FCW, control);
    summarise(area);
    Ok(())
}

fn fldenv(cpu: &mut Cpu, op: &Op) -> Done {
    X87::check(cpu)?;
    let bytes = environment_bytes(op);
    let address = cpu.linear(&op.mem, bytes as u64, Access::Read)?;
    let mut image = [0; 28];
    cpu.read_bytes(address, &mut image[..bytes], op.mem.segment, Rights::Current)?;
    load_environment(cpu, op, &image);
    Ok(())
}

fn fnsave(cpu: &mut Cpu, op: &Op) -> Done {
    X87NoWait::check(cpu)?;
    let bytes = environment_bytes(op);
    let mut image = [0; 108];
    image[..28].copy_from_slice(&environment(cpu, op));
    for register in 0..8 {
        let (to, from) = (bytes + register * 10, ST + register * 16);
        image[to..to + 10].copy_from_slice(&cpu.state.xsave.0[from..from + 10]);
    }
    let address = cpu.linear(&op.mem, bytes as u64 + 80, Access::Write)?;
    cpu.write_bytes(address, &image[..bytes + 80], op.mem.segment, Rights::Current)?;
    initialise(&mut cpu.state.xsave);
    Ok(())
}

fn frstor(cpu: &mut Cpu, op: &Op) -> Done {
    X87::check(cpu)?;
    let bytes = environment_bytes(op);
    let address = cpu.linear(&op.mem, bytes as u64 + 80, Access::Read)?;
    let mut image = [0; 108];
    cpu.read_bytes(address, &mut image[..bytes + 80], op.mem.segment, Rights::Current)?;
    load_environment(cpu, op, &image);
    for register in 0..8 {
        let (from, to) = (bytes + register * 10, ST + register * 16);
        cpu.state.xsave.0[to..to + 10].copy_from_slice(&image[from..from + 10]);
        cpu.state.xsave.0[to + 10..to + 16].fill(0);
    }
    Ok(())
}
