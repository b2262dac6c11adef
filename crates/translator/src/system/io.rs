//! IN, OUT, INS and OUTS (Intel SDM vol. 1, chapter 18).

use engine::state::{rflags, seg};
use iced_x86::{Instruction, Mnemonic, OpKind};

use crate::cpu::{Cpu, size_mask};
use crate::mmu::{Access, Rights};
use crate::op::{Done, Handler, Leave, NO_REG, Op, REP, REPNE};

pub(super) fn select(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    match instruction.mnemonic() {
        Mnemonic::In => {
            op.size = instruction.op0_register().size().trailing_zeros() as u8;
            immediate_port(instruction, 1, op);
            Some(port_in)
        }
        Mnemonic::Out => {
            op.size = instruction.op1_register().size().trailing_zeros() as u8;
            immediate_port(instruction, 0, op);
            Some(port_out)
        }
        Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd | Mnemonic::Outsb | Mnemonic::Outsw | Mnemonic::Outsd => {
            op.size = match instruction.mnemonic() {
                Mnemonic::Insb | Mnemonic::Outsb => 0,
                Mnemonic::Insw | Mnemonic::Outsw => 1,
                _ => 2,
            };
            let input = matches!(instruction.mnemonic(), Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd);
            let memory = if input { instruction.op0_kind() } else { instruction.op1_kind() };
            op.mem.address_size = match memory {
                OpKind::MemoryESDI | OpKind::MemorySegSI => 1,
                OpKind::MemoryESEDI | OpKind::MemorySegESI => 2,
                _ => 3,
            };
            op.mem.segment = if input { seg::ES as u8 } else { instruction.memory_segment().number() as u8 };
            Some(if input { ins } else { outs })
        }
        _ => None,
    }
}

/// Marks in `op.reg[3]` whether the port is in DX (0) or the immediate.
fn immediate_port(instruction: &Instruction, position: u32, op: &mut Op) {
    op.reg[3] = if instruction.op_kind(position) == OpKind::Register { 0 } else { NO_REG };
}

impl Cpu {
    fn port(&self, op: &Op) -> u16 {
        if op.reg[3] == 0 { self.state.gpr[2] as u16 } else { op.imm as u8 as u16 }
    }

    /// #GP(0) where neither IOPL nor the I/O permission bitmap allows the access.
    fn check_port(&mut self, port: u16, bytes: u64) -> Done {
        let iopl = (self.state.rflags & rflags::IOPL) >> 12;
        let trusted = self.mode.real || !self.mode.v86 && u64::from(self.mode.cpl) <= iopl;
        if trusted || self.port_permitted(port, bytes)? { Ok(()) } else { Err(self.gp()) }
    }

    fn read_port(&mut self, port: u16, size: u8) -> u32 {
        let mut data = [0; 4];
        self.io().port_read(port, &mut data[..1 << size]);
        self.after_device();
        self.check_port_breakpoints(port, 1 << size);
        u32::from_le_bytes(data)
    }

    fn write_port(&mut self, port: u16, size: u8, value: u32) {
        self.io().port_write(port, &value.to_le_bytes()[..1 << size]);
        self.after_device();
        self.check_port_breakpoints(port, 1 << size);
    }
}

fn port_in(cpu: &mut Cpu, op: &Op) -> Done {
    let port = cpu.port(op);
    cpu.check_port(port, 1 << op.size)?;
    let value = cpu.read_port(port, op.size);
    cpu.set_gpr(0, op.size, value.into());
    Ok(())
}

fn port_out(cpu: &mut Cpu, op: &Op) -> Done {
    let port = cpu.port(op);
    cpu.check_port(port, 1 << op.size)?;
    let value = cpu.gpr(0, op.size) as u32;
    cpu.write_port(port, op.size, value);
    Ok(())
}

/// One element of INS or OUTS; with REP, one count of it.
fn string(cpu: &mut Cpu, op: &Op, pointer: usize, transfer: fn(&mut Cpu, &Op, u64) -> Done) -> Done {
    let repeated = op.prefixes & (REP | REPNE) != 0;
    let address_size = op.mem.address_size;
    if repeated && cpu.gpr(1, address_size) == 0 {
        return Ok(());
    }
    let port = cpu.state.gpr[2] as u16;
    cpu.check_port(port, 1 << op.size)?;
    let offset = cpu.gpr(pointer, address_size);
    transfer(cpu, op, offset)?;
    let step = if cpu.state.rflags & rflags::DF != 0 { (1_u64 << op.size).wrapping_neg() } else { 1 << op.size };
    cpu.set_gpr(pointer, address_size, offset.wrapping_add(step) & size_mask(address_size));
    if !repeated {
        return Ok(());
    }
    let left = cpu.gpr(1, address_size).wrapping_sub(1);
    cpu.set_gpr(1, address_size, left);
    if left == 0 { Ok(()) } else { Err(Leave::Again) }
}

fn ins(cpu: &mut Cpu, op: &Op) -> Done {
    string(cpu, op, 7, |cpu, op, offset| {
        let bytes = 1_u64 << op.size;
        let address = cpu.segmented(seg::ES, offset, bytes, Access::Write)?;
        // The store must be known to succeed before the device is read: reading has effects.
        cpu.probe_write(address, bytes, seg::ES as u8, Rights::Current)?;
        let port = cpu.state.gpr[2] as u16;
        let value = cpu.read_port(port, op.size);
        cpu.write_bytes(address, &value.to_le_bytes()[..bytes as usize], seg::ES as u8, Rights::Current)
    })
}

fn outs(cpu: &mut Cpu, op: &Op) -> Done {
    string(cpu, op, 6, |cpu, op, offset| {
        let bytes = 1_u64 << op.size;
        let address = cpu.segmented(op.mem.segment as usize, offset, bytes, Access::Read)?;
        let mut data = [0; 4];
        cpu.read_bytes(address, &mut data[..bytes as usize], op.mem.segment, Rights::Current)?;
        let port = cpu.state.gpr[2] as u16;
        cpu.write_port(port, op.size, u32::from_le_bytes(data));
        Ok(())
    })
}
