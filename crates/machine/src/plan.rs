//! What the user asked for, as pure data.
//!
//! A plan is made by the command line (later also by the API and saved configurations), checked once by
//! [`Plan::check`], laid out by [`layout`](crate::layout) and turned into a machine by
//! [`Machine::assemble`](crate::Machine::assemble). Nothing here touches the host.

use std::path::PathBuf;
use std::sync::Arc;

use contract::kvm::feature as kvm;
use contract::native::feature;
use paravirt::native::Policy;
use serde::Serialize;
use translator::{Check, Config};

pub use translator::{LEAST_CODE_CACHE, MOST_CODE_CACHE};

/// Fewest bytes of RAM a machine can have: the legacy megabyte and something above it.
pub const MIN_MEMORY: u64 = 2 << 20;
/// Most bytes of RAM: what fits below the 64-bit PCI window in a 40-bit physical address space.
pub const MAX_MEMORY: u64 = 512 << 30;
/// Most vCPUs: 8-bit local APIC ids, of which 255 means all of them.
pub const MAX_CPUS: u32 = 254;

/// Which CPU engine runs the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum EngineChoice {
    /// The best one that works here; the choice and its reason are told.
    #[default]
    Auto,
    /// Our own engine, which needs no hardware help.
    Translate,
    /// The host kernel's, through `/dev/kvm`, where a probe guest ran on it.
    Kvm,
    /// The same without a probe: for guests that need less than Linux does.
    #[serde(rename = "kvm-unprobed")]
    KvmUnprobed,
}

/// What the translating engine checks of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum EngineCheck {
    /// Nothing.
    #[default]
    Off,
    /// Nothing is translated: all guest code is interpreted.
    Interpret,
    /// Each translated block, each time it runs, against the interpreter.
    Lockstep,
}

/// Finest quantum of a coarse time policy, nanoseconds: below, no clock that a guest reads is exact anyway.
pub const LEAST_QUANTUM_NS: u32 = 1_000;
/// Coarsest: beyond, kernels give up on their timers.
pub const MOST_QUANTUM_NS: u32 = 100_000_000;
/// Most `time_of_day` calls a second, and most at once.
pub const MOST_CALLS: u32 = 1_000_000_000;

/// How finely a guest may measure time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum TimePolicy {
    /// As finely as the processor does.
    #[default]
    Exact,
    /// No clock, counter or timer is finer than this many nanoseconds, [`LEAST_QUANTUM_NS`]..=[`MOST_QUANTUM_NS`].
    Coarse(u32),
}

/// How often a guest may ask the host for the time of day.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct CallRate {
    /// Calls a second, 1..=[`MOST_CALLS`].
    pub per_s: u32,
    /// How many of them may come at once, 1..=[`MOST_CALLS`].
    pub burst: u32,
}

impl Default for CallRate {
    fn default() -> Self {
        let Policy { calls_per_s, burst, .. } = Policy::default();
        Self { per_s: calls_per_s, burst }
    }
}

/// How a guest's kernel reaches what is not its own to change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Virt {
    /// Translated code does what it can without the monitor.
    #[default]
    Para,
    /// Each sensitive instruction of a kernel is an exit to the monitor, for comparison.
    Classic,
}

/// Which paravirtual dialects the guest is offered, and what of them is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Dialects {
    /// What stock Linux knows: kvmclock and its siblings.
    pub kvm: bool,
    /// The native one.
    pub cordial: bool,
    /// What is left out.
    pub without: Without,
}

impl Dialects {
    /// An unaware guest: no leaves, no MSRs, no hypervisor-present bit.
    pub const NONE: Self = Self { kvm: false, cordial: false, without: Without::NOTHING };

    /// True where user space has the native dialect, too.
    pub const fn has_contract_device(self) -> bool {
        self.cordial && !self.without.contract_device
    }

    /// True where no dialect is spoken.
    pub const fn is_none(self) -> bool {
        !self.kvm && !self.cordial
    }
}

impl Default for Dialects {
    fn default() -> Self {
        Self { kvm: true, ..Self::NONE }
    }
}

