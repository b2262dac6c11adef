//! The interpreter's side: a vCPU in 64-bit user mode with the same pages at the same addresses.

use std::sync::Arc;

use engine::cpu_model::{DEFAULT, HostCpu, lookup};
use engine::state::{Segment, cr0, cr4, efer};
use engine::{Signals, VcpuConfig, VcpuId};
use iced_x86::{Decoder, DecoderOptions};
use memory::{Gpa, GuestRam};

use super::case::{
    ARENA, ARENA_BYTES, CODE, CODE_BYTES, Case, Code, DATA_LIMIT_16, NO_VECTOR, Outcome, READ_ONLY, XSAVE_BYTES,
};
use crate::bare::Nothing;
use crate::config::{Check, Config};
use crate::cpu::{Cpu, vector};
use crate::jit::{Jit, Ran};
use crate::op::Leave;
use crate::shared::Shared;

const CONFIG: Config = Config { code_cache: 4 << 20, check: Check::Off, translate: true, count: false, classic: false };

/// Guest-physical places: four levels of page tables, code, data.
const TABLES: u64 = 0x1000;
const CODE_FRAMES: u64 = 0x10000;
const ARENA_FRAMES: u64 = 0x20000;

const PRESENT_USER: u64 = 5;
const WRITABLE: u64 = 2;
const NO_EXECUTE: u64 = 1 << 63;

pub(super) struct Guest {
    cpu: Cpu,
    jit: Option<Jit>,
    ram: GuestRam,
    _io: Box<Nothing>,
}

impl Guest {
    pub(super) fn new() -> Self {
        let ram = GuestRam::new(&[(Gpa(0), 0x40000)]).unwrap();
        map_pages(&ram);
        let table = lookup(DEFAULT).unwrap().table(&HostCpu::read(), 0, 1).unwrap();
        let config = VcpuConfig {
            id: VcpuId(0),
            cpuid: Arc::new(table),
            signal: Arc::default(),
            ledger: Arc::default(),
            tsc: Arc::default(),
        };
        let mut cpu = Cpu::new(Arc::new(Shared::new(ram.clone(), CONFIG)), config).unwrap();
        let state = &mut *cpu.state;
        state.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::PG;
        state.cr3 = TABLES;
        state.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::FSGSBASE;
        state.efer = efer::SCE | efer::LME | efer::LMA | efer::NXE;
        state.xcr0 = 7;
        let mut io = Box::new(Nothing);
        cpu.attach_io(&mut *io);
        cpu.exceptions_held = true;
        let jit = Jit::new(&mut cpu);
        Self { cpu, jit, ram, _io: io }
    }

    /// Runs one case to its end or its fault in the interpreter.
    pub(super) fn interpret(&mut self, case: &Case, outcome: &mut Outcome) {
        self.run(case, outcome, |guest, _| execute(&mut guest.cpu));
    }

    /// The same, translated; `near` as for a program with a window.
    pub(super) fn translate(&mut self, case: &Case, outcome: &mut Outcome, near: bool) {
        self.cpu.window.near = near;
        if near {
            self.cpu.fill_window();
        }
        self.run(case, outcome, Self::execute_translated);
    }

    /// True where cases can be translated here.
    pub(super) fn translates(&self) -> bool {
        self.jit.is_some()
    }

    fn run(&mut self, case: &Case, outcome: &mut Outcome, execute: impl FnOnce(&mut Self, &Case) -> Result<(), ()>) {
        let mut code = [0xcc; CODE_BYTES];
        let at = case.place();
        code[at..at + case.length].copy_from_slice(case.bytes());
        self.ram.write(Gpa(CODE_FRAMES), &code).unwrap();
        self.ram.write(Gpa(ARENA_FRAMES), &case.memory).unwrap();
        let cpu = &mut self.cpu;
        cpu.state.gpr = case.gpr;
        cpu.state.rip = case.rip;
        cpu.state.segments = segments(case.code);
        cpu.set_rflags(case.rflags);
        if case.vector {
            cpu.state.xsave.0[..XSAVE_BYTES].copy_from_slice(&case.xsave.0);
        }
        outcome.fault = NO_VECTOR;
        (outcome.error, outcome.address) = (0, 0);
        let done = execute(self, case);
        let cpu = &mut self.cpu;
        match done {
            Ok(()) => {}
            Err(()) => {
                outcome.fault = cpu.exception.vector.into();
                outcome.error = cpu.exception.error.unwrap_or(0).into();
                outcome.address = if cpu.exception.vector == vector::PF { cpu.exception.address } else { 0 };
            }
        }
        outcome.gpr = cpu.state.gpr;
        outcome.rip = cpu.state.rip;
        outcome.rflags = cpu.rflags();
        if case.vector {
            outcome.xsave.0.copy_from_slice(&cpu.state.xsave.0[..XSAVE_BYTES]);
        }
        self.ram.read(Gpa(ARENA_FRAMES), &mut outcome.memory).unwrap();
    }
}

