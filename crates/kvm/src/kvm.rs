//! The VM as the host's kernel has it, and the engine's traits on it.

use std::io;
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::Arc;

use engine::{CpuidTable, Doorbells, Engine, Error, HostCpu, LocalApics, Vcpu, VcpuConfig};
use kvm_bindings::{
    KVM_API_VERSION, KVM_CAP_BINARY_STATS_FD, KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM_CAP_HYPERV_ENFORCE_CPUID,
    KVM_CAP_IOEVENTFD_ANY_LENGTH, KVM_CAP_SET_GUEST_DEBUG2, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_TSC_DEADLINE_TIMER,
    KVM_CAP_X86_USER_SPACE_MSR, KVM_MAX_CPUID_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY,
    KVM_MSR_EXIT_REASON_FILTER, KVM_MSR_EXIT_REASON_INVAL, KVM_MSR_EXIT_REASON_UNKNOWN, kvm_enable_cap,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd};
use memory::GuestRam;

use crate::doorbell::KernelDoorbells;
use crate::interrupt::{IO_APIC_PINS, KernelApics};
use crate::vcpu::Runner;
use crate::{capability, cpuid, doze};

const DEVICE: &str = "/dev/kvm";
/// Four pages that KVM needs for real mode on Intel's processors before 2010, in the gap that machines leave below 4 GiB.
const IDENTITY_MAP: u64 = 0xfffb_c000;
const TASK_STATE: usize = 0xfffb_d000;

/// What guests are told apart by, beyond what KVM does by itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// MSRs that are the machine's, even where KVM knows them: the native dialect's. Each of 1 to 12288 numbers.
    pub machine_msrs: Vec<RangeInclusive<u32>>,
    /// A store to this port is a hypercall, with its number and arguments in registers: a user-space monitor cannot add
    /// any to the host kernel's.
    pub hypercall_port: Option<u16>,
}

/// What all of a VM's parts share.
pub(crate) struct Vm {
    pub(crate) fd: VmFd,
    pub(crate) ram: GuestRam,
    pub(crate) config: Config,
    /// What CPUID can answer at most.
    pub(crate) supported: CpuidTable,
    /// Bytes that a vCPU shares with the kernel.
    pub(crate) run_bytes: usize,
    pub(crate) has_stats: bool,
    enforces_hyperv: bool,
    has_doorbells: bool,
    /// A sleep ends before guest code has run: see `doze.rs`.
    dozes: bool,
}

/// The engine: one VM of the host's KVM.
pub struct Kvm {
    pub(crate) vm: Arc<Vm>,
    apics: Arc<KernelApics>,
}

pub(crate) fn unusable(reason: String) -> Error {
    Error::Unusable { engine: "kvm", reason }
}

pub(crate) fn refused(what: &'static str, error: impl Into<io::Error>) -> Error {
    Error::Host { what, source: error.into() }
}

/// Opens KVM and checks that it speaks the API there is.
pub(crate) fn open(path: &Path) -> Result<kvm_ioctls::Kvm, Error> {
    let name = path.display();
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).map_err(|error| {
        unusable(match error.kind() {
            io::ErrorKind::NotFound => format!("there is no {name}; load the host's kvm module"),
            io::ErrorKind::PermissionDenied => format!("no permission for {name}; join its group"),
            _ => format!("{name} cannot be opened: {error}"),
        })
    })?;
    // SAFETY: the descriptor is this file's, which gives it up.
    let kvm = unsafe { std::os::fd::FromRawFd::from_raw_fd(std::os::fd::IntoRawFd::into_raw_fd(file)) };
    let kvm: kvm_ioctls::Kvm = kvm;
    match kvm.get_api_version() {
        -1 => Err(unusable(format!("{name} is not KVM: {}", io::Error::last_os_error()))),
        version if version as u32 == KVM_API_VERSION => Ok(kvm),
        version => Err(unusable(format!(
            "{name} speaks API version {version}, not {KVM_API_VERSION}; update the host's kernel"
        ))),
    }
}

/// Opens the host's KVM and checks that it can do what is needed.
pub(crate) fn open_checked() -> Result<kvm_ioctls::Kvm, Error> {
    let kvm = open(Path::new(DEVICE))?;
    let missing = capability::missing(|number| kvm.check_extension_raw(number.into()) > 0);
    capability::reason(&missing).map_or(Ok(kvm), |reason| Err(unusable(reason)))
}

impl Kvm {
    /// A VM of the memory `ram`.
    ///
    /// # Errors
    /// [`Error::Unusable`] where there is no KVM to use, [`Error::Host`] where it refuses what a VM needs.
    pub fn new(ram: GuestRam, config: Config) -> Result<Self, Error> {
        let kvm = open_checked()?;
        let has = |number: u32| kvm.check_extension_raw(number.into()) > 0;
        let list =
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(|e| refused("KVM's list of CPUID leaves", e))?;
        let debugs = kvm.check_extension_raw(KVM_CAP_SET_GUEST_DEBUG2.into()) as u32;
        let vm = Vm {
            fd: kvm.create_vm().map_err(|e| refused("a VM", e))?,
            ram,
            config,
            supported: cpuid::supported(list.as_slice(), has(KVM_CAP_TSC_DEADLINE_TIMER)),
            run_bytes: kvm.get_vcpu_mmap_size().map_err(|e| refused("the size of a vCPU's shared memory", e))?,
            has_stats: has(KVM_CAP_BINARY_STATS_FD),
            enforces_hyperv: has(KVM_CAP_HYPERV_ENFORCE_CPUID),
            has_doorbells: has(KVM_CAP_IOEVENTFD_ANY_LENGTH),
            dozes: debugs & doze::NEEDED == doze::NEEDED,
        };
        vm.fd.set_identity_map_address(IDENTITY_MAP).map_err(|e| refused("an identity map", e))?;
        vm.fd.set_tss_address(TASK_STATE).map_err(|e| refused("a task state segment", e))?;
        vm.place_memory(false)?;
        vm.place_read_only()?;
        vm.enable(KVM_CAP_SPLIT_IRQCHIP, IO_APIC_PINS as u64).map_err(|e| refused("a split interrupt chip", e))?;
        vm.keep_msrs()?;
        let vm = Arc::new(vm);
        Ok(Self { apics: Arc::new(KernelApics::new(Arc::clone(&vm))), vm })
    }
}