/// Paravirtual features that are not offered although their dialect is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Without {
    /// Feature bits of the kvm dialect.
    pub kvm: u32,
    /// Feature bits of the native dialect.
    pub cordial: u64,
    /// The hypervisor-present bit, CPUID leaf 1, ECX bit 31.
    pub hypervisor_bit: bool,
    /// The PCI function that gives the native dialect to user space.
    pub contract_device: bool,
}

impl Without {
    /// Everything that is built is offered.
    pub const NOTHING: Self = Self { kvm: 0, cordial: 0, hypervisor_bit: false, contract_device: false };

    /// What takes the contract device out of the machine.
    const CONTRACT_DEVICE: &str = "contract-device";
    /// What hides the hypervisor-present bit.
    const HYPERVISOR_BIT: &str = "hypervisor-bit";

    /// Every name that [`Without::leave_out`] knows.
    pub fn names() -> impl Iterator<Item = &'static str> {
        let built = feature::NAMES.iter().filter(|(bit, _)| paravirt::native::BUILT & bit != 0).map(|(_, name)| *name);
        built.chain([Self::CONTRACT_DEVICE, Self::HYPERVISOR_BIT]).chain(kvm::NAMES.iter().map(|(_, name)| *name))
    }

    /// Leaves out the feature of this name as well. False where there is none.
    pub fn leave_out(&mut self, name: &str) -> bool {
        if !Self::names().any(|known| known == name) {
            return false;
        }
        for (bit, _) in feature::NAMES.iter().filter(|(_, known)| *known == name) {
            self.cordial |= bit;
        }
        for (bit, _) in kvm::NAMES.iter().filter(|(_, known)| *known == name) {
            self.kvm |= bit;
        }
        self.hypervisor_bit |= name == Self::HYPERVISOR_BIT;
        self.contract_device |= name == Self::CONTRACT_DEVICE;
        true
    }
}

/// Bytes handed to the guest at boot: an initial RAM disk, or a Multiboot module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Payload {
    /// The contents of a file.
    File(PathBuf),
    /// Bytes made by the caller (a generated initramfs).
    #[serde(serialize_with = "length_only")]
    Bytes(Arc<Vec<u8>>),
}

/// A printed plan says how long a generated payload is, not what is in it.
fn length_only<S: serde::Serializer>(bytes: &Arc<Vec<u8>>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&format!("{} bytes", bytes.len()))
}

/// A further Multiboot module, after the initial RAM disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Module {
    /// What is loaded.
    pub payload: Payload,
    /// The string the guest finds beside it; by convention its name, then its arguments.
    pub command_line: String,
}

/// How a disk's file is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskMode {
    /// The guest's writes reach the file.
    #[default]
    ReadWrite,
    /// The guest sees a read-only disk.
    ReadOnly,
}

/// One virtio disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DiskPlan {
    /// A raw image or block device.
    pub path: PathBuf,
    /// How it is used.
    pub mode: DiskMode,
    /// What `/sys/block/*/serial` says, at most 20 bytes.
    pub serial: Option<String>,
}

/// Everything asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// vCPUs, 1..=[`MAX_CPUS`].
    pub cpus: u32,
    /// RAM in bytes, [`MIN_MEMORY`]..=[`MAX_MEMORY`], a multiple of 4096.
    pub memory: u64,
    /// Which engine.
    pub engine: EngineChoice,
    /// Bytes of translated code that each vCPU keeps, [`LEAST_CODE_CACHE`]..=[`MOST_CODE_CACHE`].
    pub code_cache: u64,
    /// What the engine checks of itself.
    pub engine_check: EngineCheck,
    /// What kernels' sensitive instructions are.
    pub virt: Virt,
    /// A name `engine::cpu_model` knows.
    pub cpu_model: String,
    /// Which dialects.
    pub dialects: Dialects,
    /// How finely the guest may measure time.
    pub time_policy: TimePolicy,
    /// How often the guest may call `time_of_day`.
    pub time_of_day_rate: CallRate,
    /// The kernel's file: bzImage, ELF or Multiboot.
    pub kernel: PathBuf,
    /// The initial RAM disk; for a Multiboot kernel the first module.
    pub initrd: Option<Payload>,
    /// Further Multiboot (or PVH) modules.
    pub modules: Vec<Module>,
    /// The kernel's command line.
    pub command_line: String,
    /// Disks in the order the guest numbers them.
    pub disks: Vec<DiskPlan>,
    /// The conveniences bare-metal test kernels expect: debug exit, fw_cfg, the test latch.
    pub test_devices: bool,
    /// Sample what vCPUs spend their time on, and have the engine count instructions: the ledgers' profiles tell.
    pub profile: bool,
}

