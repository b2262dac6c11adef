//! The devices of a machine, made and put on its buses: the virtual hardware a guest finds.

use std::io::{self, Read};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use device::bus::{Bus, PortDevice};
use device::emulated::acpi::{self, PowerManagement};
use device::emulated::debug::{DebugExit, PostCode};
use device::emulated::fw_cfg::{self, FwCfg};
use device::emulated::hpet::{self, Hpet, LegacyLine, LegacyReplacement};
use device::emulated::i8042::I8042;
use device::emulated::pit::{self, Pit};
use device::emulated::reset::{ResetControl, SystemControlA};
use device::emulated::rtc::{self, CmosMemory, Rtc};
use device::emulated::serial::{self, SerialInput, SerialPort};
use device::emulated::testdev;
use device::interrupt::{InterruptChips, InterruptSink, IrqLine};
use device::pci::{ConfigPorts, Ecam, PciBus, PciFunction, Route, Windows};
use device::power::PowerSwitch;
use device::virtio::block::{Access, Block, RawDisk};
use device::virtio::console::{Console, ConsoleSize, PortEnds};
use device::virtio::entropy::EntropyDevice;
use device::virtio::{self, VirtioDevice, VirtioPci};
use host::{Clock, Entropy, Timers};
use memory::{Gpa, GuestRam};

use crate::announce::{Events, FirstOutput};
use crate::layout::{self, Layout};
use crate::plan::DiskMode;
use crate::{Attachments, Error, Plan};

/// How long the end of a run waits for the last of the console's output to be taken.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// Bytes taken from the serial console's input at once.
const INPUT_CHUNK: usize = 4096;

/// Where the RTC keeps the century, as in every PC since the PS/2.
const CENTURY_REGISTER: u8 = 0x32;

/// What devices take from the host.
#[derive(Clone)]
pub(crate) struct HostParts {
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) timers: Arc<dyn Timers>,
    pub(crate) entropy: Arc<dyn Entropy>,
    /// Kicks that the engine counts without telling of them.
    pub(crate) doorbells: Option<Arc<dyn virtio::Doorbells>>,
}

/// All devices of a machine.
pub(crate) struct Board {
    pub(crate) bus: Arc<Bus>,
    /// virtio devices, in the order of their slots.
    pub(crate) devices: Vec<virtio::Handle>,
    pub(crate) console_size: Option<ConsoleSize>,
    pub(crate) interrupt_routes: Vec<Route>,
    power_management: Arc<Mutex<PowerManagement>>,
    serial: SerialPort,
    pci: PciBus,
}

impl Board {
    /// Makes the devices of `plan`, interrupting through `chips` and ending the run through `power`.
    pub(crate) fn new(
        plan: &Plan,
        layout: &Layout,
        ram: &GuestRam,
        chips: &Arc<InterruptChips>,
        power: &PowerSwitch,
        host: &HostParts,
        ends: Attachments,
    ) -> Result<Self, Error> {
        let bus = Arc::new(Bus::default());
        chips.place(&bus)?;
        let sink: Arc<dyn InterruptSink> = Arc::clone(chips) as _;
        let power_management = legacy_devices(&bus, &sink, layout, plan.cpus, power, host)?;
        let serial = serial_console(&bus, &sink, ends.serial, Events::new(ends.events))?;
        if plan.test_devices {
            test_devices(&bus, &sink, plan, power)?;
        }
        let pci = pci_bus(&bus, sink, layout, power)?;
        let mut functions = Functions { pci: &pci, ram, host, handles: Vec::new() };
        let console_size = functions.add_console(ends.ports)?;
        functions.add_disks(plan)?;
        functions.add("entropy", Box::new(EntropyDevice::new(Arc::clone(&host.entropy))))?;
        let devices = functions.handles;
        let interrupt_routes = pci.interrupt_routes();
        Ok(Self { bus, devices, console_size, interrupt_routes, power_management, serial, pci })
    }

    /// One more PCI function, without interrupts.
    pub(crate) fn add(&self, function: impl PciFunction + 'static) -> Result<(), Error> {
        self.pci.add(shared(function))?;
        Ok(())
    }

    /// What ACPI says about these devices.
    pub(crate) fn description(&self, cpus: u32) -> crate::acpi::Description {
        crate::acpi::Description {
            cpus,
            hpet_id: hpet::CAPABILITIES as u32,
            century: CENTURY_REGISTER,
            interrupt_routes: self.interrupt_routes.clone(),
        }
    }

    /// A press of the power button.
    pub(crate) fn power_button(&self) -> PowerButton {
        PowerButton(Arc::clone(&self.power_management))
    }

    /// Delivers what the guest has sent, and ends the devices' threads.
    pub(crate) fn shut_down(&self) {
        self.devices.iter().for_each(virtio::Handle::shutdown);
        self.serial.flush(LAST_WORDS);
    }
}

/// The machine's power button.
#[derive(Clone)]
pub(crate) struct PowerButton(Arc<Mutex<PowerManagement>>);

