//! Small guests in assembly, of integer instructions only, on the host's KVM. Where `/dev/kvm` does not open, these tests
//! say so on standard error and pass without having run anything.

mod doze;
mod interrupts;
mod memory_and_ports;
mod processors;

use std::collections::VecDeque;
use std::sync::Arc;

use engine::{
    Answer, CpuIo, CpuState, CpuidTable, Engine, Exit, GuestTsc, HypercallArgs, Ledger, MsrRefused, Signal, Vcpu,
    VcpuConfig, VcpuId,
};
use host::{Clock, HostClock};
use memory::{Gpa, GuestRam};

use crate::kvm::{Config, Kvm};
use crate::probe::long_mode;

/// Where guests write what they have found, and that they are done.
const TELL: u16 = 0x300;
const DONE: u16 = 0x301;
/// An address without RAM, that guests' page tables map.
const MMIO: u64 = 0x18_0000;
/// A page that guests can only read, which begins with [`SHOWN`].
const READ_ONLY: u64 = 0x19_0000;
const SHOWN: u64 = 0x0807_0605_0403_0201;
/// An MSR that no processor has.
const MSR: u32 = 0x4000_2000;

/// Machine code of a guest.
macro_rules! guest {
    ($($line:literal),+ $(,)?) => {{
        let (start, end): (*const u8, *const u8);
        // SAFETY: this only defines bytes that are never run here, and takes their addresses.
        unsafe {
            std::arch::asm!(
                ".pushsection .rodata.guests, \"a\"",
                ".balign 256",
                "771:",
                $($line,)+
                "772:",
                ".popsection",
                "lea {}, [rip + 771b]", "lea {}, [rip + 772b]",
                out(reg) start, out(reg) end,
                options(nomem, nostack, preserves_flags),
            );
        }
        // SAFETY: from the first label to the second lies what was assembled above.
        unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
    }};
}
pub(crate) use guest;

/// What happened, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Event {
    Port(u16, Vec<u8>),
    Mmio(u64, Vec<u8>),
    Msr(u32, u64),
    EndOfInterrupt(u8),
    Hypercall(HypercallArgs),
}

/// A machine that notes all that a guest does.
#[derive(Default)]
struct Io {
    events: Vec<Event>,
    /// What loads find, byte by byte; then ones.
    input: VecDeque<u8>,
    /// The PIC's requests.
    pic: VecDeque<u8>,
    done: bool,
    /// Hypercalls wait.
    later: bool,
}

impl Io {
    fn read(&mut self, data: &mut [u8]) {
        data.iter_mut().for_each(|byte| *byte = self.input.pop_front().unwrap_or(0xff));
    }

    /// Bytes told, in order.
    fn told(&self) -> Vec<u8> {
        let told = |event: &Event| match event {
            Event::Port(TELL, data) => data.clone(),
            _ => Vec::new(),
        };
        self.events.iter().flat_map(told).collect()
    }
}

impl CpuIo for Io {
    fn port_read(&mut self, _port: u16, data: &mut [u8]) {
        self.read(data);
    }
    fn port_write(&mut self, port: u16, data: &[u8]) {
        self.done |= port == DONE;
        self.events.push(Event::Port(port, data.to_vec()));
    }
    fn mmio_read(&mut self, _gpa: Gpa, data: &mut [u8]) {
        self.read(data);
    }
    fn mmio_write(&mut self, gpa: Gpa, data: &[u8]) {
        self.events.push(Event::Mmio(gpa.0, data.to_vec()));
    }
    fn msr_read(&mut self, index: u32) -> Result<u64, MsrRefused> {
        if index == MSR { Ok(0x1122_3344_5566_7788) } else { Err(MsrRefused) }
    }
    fn msr_write(&mut self, index: u32, value: u64) -> Result<(), MsrRefused> {
        self.events.push(Event::Msr(index, value));
        if index == MSR || index == PAT { Ok(()) } else { Err(MsrRefused) }
    }
    fn hypercall(&mut self, call: HypercallArgs) -> Answer {
        self.events.push(Event::Hypercall(call));
        if self.later { Answer::Later } else { Answer::Now(0x5a5a_0000_0000_a5a5) }
    }
    fn take_interrupt(&mut self) -> Option<u8> {
        self.pic.pop_front()
    }
    fn end_of_interrupt(&mut self, vector: u8) {
        self.events.push(Event::EndOfInterrupt(vector));
    }
    fn interrupt_pending(&mut self) -> bool {
        !self.pic.is_empty()
    }
    fn task_priority(&mut self) -> u8 {
        0
    }
    fn set_task_priority(&mut self, _priority: u8) {}
    fn stop_requested(&self) -> bool {
        self.done
    }
}