impl Vm {
    fn enable(&self, capability: u32, argument: u64) -> Result<(), kvm_ioctls::Error> {
        self.fd.enable_cap(&enabled(capability, argument))
    }

    /// Has the kernel see RAM, each piece in a slot of its own, with or without a log of the pages that are written.
    pub(crate) fn place_memory(&self, log: bool) -> Result<(), Error> {
        for (slot, region) in (0..).zip(self.ram.regions()) {
            let slot = kvm_userspace_memory_region {
                slot,
                flags: if log { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
                guest_phys_addr: region.start.0,
                memory_size: region.bytes,
                userspace_addr: region.host_base().as_ptr() as u64,
            };
            // SAFETY: the host addresses are one mapping, which lives as long as `self.ram`, which lives as long as the VM.
            unsafe { self.fd.set_user_memory_region(slot) }.map_err(|e| refused("a slot for guest memory", e))?;
        }
        Ok(())
    }

    /// Has the kernel show what guests can only read; their stores leave as those to a device do. Without the kernel's help
    /// loads leave as well.
    fn place_read_only(&self) -> Result<(), Error> {
        let Some(pages) = self.ram.read_only().filter(|_| self.fd.check_extension(Cap::ReadonlyMem)) else {
            return Ok(());
        };
        for (slot, region) in (self.ram.regions().len()..).zip(pages.regions()) {
            let slot = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: KVM_MEM_READONLY,
                guest_phys_addr: region.start.0,
                memory_size: region.bytes,
                userspace_addr: region.host_base().as_ptr() as u64,
            };
            // SAFETY: as in `place_memory`; the pages live as long as the RAM they are beside.
            unsafe { self.fd.set_user_memory_region(slot) }.map_err(|e| refused("a slot for read-only memory", e))?;
        }
        Ok(())
    }

    /// MSRs that KVM does not know, or that are the machine's, leave guest code.
    fn keep_msrs(&self) -> Result<(), Error> {
        let reasons = KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_INVAL | KVM_MSR_EXIT_REASON_FILTER;
        let refuse = |e| refused("exits for MSRs", e);
        self.enable(KVM_CAP_X86_USER_SPACE_MSR, reasons.into()).map_err(refuse)?;
        if self.config.machine_msrs.is_empty() {
            return Ok(());
        }
        // Clear bits deny: a denied MSR leaves.
        let lengths: Vec<u32> = self.config.machine_msrs.iter().map(|range| range.end() - range.start() + 1).collect();
        let none: Vec<Vec<u8>> = lengths.iter().map(|length| vec![0; length.div_ceil(8) as usize]).collect();
        let flags = MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE;
        let ranges = self.config.machine_msrs.iter().zip(&lengths).zip(&none);
        let ranges: Vec<_> = ranges
            .map(|((range, &msr_count), bitmap)| MsrFilterRange { flags, base: *range.start(), msr_count, bitmap })
            .collect();
        self.fd.set_msr_filter(MsrFilterDefaultAction::ALLOW, &ranges).map_err(refuse)
    }

    /// What is not offered to a vCPU in CPUID is refused on use.
    pub(crate) fn enforce(&self, vcpu: &kvm_ioctls::VcpuFd) -> Result<(), kvm_ioctls::Error> {
        vcpu.enable_cap(&enabled(KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 1))?;
        if self.enforces_hyperv { vcpu.enable_cap(&enabled(KVM_CAP_HYPERV_ENFORCE_CPUID, 1)) } else { Ok(()) }
    }
}

fn enabled(cap: u32, argument: u64) -> kvm_enable_cap {
    kvm_enable_cap { cap, args: [argument, 0, 0, 0], ..kvm_enable_cap::default() }
}

impl Engine for Kvm {
    fn name(&self) -> &'static str {
        "kvm"
    }

    fn vcpu(&self, config: VcpuConfig) -> Result<Box<dyn Vcpu>, Error> {
        Ok(Box::new(Runner::new(Arc::clone(&self.vm), config)?))
    }

    fn host_cpu(&self) -> HostCpu {
        HostCpu::hardware(self.vm.supported.clone())
    }

    fn local_apics(&self) -> Option<Arc<dyn LocalApics>> {
        Some(Arc::clone(&self.apics) as _)
    }

    fn doorbells(&self) -> Option<Arc<dyn Doorbells>> {
        self.vm.has_doorbells.then(|| Arc::new(KernelDoorbells(Arc::clone(&self.vm))) as _)
    }

    fn hypercall_port(&self) -> Option<u16> {
        self.vm.config.hypercall_port
    }

    fn dozes(&self) -> bool {
        self.vm.dozes
    }

    fn kvm_dialect(&self) -> Option<u32> {
        Some(cpuid::dialect(&self.vm.supported))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        let reason = |path: &str| open(Path::new(path)).err().unwrap().to_string();
        assert_eq!(
            reason("/no/such/kvm"),
            "the kvm engine is not usable here: there is no /no/such/kvm; load the host's kvm module"
        );
        assert!(reason("/dev/null").contains("/dev/null is not KVM"));
    }
}