impl PowerButton {
    pub(crate) fn press(&self) {
        lock(&self.0).press_power_button();
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn shared<T>(device: T) -> Arc<Mutex<T>> {
    Arc::new(Mutex::new(device))
}

/// Timers, clock, power and keyboard controller: what a PC has without asking.
fn legacy_devices(
    bus: &Bus,
    sink: &Arc<dyn InterruptSink>,
    layout: &Layout,
    cpus: u32,
    power: &PowerSwitch,
    host: &HostParts,
) -> Result<Arc<Mutex<PowerManagement>>, Error> {
    let (clock, timers) = (&host.clock, &*host.timers);
    let replacement = LegacyReplacement::default();
    let legacy = |gsi| LegacyLine::new(Arc::clone(sink), gsi, &replacement);
    let line = |gsi| IrqLine::new(Arc::clone(sink), gsi);

    Pit::place(&Pit::new(Arc::clone(clock), timers, legacy(pit::IRQ)), bus)?;
    let memory =
        CmosMemory { below_4g: layout.low_ram_end(), above_4g: layout.ram.get(1).map_or(0, |piece| piece.1), cpus };
    bus.add_ports(rtc::PORT, rtc::LENGTH, Rtc::new(Arc::clone(clock), timers, legacy(rtc::IRQ), memory))?;
    let hpet = Hpet::new(Arc::clone(clock), timers, Arc::clone(sink), replacement.clone());
    bus.add_mmio(Gpa(hpet::BASE), hpet::LENGTH, hpet)?;

    let power_management = PowerManagement::new(power.clone(), line(acpi::SCI_GSI), Arc::clone(clock), timers);
    bus.add_ports(acpi::PORT, acpi::LENGTH, Arc::clone(&power_management) as _)?;
    I8042::new(power.clone(), line(layout::KEYBOARD_GSI)).place(bus)?;
    bus.add_ports(SystemControlA::PORT, 1, shared(SystemControlA::new(power.clone())))?;
    bus.add_ports(PostCode::PORT, 1, shared(PostCode::default()))?;
    Ok(power_management)
}

fn serial_console(
    bus: &Bus,
    sink: &Arc<dyn InterruptSink>,
    ends: crate::SerialEnds,
    events: Events,
) -> Result<SerialPort, Error> {
    let thread = |source| Error::Host { what: "a thread for the serial console", source };
    let output = Box::new(FirstOutput { output: ends.output, events, seen: false });
    let line = IrqLine::new(Arc::clone(sink), serial::COM1_IRQ);
    let port = SerialPort::start(line, output).map_err(thread)?;
    bus.add_ports(serial::COM1, serial::LENGTH, port.device())?;
    if let Some(input) = ends.input {
        let to = port.input();
        // Nobody waits for this thread: it may sit in a read that never returns.
        std::thread::Builder::new().name("serial-input".into()).spawn(move || feed(input, &to)).map_err(thread)?;
    }
    Ok(port)
}

/// Hands the console's input to the guest until either ends.
fn feed(mut input: Box<dyn Read + Send>, to: &SerialInput) {
    let mut chunk = [0; INPUT_CHUNK];
    loop {
        match input.read(&mut chunk) {
            Ok(0) => return,
            Ok(length) => {
                if !to.send(&chunk[..length]) {
                    return;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                tracing::debug!("the serial console's input ended: {error}");
                return;
            }
        }
    }
}

fn test_devices(bus: &Bus, sink: &Arc<dyn InterruptSink>, plan: &Plan, power: &PowerSwitch) -> Result<(), Error> {
    bus.add_ports(DebugExit::PORT, DebugExit::LENGTH, shared(DebugExit::new(power.clone())))?;
    bus.add_ports(fw_cfg::PORT, fw_cfg::LENGTH, shared(FwCfg::new(plan.memory, plan.cpus as u16)))?;
    testdev::place(bus, Arc::clone(sink))?;
    Ok(())
}

fn pci_bus(
    bus: &Arc<Bus>,
    sink: Arc<dyn InterruptSink>,
    layout: &Layout,
    power: &PowerSwitch,
) -> Result<PciBus, Error> {
    let windows =
        Windows { memory: layout::PCI_WINDOW_32, memory64: layout.pci_window_64.clone(), ports: layout::PCI_PORTS };
    let pci = PciBus::new(Arc::clone(bus), sink, windows, layout::PCI_GSIS)?;
    let reset: Arc<Mutex<dyn PortDevice>> = shared(ResetControl::new(power.clone()));
    bus.add_ports(ConfigPorts::BASE, ConfigPorts::LENGTH, shared(pci.config_ports(Some(reset))))?;
    bus.add_mmio(Gpa(layout::ECAM), Ecam::SIZE, shared(pci.ecam()))?;
    Ok(pci)
}

/// Fills the PCI bus with virtio devices.
struct Functions<'a> {
    pci: &'a PciBus,
    ram: &'a GuestRam,
    host: &'a HostParts,
    handles: Vec<virtio::Handle>,
}

impl Functions<'_> {
    fn add(&mut self, name: &str, device: Box<dyn VirtioDevice>) -> Result<(), Error> {
        let function = VirtioPci::new(name, device, self.ram.clone(), self.host.doorbells.clone())
            .map_err(|source| Error::Host { what: "a thread for a virtio device", source })?;
        self.handles.push(function.handle());
        let function: Arc<Mutex<dyn PciFunction>> = shared(function);
        self.pci.add(function)?;
        Ok(())
    }

    fn add_console(&mut self, ports: Vec<PortEnds>) -> Result<Option<ConsoleSize>, Error> {
        if ports.is_empty() {
            return Ok(None);
        }
        let console = Console::new(ports);
        let size = console.size();
        self.add("console", Box::new(console))?;
        Ok(Some(size))
    }

    fn add_disks(&mut self, plan: &Plan) -> Result<(), Error> {
        for (index, disk) in plan.disks.iter().enumerate() {
            let access = match disk.mode {
                DiskMode::ReadWrite => Access::ReadWrite,
                DiskMode::ReadOnly => Access::ReadOnly,
            };
            let image = RawDisk::open(&disk.path, access)?;
            let serial = disk.serial.as_deref().unwrap_or_default();
            self.add(&format!("disk{index}"), Box::new(Block::new(Box::new(image), serial, plan.cpus as u16)))?;
        }
        Ok(())
    }
}