impl Plan {
    /// A plan for `kernel` with every other value at its default: one vCPU, 1 GiB.
    pub fn new(kernel: impl Into<PathBuf>) -> Self {
        Self {
            cpus: 1,
            memory: 1 << 30,
            engine: EngineChoice::Auto,
            code_cache: Config::default().code_cache,
            engine_check: EngineCheck::Off,
            virt: Virt::Para,
            cpu_model: engine::cpu_model::DEFAULT.into(),
            dialects: Dialects::default(),
            time_policy: TimePolicy::Exact,
            time_of_day_rate: CallRate::default(),
            kernel: kernel.into(),
            initrd: None,
            modules: Vec::new(),
            command_line: String::new(),
            disks: Vec::new(),
            test_devices: false,
            profile: false,
        }
    }

    /// Checks what can be checked without touching the host.
    ///
    /// # Errors
    /// [`Invalid`] for the first value out of its range.
    pub fn check(&self) -> Result<(), Invalid> {
        if !(1..=MAX_CPUS).contains(&self.cpus) {
            return Err(Invalid::Cpus(self.cpus));
        }
        if !(MIN_MEMORY..=MAX_MEMORY).contains(&self.memory) || !self.memory.is_multiple_of(memory::PAGE_SIZE) {
            return Err(Invalid::Memory(self.memory));
        }
        if !(LEAST_CODE_CACHE..=MOST_CODE_CACHE).contains(&self.code_cache) {
            return Err(Invalid::CodeCache(self.code_cache));
        }
        if matches!(self.engine, EngineChoice::Kvm | EngineChoice::KvmUnprobed) && self.engine_check != EngineCheck::Off
        {
            return Err(Invalid::EngineCheck);
        }
        self.check_time()?;
        if self.virt == Virt::Classic {
            if matches!(self.engine, EngineChoice::Kvm | EngineChoice::KvmUnprobed) {
                return Err(Invalid::CLASSIC_ON_KVM);
            }
            if self.engine_check == EngineCheck::Lockstep {
                return Err(Invalid::Virt("--engine-check lockstep, which compares what is translated"));
            }
        }
        for text in std::iter::once(&self.command_line).chain(self.modules.iter().map(|module| &module.command_line)) {
            if text.contains('\0') {
                return Err(Invalid::CommandLine);
            }
        }
        if let Some(serial) = self.disks.iter().filter_map(|disk| disk.serial.as_ref()).find(|serial| serial.len() > 20)
        {
            return Err(Invalid::Serial(serial.clone()));
        }
        Ok(())
    }

    fn check_time(&self) -> Result<(), Invalid> {
        let CallRate { per_s, burst } = self.time_of_day_rate;
        if !(1..=MOST_CALLS).contains(&per_s) || !(1..=MOST_CALLS).contains(&burst) {
            return Err(Invalid::CallRate { per_s, burst });
        }
        let TimePolicy::Coarse(quantum_ns) = self.time_policy else { return Ok(()) };
        if !(LEAST_QUANTUM_NS..=MOST_QUANTUM_NS).contains(&quantum_ns) {
            return Err(Invalid::Quantum(quantum_ns));
        }
        if matches!(self.engine, EngineChoice::Kvm | EngineChoice::KvmUnprobed) {
            return Err(Invalid::TimePolicy);
        }
        // What comes in at a step of the clock has to fit in.
        let least = (u64::from(per_s) * u64::from(quantum_ns)).div_ceil(1_000_000_000);
        if self.dialects.cordial && u64::from(burst) < least {
            return Err(Invalid::Burst { burst, least });
        }
        Ok(())
    }

