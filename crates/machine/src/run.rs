//! The machine: assembled from a plan, run to its end.

use std::sync::Arc;

use device::interrupt::{InterruptChips, Lapic, LapicConfig};
use device::power::PowerSwitch;
use device::virtio;
use device::virtio::console::ConsoleSize;
use engine::cpu_model::{self, Feature};
use engine::{CpuState, CpuidTable, Engine, GuestTsc, Ledger, Signal, Signals, VcpuConfig, VcpuId};
use host::{Clock, HostClock, HostEntropy, HostTimers, Timers, TscGrid};
use memory::GuestRam;

use crate::announce::{Announcer, Events};
use crate::board::{Board, HostParts, PowerButton};
use crate::control::Control;
use crate::dialects::{self, Spoken};
use crate::guest_io::{GuestIo, SharedIo};
use crate::kernel_parts::{KernelApics, KernelDoorbells, set_virtual_wire};
use crate::pins::Pins;
use crate::processor::Processor;
use crate::select::{EngineWish, select_engine};
use crate::surfaces::{Contract, NotRevoked, Observer, Revocation};
use crate::time::{GuestTime, TscClock};
use crate::{Attachments, Error, Event, Layout, MemoryFigures, Plan, Report, acpi, boot, firmware, smbios};

/// A machine that has not run yet.
pub struct Machine {
    handle: Handle,
    processors: Vec<Processor>,
    board: Board,
    ram: GuestRam,
    events: Events,
    engine: &'static str,
    tsc_khz: u64,
    /// Devices' timers fire only while their maker lives.
    timers: Arc<dyn Timers>,
}

/// What belongs to one vCPU beside its engine's part.
pub(crate) struct Slot {
    pub(crate) signal: Arc<Signal>,
    pub(crate) ledger: Arc<Ledger>,
    pub(crate) tsc: Arc<GuestTsc>,
    pub(crate) cpuid: Arc<CpuidTable>,
}

impl Machine {
    /// Lays the plan out, loads the kernel, and puts devices and vCPUs together.
    ///
    /// # Errors
    /// [`Error`], before anything of the guest has run.
    pub fn assemble(plan: &Plan, ends: Attachments) -> Result<Self, Error> {
        plan.check()?;
        let selected = select_engine(EngineWish::of(plan))?;
        Self::on(plan, ends, |ram| selected.make(plan, ram))
    }

    /// Assembles on the engine that `engine` makes.
    fn on(
        plan: &Plan,
        ends: Attachments,
        engine: impl FnOnce(GuestRam) -> Result<Box<dyn Engine>, Error>,
    ) -> Result<Self, Error> {
        let layout = Layout::new(plan);
        let ram = dialects::with_contract_pages(plan, GuestRam::new(&layout.ram)?)?;
        let loaded = boot::load(plan, &layout, &ram)?;
        let events = Events::new(ends.events.clone());
        let (protocol, bytes, entry) = (loaded.protocol, loaded.bytes, loaded.state.rip);
        events.tell(Event::KernelLoaded { protocol, bytes, entry });

        let timers = HostTimers::start().map_err(|source| Error::Host { what: "a thread for timers", source })?;
        let engine = engine(ram.clone())?;
        let time = GuestTime::new(plan.time_policy, Arc::new(HostClock), Arc::new(timers));
        let host = HostParts {
            clock: time.clock,
            timers: time.timers,
            entropy: Arc::new(HostEntropy),
            doorbells: engine.doorbells().map(|doorbells| Arc::new(KernelDoorbells(doorbells)) as _),
        };
        let slots = slots(plan, &*engine, &*host.clock, time.grid)?;
        let chips = interrupt_chips(plan, &slots, &*engine, &host);
        chips.virtual_wire();
        let spoken = Spoken::new(plan, &*engine, &slots, &chips, &host, &ram);
        let power = PowerSwitch::default();
        let board = Board::new(plan, &layout, &ram, &chips, &power, &host, ends)?;
        firmware::leave_behind(&ram)?;
        if let Some(device) = spoken.contract_device(&ram) {
            board.add(device)?;
        }
        acpi::install(&board.description(plan.cpus), &layout, &ram)?;
        smbios::install(&layout, &ram)?;

        let control = Arc::new(Control::new(slots.iter().map(|slot| Arc::clone(&slot.signal)).collect(), power));
        let announcer = Arc::new(Announcer::new(board.devices.clone(), events.clone()));
        let shared = SharedIo { bus: Arc::clone(&board.bus), chips, control: Arc::clone(&control), announcer };
        if plan.test_devices {
            spoken.place_test_ports(&board.bus, &control, &host)?;
        }
        let processors = processors(plan, &slots, &shared, &*engine, (&spoken, &*host.timers), &loaded.state)?;
        let kvm_offered = slots.first().map_or(0, |slot| slot.cpuid.answer(contract::kvm::leaf::FEATURES, 0).eax);
        // Where the host's kernel serves the dialect, nobody here sees it used.
        let seen = engine.kvm_dialect().is_none();
        let kvm_usage = processors.iter().filter(|_| seen).map(|processor| processor.io.kvm_usage()).collect();
        let handle = Handle {
            control,
            ledgers: slots.iter().map(|slot| Arc::clone(&slot.ledger)).collect(),
            devices: board.devices.clone(),
            console_size: board.console_size.clone(),
            power_button: board.power_button(),
            observer: Observer {
                dialects: plan.dialects,
                kvm_offered,
                kvm_usage,
                native: spoken.native,
                tsc_khz: host.clock.tsc_khz(),
                started_ns: HostClock.monotonic_ns(),
            },
            engine: engine.name(),
        };
        let (engine, tsc_khz) = (engine.name(), host.clock.tsc_khz());
        Ok(Self { handle, processors, board, ram, events, engine, tsc_khz, timers: host.timers })
    }