impl Guest {
    /// The run loop's part for one instruction that is followed by INT3, as is all it may lead to.
    fn execute_translated(&mut self, case: &Case) -> Result<(), ()> {
        let Some(jit) = self.jit.as_mut().filter(|_| Jit::can_run(&self.cpu)) else { return execute(&mut self.cpu) };
        // An instruction that jumps to itself would do so for ever; translated code looks for signals there.
        let target = Decoder::with_ip(64, case.bytes(), case.rip, DecoderOptions::AMD).decode().near_branch_target();
        self.cpu.config.signal.take(Signals::ENGINE);
        if target == case.rip {
            self.cpu.config.signal.raise(Signals::ENGINE);
        }
        loop {
            self.cpu.recheck = false;
            let count = self.cpu.state.gpr[1];
            match jit.run(&mut self.cpu) {
                // Of what comes after it.
                Ran::Raised if self.cpu.state.rip != case.rip => return Ok(()),
                Ran::Raised | Ran::Shutdown => return Err(()),
                Ran::One | Ran::Unable => return execute(&mut self.cpu),
                // A string instruction that is not done yet.
                Ran::Look if self.cpu.state.rip == case.rip && self.cpu.state.gpr[1] != count => {}
                Ran::Look => return Ok(()),
            }
        }
    }
}

/// Segments as the child process has them. FS and GS are null.
fn segments(code: Code) -> [Segment; 6] {
    const FLAT: u16 = 0xc000;
    const LONG: u16 = 0x2000;
    let (base, selector) = (code.data_base(), code.data_selector());
    let (attributes, limit) = if code == Code::Bits16 { (0, DATA_LIMIT_16) } else { (FLAT, u32::MAX) };
    let data = Segment { selector, attributes: attributes | 0xf3, limit, base };
    let (attributes, limit) = match code {
        Code::Bits64 => (LONG, u32::MAX),
        Code::Bits32 => (FLAT, u32::MAX),
        Code::Bits16 => (0, CODE_BYTES as u32 - 1),
    };
    let base = code.code_base();
    let code = Segment { selector: code.code_selector(), attributes: attributes | 0xfb, limit, base };
    [data, code, data, data, Segment::default(), Segment::default()]
}

/// The run loop's part for one instruction; an error is an exception.
fn execute(cpu: &mut Cpu) -> Result<(), ()> {
    loop {
        cpu.recheck = false;
        let start = cpu.state.rip;
        let block = match cpu.code_place().and_then(|place| cpu.decode_block(&place)) {
            Ok(found) => found.block,
            Err(_) => return Err(()),
        };
        let op = block.ops[0];
        cpu.state.rip = op.next;
        match (op.handler)(cpu, &op) {
            Ok(()) | Err(Leave::Boundary) => return Ok(()),
            Err(Leave::Again | Leave::Monitor) => cpu.state.rip = start,
            Err(Leave::Raised | Leave::RaisedInTask) => {
                cpu.state.rip = start;
                return Err(());
            }
        }
    }
}

fn map_pages(ram: &GuestRam) {
    let write = |at: u64, entry: u64| ram.write_value(Gpa(at), &entry).unwrap();
    let index = |address: u64, level: u32| (address >> (12 + 9 * level) & 511) * 8;
    let (upper, middle, code, arena) = (TABLES + 0x1000, TABLES + 0x2000, TABLES + 0x3000, TABLES + 0x4000);
    write(TABLES, upper | PRESENT_USER | WRITABLE);
    write(upper, middle | PRESENT_USER | WRITABLE);
    write(middle + index(CODE, 1), code | PRESENT_USER | WRITABLE);
    write(middle + index(ARENA, 1), arena | PRESENT_USER | WRITABLE);
    for offset in (0..CODE_BYTES as u64).step_by(0x1000) {
        write(code + index(CODE + offset, 0), (CODE_FRAMES + offset) | PRESENT_USER);
    }
    for offset in (0..ARENA_BYTES as u64).step_by(0x1000) {
        let writable = if ARENA + offset == READ_ONLY { 0 } else { WRITABLE };
        write(arena + index(ARENA + offset, 0), (ARENA_FRAMES + offset) | PRESENT_USER | NO_EXECUTE | writable);
    }
}
