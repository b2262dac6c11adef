//! How a machine is reached while it runs, and what is known once it has ended.

use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::mpsc::Sender;

use device::virtio::CounterValues;
use device::virtio::console::PortEnds;
use engine::Ledger;
use serde::Serialize;

/// The two ends of the serial console (COM1).
pub struct SerialEnds {
    /// Where what the guest prints goes.
    pub output: Box<dyn Write + Send>,
    /// Where what it reads comes from; read on a thread of its own until its end.
    pub input: Option<Box<dyn Read + Send>>,
}

/// What the machine's devices are connected to.
pub struct Attachments {
    /// COM1.
    pub serial: SerialEnds,
    /// The virtio console device's ports; a port with `console` set is a terminal (hvc0).
    pub ports: Vec<PortEnds>,
    /// Where progress is told.
    pub events: Option<Sender<Event>>,
}

/// How a kernel was entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    /// The 64-bit Linux boot protocol.
    Linux64,
    /// PVH: 32-bit entry with a start-info block.
    Pvh,
    /// Multiboot 1.
    Multiboot,
}

/// Progress, as it happens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// The kernel lies in guest memory.
    KernelLoaded {
        /// How it will be entered.
        protocol: Protocol,
        /// Bytes of guest memory it occupies.
        bytes: u64,
        /// Its entry point, guest-physical.
        entry: u64,
    },
    /// vCPU 0 runs.
    Started,
    /// The guest printed its first byte.
    FirstOutput,
    /// The guest's driver took a device into use.
    DeviceReady {
        /// The device's name.
        name: String,
    },
    /// The run is over.
    Ended,
}

/// Why a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "outcome", rename_all = "kebab-case")]
pub enum Outcome {
    /// The guest switched the machine off.
    PowerOff,
    /// The guest reset the machine.
    Reset,
    /// The debug-exit port was written.
    TestExit {
        /// The process status it stands for: `(value << 1) | 1`.
        status: u8,
    },
    /// A triple fault.
    Shutdown {
        /// On which vCPU.
        vcpu: u32,
        /// Its RIP.
        rip: u64,
    },
    /// The engine's check of itself failed: [`Report::finding`] says how.
    EngineDifference {
        /// On which vCPU.
        vcpu: u32,
        /// Where the code in question begins.
        rip: u64,
    },
    /// The engine could not go on with the guest: [`Report::finding`] says why.
    EngineFailure {
        /// On which vCPU.
        vcpu: u32,
        /// Its RIP.
        rip: u64,
    },
    /// [`Handle::stop`](crate::Handle::stop).
    Stopped,
}

/// What the memory of the process went to, in bytes, at the end of the run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct MemoryFigures {
    /// RAM the guest was given.
    pub guest: u64,
    /// How much of it the guest (or the loader) ever touched.
    pub guest_touched: u64,
    /// What the host holds in memory for the whole process.
    pub process: u64,
    /// What of that is not guest RAM: the monitor itself.
    pub overhead: u64,
}

/// What one virtio device has done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceFigures {
    /// "console", "disk0", "entropy" ...
    pub name: String,
    /// Kicks, interrupts, requests, bytes.
    pub counters: CounterValues,
}

/// What is known once a machine has ended.
pub struct Report {
    /// Why it ended.
    pub outcome: Outcome,
    /// What the engine found wrong, with itself or with what it was to run, for people.
    pub finding: Option<String>,
    /// The engine's name.
    pub engine: &'static str,
    /// One ledger a vCPU.
    pub ledgers: Vec<Arc<Ledger>>,
    /// What the virtio devices did.
    pub devices: Vec<DeviceFigures>,
    /// Ticks a millisecond in the ledgers' figures.
    pub tsc_khz: u64,
    /// Wall time from the first guest instruction to the end, nanoseconds.
    pub run_ns: u64,
    /// What memory was used.
    pub memory: MemoryFigures,
}