    /// A way to reach the machine from other threads.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Runs the guest until it ends or is stopped.
    ///
    /// # Errors
    /// [`Error::Host`] where the host refuses a thread, [`Error::Vcpu`] where a vCPU's thread died.
    pub fn run(self) -> Result<Report, Error> {
        let control = &self.handle.control;
        self.events.tell(Event::Started);
        let start = HostClock.monotonic_ns();
        let mut threads = Vec::new();
        for processor in self.processors {
            let index = processor.index;
            let run = move || {
                host::leave_signals_to_other_threads();
                processor.run()
            };
            let thread = std::thread::Builder::new().name(format!("vcpu{index}")).spawn(run);
            match thread {
                Ok(thread) => threads.push((index, thread)),
                Err(source) => {
                    control.stop_all();
                    threads.into_iter().for_each(|(_, thread)| drop(thread.join()));
                    return Err(Error::Host { what: "a thread for a vCPU", source });
                }
            }
        }
        // All are waited for, whichever dies.
        let died = threads.into_iter().filter_map(|(index, thread)| thread.join().err().map(|_| index)).min();
        let run_ns = HostClock.monotonic_ns() - start;
        drop(self.timers);
        self.board.shut_down();
        self.events.tell(Event::Ended);
        let outcome = match (died, control.outcome()) {
            (Some(index), _) => return Err(Error::Vcpu { index }),
            (None, Some(outcome)) => outcome,
            (None, None) => return Err(Error::NoOutcome),
        };
        Ok(Report {
            outcome,
            finding: control.finding(),
            engine: self.engine,
            devices: self.handle.devices(),
            ledgers: self.handle.ledgers,
            tsc_khz: self.tsc_khz,
            run_ns,
            memory: memory_figures(&self.ram),
        })
    }
}

/// Signals, counters and CPUID of all vCPUs.
fn slots(plan: &Plan, engine: &dyn Engine, clock: &dyn Clock, grid: Option<TscGrid>) -> Result<Vec<Slot>, Error> {
    let model = cpu_model::lookup(&plan.cpu_model).ok_or_else(|| Error::UnknownCpuModel {
        name: plan.cpu_model.clone(),
        known: cpu_model::names().collect::<Vec<_>>().join(", "),
    })?;
    let host_cpu = engine.host_cpu();
    let (khz, zero) = (clock.tsc_khz(), clock.tsc());
    (0..plan.cpus)
        .map(|index| {
            let mut cpuid = model.table(&host_cpu, index, plan.cpus)?;
            let tsc = GuestTsc::new(khz, zero, 0);
            dialects::speak(&mut cpuid, plan, engine, khz);
            Ok(Slot {
                signal: Arc::default(),
                ledger: Arc::default(),
                tsc: Arc::new(match grid {
                    Some(grid) => tsc.on(grid),
                    None => tsc,
                }),
                cpuid: Arc::new(cpuid),
            })
        })
        .collect()
}

/// The interrupt chips: all of them ours, or before the engine's local APICs.
fn interrupt_chips(plan: &Plan, slots: &[Slot], engine: &dyn Engine, host: &HostParts) -> Arc<InterruptChips> {
    if let (Some(apics), Some(bootstrap)) = (engine.local_apics(), slots.first()) {
        return InterruptChips::before(Arc::new(KernelApics { apics, bootstrap: Arc::clone(&bootstrap.signal) }));
    }
    let lapics = slots.iter().enumerate().map(|(index, slot)| {
        let config = LapicConfig {
            x2apic: slot.cpuid.has(Feature::X2apic),
            tsc_deadline: slot.cpuid.has(Feature::TscDeadline),
            physical_bits: slot.cpuid.physical_bits() as u8,
        };
        let tsc = Arc::new(TscClock { clock: Arc::clone(&host.clock), tsc: Arc::clone(&slot.tsc) });
        let pins = Arc::new(Pins::new(Arc::clone(&slot.signal), index != 0));
        Lapic::new(index as u32, config, Arc::clone(&host.clock), &*host.timers, tsc, pins)
    });
    InterruptChips::new(lapics.collect(), dialects::extended_ids(plan))
}