/// An MSR that KVM knows.
const PAT: u32 = 0x277;

/// A VM of one vCPU and a megabyte.
struct Bench {
    engine: Kvm,
    ram: GuestRam,
    signal: Arc<Signal>,
    ledger: Arc<Ledger>,
    cpuid: Arc<CpuidTable>,
    vcpu: Box<dyn Vcpu>,
    io: Io,
}

impl Bench {
    /// `None` where there is no KVM.
    fn new(config: Config) -> Option<Self> {
        if let Err(error) = crate::kvm::open_checked() {
            eprintln!("skipped, nothing was run: {error}");
            return None;
        }
        let pages = GuestRam::new(&[(Gpa(READ_ONLY), 0x1000)]).unwrap();
        pages.write_value(Gpa(READ_ONLY), &SHOWN).unwrap();
        let ram = GuestRam::new(&[(Gpa(0), 1 << 20)]).unwrap().with_read_only(pages);
        let engine = Kvm::new(ram.clone(), config).unwrap();
        let (signal, ledger) = (Arc::<Signal>::default(), Arc::<Ledger>::default());
        let model = engine::cpu_model::lookup("max").unwrap();
        let mut cpuid = model.table(&engine.host_cpu(), 0, 1).unwrap();
        cpuid.set(0x4000_0000, 0, engine::Cpuid { eax: 0x4000_0001, ebx: 0x1234, ecx: 0x5678, edx: 0x9abc });
        let cpuid = Arc::new(cpuid);
        let vcpu = engine.vcpu(config_of(0, &cpuid, &signal, &ledger)).unwrap();
        Some(Self { engine, ram, signal, ledger, cpuid, vcpu, io: Io::default() })
    }

    /// The same with a guest of 64-bit code loaded.
    fn with(config: Config, code: &[u8]) -> Option<Self> {
        let mut bench = Self::new(config)?;
        let state = long_mode(&bench.ram, code).unwrap();
        bench.vcpu.load(&state).unwrap();
        Some(bench)
    }

    fn run(&mut self) -> Exit {
        let exit = self.vcpu.run(&mut self.io);
        if exit == Exit::Failed {
            eprintln!("{}", self.vcpu.failure().unwrap_or_default());
        }
        exit
    }
}

fn config_of(id: u32, cpuid: &Arc<CpuidTable>, signal: &Arc<Signal>, ledger: &Arc<Ledger>) -> VcpuConfig {
    VcpuConfig {
        id: VcpuId(id),
        cpuid: Arc::clone(cpuid),
        signal: Arc::clone(signal),
        ledger: Arc::clone(ledger),
        tsc: Arc::new(GuestTsc::new(HostClock.tsc_khz(), HostClock.tsc(), 0)),
    }
}

/// A state that every processor takes and that has something in each register.
fn busy_state(ram: &GuestRam) -> CpuState {
    let mut state = long_mode(ram, &[0xf4]).unwrap();
    state.gpr = std::array::from_fn(|index| 0x1111_1111_1111_1111 * index as u64);
    (state.rip, state.rflags) = (0x1_2345, 0x246);
    (state.cr2, state.dr, state.dr7) = (0x1234_5000, [0x1000, 0x2000, 0x3000, 0x4000], 0x400);
    state.star = 0x0023_0010_0000_0000;
    (state.lstar, state.sfmask, state.kernel_gs_base) = (0xffff_8000_0000_1000, 0x4_7700, 0xffff_8000_0000_2000);
    (state.sysenter_cs, state.sysenter_esp, state.sysenter_eip) = (8, 0x7000, 0x7010);
    state.pat = 0x0007_0406_0007_0401;
    for (index, byte) in state.xsave.0[160..416].iter_mut().enumerate() {
        *byte = index as u8;
    }
    state
}