    /// What the native dialect keeps to.
    pub(crate) fn policy(&self) -> Policy {
        let CallRate { per_s: calls_per_s, burst } = self.time_of_day_rate;
        let exact = Policy { calls_per_s, burst, ..Policy::default() };
        match self.time_policy {
            TimePolicy::Exact => exact,
            TimePolicy::Coarse(quantum_ns) => Policy { quantum_ns, ..exact },
        }
    }

    /// How our own engine is to work.
    pub(crate) fn translator(&self) -> Config {
        Config {
            code_cache: self.code_cache,
            check: if self.engine_check == EngineCheck::Lockstep { Check::Lockstep } else { Check::Off },
            translate: self.engine_check != EngineCheck::Interpret,
            count: self.profile,
            classic: self.virt == Virt::Classic,
        }
    }
}

/// A value no machine can have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// No vCPU, or too many.
    #[error("{0} vCPUs asked for; a machine has 1 to {MAX_CPUS}: change --cpus")]
    Cpus(u32),
    /// Too little or too much memory.
    #[error("{0} bytes of memory asked for; a machine has 2 MiB to 512 GiB in whole 4 KiB pages: change --mem")]
    Memory(u64),
    /// Too little or too much.
    #[error("a code cache of {0} bytes asked for; it has 64 KiB to 1 GiB: change --code-cache")]
    CodeCache(u64),
    /// The other engine has nothing to compare with.
    #[error("--engine-check is for the translating engine: use --engine translate, or leave it out")]
    EngineCheck,
    /// RDTSC cannot be made to leave the guest.
    #[error(
        "a coarse time policy cannot be kept on KVM, where RDTSC reads the processor's counter and cannot be made to exit: use --engine translate, or --time-policy exact"
    )]
    TimePolicy,
    /// Too fine or too coarse.
    #[error("a time quantum of {0} ns asked for; it has 1 us to 100 ms: change --time-policy")]
    Quantum(u32),
    /// None, or too many.
    #[error(
        "{per_s} time_of_day calls a second asked for, {burst} at once; both are 1 to {MOST_CALLS}: change --time-of-day-rate"
    )]
    CallRate {
        /// Calls a second.
        per_s: u32,
        /// At once.
        burst: u32,
    },
    /// The clock steps too coarsely for it.
    #[error(
        "a burst of {burst} time_of_day calls is less than what comes in at one step of the clock, {least}: change --time-of-day-rate, or --time-policy"
    )]
    Burst {
        /// What was asked for.
        burst: u32,
        /// What would do.
        least: u64,
    },
    /// Another engine's, or nothing to compare.
    #[error("--virt classic does not go with {0}: leave one out")]
    Virt(&'static str),
    /// A NUL ends a command line for the guest.
    #[error("a command line contains a NUL byte; the guest would see only what stands before it: remove it")]
    CommandLine,
    /// virtio-blk has 20 bytes for it.
    #[error("disk serial \"{0}\" is longer than 20 bytes: shorten it")]
    Serial(String),
}

impl Invalid {
    /// KVM does not trap what the hardware need not.
    pub(crate) const CLASSIC_ON_KVM: Self =
        Self::Virt("--engine kvm: there the hardware decides what leaves guest code");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_a_valid_plan() {
        assert_eq!(Plan::new("vmlinuz").check(), Ok(()));
    }

    #[test]
    fn checks_become_the_engines_settings() {
        let config = |engine_check| Plan { engine_check, code_cache: 1 << 20, ..Plan::new("vmlinuz") }.translator();
        let off = Config { code_cache: 1 << 20, check: Check::Off, translate: true, count: false, classic: false };
        assert_eq!(config(EngineCheck::Off), off);
        assert_eq!(config(EngineCheck::Interpret), Config { translate: false, ..off });
        assert_eq!(config(EngineCheck::Lockstep), Config { check: Check::Lockstep, ..off });
    }