/// All vCPUs on `engine`: the first in the kernel's entry state, the others as RESET leaves them.
fn processors(
    plan: &Plan,
    slots: &[Slot],
    shared: &SharedIo,
    engine: &dyn Engine,
    (spoken, timers): (&Spoken, &dyn Timers),
    entry: &CpuState,
) -> Result<Vec<Processor>, Error> {
    let make = |(index, slot): (usize, &Slot)| {
        let mut vcpu = engine.vcpu(VcpuConfig {
            id: VcpuId(index as u32),
            cpuid: Arc::clone(&slot.cpuid),
            signal: Arc::clone(&slot.signal),
            ledger: Arc::clone(&slot.ledger),
            tsc: Arc::clone(&slot.tsc),
        })?;
        if index == 0 {
            vcpu.load(entry)?;
            if let Some(mut state) = vcpu.save_kernel_state() {
                set_virtual_wire(&mut state);
                vcpu.load_kernel_state(&state)?;
            }
        }
        let paravirt = spoken.vcpu(index as u32);
        let waits_in_engine = engine.local_apics().is_some();
        let alarm = waits_in_engine.then(|| {
            let signal = Arc::clone(&slot.signal);
            timers.timer(Box::new(move || signal.raise(Signals::WAKE)))
        });
        Ok(Processor {
            index: index as u32,
            vcpu,
            io: GuestIo::new(index, shared.clone(), paravirt, Arc::clone(&slot.ledger)),
            signal: Arc::clone(&slot.signal),
            ledger: Arc::clone(&slot.ledger),
            control: Arc::clone(&shared.control),
            profiled: plan.profile,
            waits_in_engine,
            alarm,
        })
    };
    slots.iter().enumerate().map(make).collect()
}

fn memory_figures(ram: &GuestRam) -> MemoryFigures {
    let (guest, guest_touched, process) = (ram.bytes(), ram.resident_bytes(), host::resident_bytes());
    MemoryFigures { guest, guest_touched, process, overhead: process.saturating_sub(guest_touched) }
}

/// Reaches a running machine from any thread.
#[derive(Clone)]
pub struct Handle {
    control: Arc<Control>,
    ledgers: Vec<Arc<Ledger>>,
    devices: Vec<virtio::Handle>,
    console_size: Option<ConsoleSize>,
    power_button: PowerButton,
    observer: Observer,
    engine: &'static str,
}

impl Handle {
    /// What the guest is offered, has accepted and uses at this moment.
    pub fn contract(&self) -> Contract {
        self.observer.contract()
    }

    /// Takes a feature back from the guest, or says how that stands where it was done before; and the epoch.
    ///
    /// # Errors
    /// [`NotRevoked`]; nothing has changed then.
    pub fn revoke(&self, feature: &str) -> Result<(Revocation, u64), NotRevoked> {
        self.observer.revoke(feature)
    }

    /// The engine's name.
    pub fn engine(&self) -> &'static str {
        self.engine
    }

    /// Ends the run with [`Outcome::Stopped`](crate::Outcome::Stopped), unless it has ended otherwise.
    pub fn stop(&self) {
        self.control.end(crate::Outcome::Stopped);
    }

    /// Has all vCPUs stand still; returns once none executes guest code. Devices and time go on: timers that end meanwhile are
    /// served when the guest runs again, and its clock says that it stood still. Before the run, none begins.
    pub fn pause(&self) {
        self.control.pause();
    }

    /// Has them go on where they are.
    pub fn resume(&self) {
        self.control.resume();
    }

    /// Presses the power button: asks the guest to switch itself off.
    pub fn press_power_button(&self) {
        self.power_button.press();
    }

    /// Tells the guest how many characters its virtio console shows.
    pub fn resize_console(&self, columns: u16, rows: u16) {
        if let Some(size) = &self.console_size {
            size.set(columns, rows);
        }
    }

    /// One ledger a vCPU, readable while they run.
    pub fn ledgers(&self) -> &[Arc<Ledger>] {
        &self.ledgers
    }

    /// What each virtio device has done so far.
    pub fn devices(&self) -> Vec<crate::DeviceFigures> {
        let figures =
            |device: &virtio::Handle| crate::DeviceFigures { name: device.name().into(), counters: device.counters() };
        self.devices.iter().map(figures).collect()
    }
}

#[cfg(test)]
#[path = "run_tests.rs"]
mod tests;
