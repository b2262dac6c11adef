//! A vCPU in 64-bit mode with nothing around it, for tests of whole runs.
//!
//! ```text
//!   0x1000 page tables (2 MiB identity-mapped)   0x10000 code   0x100000 data   0x180000 stack, downwards
//!   0x200000 to 0x400000: the same for programs, in small pages; from 0x300000 on not to be executed
//! ```

use std::sync::Arc;

use engine::cpu_model::{DEFAULT, HostCpu, lookup};
use engine::state::{Segment, cr0, cr4, efer, seg};
use engine::{Answer, CpuIo, CpuState, Exit, HypercallArgs, Ledger, MsrRefused, Vcpu, VcpuConfig, VcpuId};
use memory::{Gpa, GuestRam};

use crate::config::Config;
use crate::run::Runner;
use crate::shared::Shared;

pub(crate) const TABLES: u64 = 0x1000;
pub(crate) const CODE: u64 = 0x1_0000;
const STACK: u64 = 0x18_0000;
/// What a program finds memory at, more than where it is.
pub(crate) const PROGRAM: u64 = 2 << 20;
const PROGRAM_TABLE: u64 = 0x8000;
/// From here on, its pages are not to be executed.
pub(crate) const DATA: u64 = 0x10_0000;

pub(crate) const PRESENT_WRITABLE: u64 = 3;
pub(crate) const LARGE: u64 = 1 << 7;
const USER: u64 = 1 << 2;
const NO_EXECUTE: u64 = 1 << 63;

/// A vCPU whose next instruction is the first of its code, at CPL 0.
pub(crate) struct Bare {
    pub vcpu: Runner,
    pub ledger: Arc<Ledger>,
    pub ram: GuestRam,
}

impl Bare {
    pub(crate) fn new(code: &[u8], config: Config) -> Self {
        let ram = GuestRam::new(&[(Gpa(0), 2 << 20)]).unwrap();
        for (at, entry) in [
            (TABLES, (TABLES + 0x1000) | PRESENT_WRITABLE | USER),
            (TABLES + 0x1000, (TABLES + 0x2000) | PRESENT_WRITABLE | USER),
            (TABLES + 0x2000, PRESENT_WRITABLE | LARGE),
            (TABLES + 0x2008, PROGRAM_TABLE | PRESENT_WRITABLE | USER),
        ] {
            ram.write_value(Gpa(at), &entry).unwrap();
        }
        for page in (0..PROGRAM).step_by(0x1000) {
            let code = if page < DATA { 0 } else { NO_EXECUTE };
            ram.write_value(Gpa(PROGRAM_TABLE + page / 512), &(page | PRESENT_WRITABLE | USER | code)).unwrap();
        }
        ram.write(Gpa(CODE), code).unwrap();
        let table = lookup(DEFAULT).unwrap().table(&HostCpu::read(), 0, 1).unwrap();
        let ledger = Arc::<Ledger>::default();
        let vcpu = VcpuConfig {
            id: VcpuId(0),
            cpuid: Arc::new(table),
            signal: Arc::default(),
            ledger: Arc::clone(&ledger),
            tsc: Arc::default(),
        };
        let mut vcpu = Runner::new(Arc::new(Shared::new(ram.clone(), config)), vcpu).unwrap();
        vcpu.load(&state()).unwrap();
        Self { vcpu, ledger, ram }
    }

    /// Runs to the next exit and returns the state there.
    pub(crate) fn run(&mut self) -> (Exit, Box<CpuState>) {
        let exit = self.vcpu.run(&mut Nothing);
        (exit, self.vcpu.save())
    }
}

/// Gives a program another page of RAM at an address of its own.
pub(crate) fn remap(ram: &GuestRam, address: u64, gpa: u64) {
    let entry = gpa | PRESENT_WRITABLE | USER | NO_EXECUTE;
    ram.write_value(Gpa(PROGRAM_TABLE + (address - PROGRAM) / 512), &entry).unwrap();
}

/// The state in which a program runs, at CPL 3, from what a kernel's state is.
pub(crate) fn as_program(state: &mut CpuState) {
    for segment in &mut state.segments {
        segment.attributes |= 3 << 5;
        segment.selector |= 3;
    }
    state.rip += PROGRAM;
}

fn state() -> CpuState {
    let mut state = CpuState::reset();
    state.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::PG;
    state.cr3 = TABLES;
    state.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
    state.efer = efer::SCE | efer::LME | efer::LMA | efer::NXE;
    state.xcr0 = 7;
    let flat = Segment { selector: 0x10, attributes: 0xc093, limit: u32::MAX, base: 0 };
    state.segments = [flat; 6];
    state.segments[seg::CS] = Segment { selector: 8, attributes: 0xa09b, limit: u32::MAX, base: 0 };
    state.rip = CODE;
    state.gpr[4] = STACK;
    state
}

/// A machine without devices.
pub(crate) struct Nothing;

impl CpuIo for Nothing {
    fn port_read(&mut self, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn port_write(&mut self, _port: u16, _data: &[u8]) {}
    fn mmio_read(&mut self, _gpa: Gpa, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&mut self, _gpa: Gpa, _data: &[u8]) {}
    fn msr_read(&mut self, _index: u32) -> Result<u64, MsrRefused> {
        Err(MsrRefused)
    }
    fn msr_write(&mut self, _index: u32, _value: u64) -> Result<(), MsrRefused> {
        Err(MsrRefused)
    }
    fn hypercall(&mut self, _call: HypercallArgs) -> Answer {
        Answer::Now(0)
    }
    fn take_interrupt(&mut self) -> Option<u8> {
        None
    }
    fn interrupt_pending(&mut self) -> bool {
        false
    }
    fn task_priority(&mut self) -> u8 {
        0
    }
    fn set_task_priority(&mut self, _priority: u8) {}
    fn stop_requested(&self) -> bool {
        false
    }
}