    #[test]
    fn every_paravirtual_feature_can_be_left_out_by_name() {
        for name in Without::names() {
            let mut without = Without::NOTHING;
            assert!(without.leave_out(name) && without != Without::NOTHING, "{name}");
        }
        let mut without = Without::NOTHING;
        assert!(without.leave_out("wait") && without.leave_out("timer") && without.leave_out("kvm-clocksource"));
        assert_eq!(without, Without { cordial: feature::WAIT | feature::TIMER, kvm: 1, ..Without::NOTHING });
        for unknown in ["", "pressure", "clock ", "WAIT"] {
            assert!(!without.leave_out(unknown), "{unknown}");
        }
    }

    #[test]
    fn impossible_values_are_named() {
        let with = |change: fn(&mut Plan)| {
            let mut plan = Plan::new("vmlinuz");
            change(&mut plan);
            plan.check().unwrap_err()
        };
        assert_eq!(with(|plan| plan.cpus = 0), Invalid::Cpus(0));
        assert_eq!(with(|plan| plan.cpus = 255), Invalid::Cpus(255));
        assert_eq!(with(|plan| plan.memory = 0), Invalid::Memory(0));
        assert_eq!(with(|plan| plan.memory = (4 << 20) + 1), Invalid::Memory((4 << 20) + 1));
        assert_eq!(with(|plan| plan.memory = u64::MAX), Invalid::Memory(u64::MAX));
        assert_eq!(with(|plan| plan.code_cache = 65535), Invalid::CodeCache(65535));
        assert_eq!(with(|plan| plan.code_cache = (1 << 30) + 1), Invalid::CodeCache((1 << 30) + 1));
        let checked_kvm = |plan: &mut Plan| {
            (plan.engine, plan.engine_check) = (EngineChoice::Kvm, EngineCheck::Interpret);
        };
        assert_eq!(with(checked_kvm), Invalid::EngineCheck);
        assert_eq!(with(|plan| plan.time_policy = TimePolicy::Coarse(999)), Invalid::Quantum(999));
        assert_eq!(with(|plan| plan.time_policy = TimePolicy::Coarse(100_000_001)), Invalid::Quantum(100_000_001));
        for engine in [EngineChoice::Kvm, EngineChoice::KvmUnprobed] {
            let plan = Plan { engine, time_policy: TimePolicy::Coarse(1000), ..Plan::new("vmlinuz") };
            assert_eq!(plan.check(), Err(Invalid::TimePolicy));
            assert_eq!(Plan { time_policy: TimePolicy::Exact, ..plan }.check(), Ok(()));
        }
        let rate = |per_s, burst| Plan {
            time_of_day_rate: CallRate { per_s, burst },
            time_policy: TimePolicy::Coarse(1_000_000),
            dialects: Dialects { cordial: true, ..Dialects::NONE },
            ..Plan::new("vmlinuz")
        };
        assert_eq!(rate(0, 1).check(), Err(Invalid::CallRate { per_s: 0, burst: 1 }));
        assert_eq!(rate(1, 1_000_000_001).check(), Err(Invalid::CallRate { per_s: 1, burst: 1_000_000_001 }));
        assert_eq!(rate(10_000, 9).check(), Err(Invalid::Burst { burst: 9, least: 10 }));
        assert_eq!(rate(10_000, 10).check(), Ok(()));
        let classic = |change: fn(&mut Plan)| {
            let mut plan = Plan { virt: Virt::Classic, ..Plan::new("vmlinuz") };
            change(&mut plan);
            plan.check().map(|()| plan.translator().classic).map_err(|error| error.to_string())
        };
        assert_eq!(classic(|_| {}), Ok(true));
        assert!(classic(|plan| plan.engine = EngineChoice::KvmUnprobed).unwrap_err().contains("the hardware decides"));
        assert!(classic(|plan| plan.engine_check = EngineCheck::Lockstep).unwrap_err().contains("lockstep"));
        assert_eq!(with(|plan| plan.command_line = "a\0b".into()), Invalid::CommandLine);
        let disk = |serial: &str| DiskPlan { path: "d".into(), mode: DiskMode::ReadOnly, serial: Some(serial.into()) };
        let mut plan = Plan::new("vmlinuz");
        plan.disks = vec![disk(&"x".repeat(20)), disk(&"y".repeat(21))];
        assert_eq!(plan.check(), Err(Invalid::Serial("y".repeat(21))));
    }
}
