//! What a running vCPU asks of its machine: ports, device memory, MSRs, hypercalls, interrupts.
//!
//! ```text
//!   Vcpu::run ──CpuIo──> GuestIo ─┬─> xAPIC page, APIC and x2APIC MSRs ──> InterruptChips
//!                                 ├─> ports, device memory ──────────────> Bus
//!                                 └─> paravirtual MSRs, hypercalls ──────> paravirt::Vcpu
//!                                       each counted, with its time, in the vCPU's ledger
//! ```

use std::sync::Arc;

use device::bus::Bus;
use device::interrupt::{InterruptChips, Refused, lapic::msr};
use engine::{Answer, Cause, CpuIo, HypercallArgs, Ledger, MsrRefused, Phase};
use memory::{Gpa, PAGE_SIZE};

use crate::announce::Announcer;
use crate::control::Control;

/// An access to an unknown MSR is worth a line in the log this many times a vCPU; guests probe in loops.
const LOGGED_MSRS: u32 = 16;

/// The machine as one vCPU sees it.
pub(crate) struct GuestIo {
    vcpu: usize,
    bus: Arc<Bus>,
    chips: Arc<InterruptChips>,
    control: Arc<Control>,
    announcer: Arc<Announcer>,
    pub(crate) paravirt: paravirt::Vcpu,
    ledger: Arc<Ledger>,
    /// Where the vCPU's xAPIC page is; changes only by the vCPU's own doing.
    apic_page: Option<Gpa>,
    msrs_logged: u32,
}

/// What all vCPUs' [`GuestIo`] share.
#[derive(Clone)]
pub(crate) struct SharedIo {
    pub(crate) bus: Arc<Bus>,
    pub(crate) chips: Arc<InterruptChips>,
    pub(crate) control: Arc<Control>,
    pub(crate) announcer: Arc<Announcer>,
}

impl GuestIo {
    pub(crate) fn new(vcpu: usize, shared: SharedIo, paravirt: paravirt::Vcpu, ledger: Arc<Ledger>) -> Self {
        let SharedIo { bus, chips, control, announcer } = shared;
        let apic_page = apic_page(&chips, vcpu);
        Self { vcpu, bus, chips, control, announcer, paravirt, ledger, apic_page, msrs_logged: 0 }
    }

    /// INIT: what of the processor lies outside the engine goes back to its start.
    pub(crate) fn init(&mut self) {
        if let Some(lapic) = self.chips.lapic(self.vcpu) {
            lapic.init();
        }
        self.apic_page = apic_page(&self.chips, self.vcpu);
        self.paravirt.reset();
    }

    /// What the vCPU does with the kvm dialect.
    pub(crate) fn kvm_usage(&self) -> Arc<paravirt::KvmUsage> {
        Arc::clone(self.paravirt.usage())
    }

    /// The offset in this vCPU's xAPIC page, where `gpa` lies in it.
    fn apic_offset(&self, gpa: Gpa) -> Option<u64> {
        let offset = gpa.0.wrapping_sub(self.apic_page?.0);
        (offset < PAGE_SIZE).then_some(offset)
    }

    fn log_refused(&mut self, access: &'static str, index: u32, value: u64) {
        if self.msrs_logged < LOGGED_MSRS {
            self.msrs_logged += 1;
            tracing::debug!(vcpu = self.vcpu, access, "MSR {index:#x} refused (value {value:#x})");
        }
    }

    /// Counts what `access` took.
    fn counted<R>(&mut self, cause: Cause, access: impl FnOnce(&mut Self) -> R) -> R {
        let before = self.ledger.profile.begin(Phase::Devices);
        let start = host::read_tsc();
        let result = access(self);
        self.ledger.record(cause, host::read_tsc().wrapping_sub(start));
        if let Some(native) = self.paravirt.native() {
            native.account(&self.ledger);
        }
        self.ledger.profile.back(before);
        result
    }

    /// True where the guest has masked interrupts in memory.
    fn masked(&mut self) -> bool {
        self.paravirt.native().is_some_and(|native| native.masks_interrupts())
    }
}

/// Where the vCPU's xAPIC page is, while it is on and ours.
fn apic_page(chips: &InterruptChips, vcpu: usize) -> Option<Gpa> {
    chips.lapic(vcpu).and_then(|lapic| lapic.mmio_base())
}

/// MSRC001_001F, northbridge configuration (AMD family 10h BKDG): guests on AMD processors set its bit for extended
/// PCI configuration through port 0xcf8, unasked. There is no northbridge: it reads as zero and forgets, as under KVM.
const NB_CFG: u32 = 0xc001_001f;

fn is_apic_msr(index: u32) -> bool {
    matches!(index, msr::APIC_BASE | msr::TSC_DEADLINE | msr::X2APIC_FIRST..=msr::X2APIC_LAST)
}

impl CpuIo for GuestIo {
    fn port_read(&mut self, port: u16, data: &mut [u8]) {
        self.counted(Cause::PortRead, |io| {
            io.bus.port_read(port, data);
        });
    }

    fn port_write(&mut self, port: u16, data: &[u8]) {
        self.counted(Cause::PortWrite, |io| {
            io.bus.port_write(port, data);
        });
    }

    fn mmio_read(&mut self, gpa: Gpa, data: &mut [u8]) {
        self.counted(Cause::MmioRead, |io| match io.apic_offset(gpa) {
            Some(offset) => {
                io.paravirt.hear_end();
                io.chips.read_mmio(io.vcpu, offset, data);
            }
            None => {
                io.bus.mmio_read(gpa, data);
            }
        });
    }

    fn mmio_write(&mut self, gpa: Gpa, data: &[u8]) {
        self.counted(Cause::MmioWrite, |io| match io.apic_offset(gpa) {
            Some(offset) => {
                io.paravirt.hear_end();
                io.chips.write_mmio(io.vcpu, offset, data);
            }
            None => {
                io.bus.mmio_write(gpa, data);
                io.announcer.look();
            }
        });
    }

    fn msr_read(&mut self, index: u32) -> Result<u64, MsrRefused> {
        let result = self.counted(Cause::MsrRead, |io| match index {
            NB_CFG => Ok(0),
            _ if is_apic_msr(index) => {
                io.paravirt.hear_end();
                io.chips.msr_read(io.vcpu, index).map_err(|Refused| MsrRefused)
            }
            _ => io.paravirt.msr_read(index),
        });
        result.inspect_err(|MsrRefused| self.log_refused("read", index, 0))
    }

    fn msr_write(&mut self, index: u32, value: u64) -> Result<(), MsrRefused> {
        let result = self.counted(Cause::MsrWrite, |io| match index {
            NB_CFG => Ok(()),
            _ if is_apic_msr(index) => {
                io.paravirt.hear_end();
                io.chips.msr_write(io.vcpu, index, value).map_err(|Refused| MsrRefused)
            }
            _ => io.paravirt.msr_write(index, value),
        });
        if index == msr::APIC_BASE {
            self.apic_page = apic_page(&self.chips, self.vcpu);
        }
        result.inspect_err(|MsrRefused| self.log_refused("write", index, value))
    }

    fn tsc_moved(&mut self) {
        self.paravirt.tsc_moved();
        if let Some(lapic) = self.chips.lapic(self.vcpu) {
            lapic.tsc_moved();
        }
    }

    fn hypercall(&mut self, call: HypercallArgs) -> Answer {
        self.counted(Cause::Hypercall, |io| io.paravirt.hypercall(call))
    }

    fn take_interrupt(&mut self) -> Option<u8> {
        self.paravirt.before_interrupt();
        if self.masked() {
            if self.chips.interrupt_pending(self.vcpu)
                && let Some(native) = self.paravirt.native()
            {
                native.note_interrupt();
            }
            return None;
        }
        let delivery = self.chips.take_interrupt(self.vcpu, self.paravirt.can_end_in_memory())?;
        if delivery.end_in_memory {
            self.paravirt.offer_end();
        }
        Some(delivery.vector)
    }

    fn end_of_interrupt(&mut self, vector: u8) {
        self.chips.end_of_interrupt(vector);
    }

    fn interrupt_pending(&mut self) -> bool {
        self.paravirt.hear_end();
        !self.masked() && self.chips.interrupt_pending(self.vcpu)
    }

    fn task_priority(&mut self) -> u8 {
        self.chips.lapic(self.vcpu).map_or(0, |lapic| lapic.task_priority())
    }

    fn set_task_priority(&mut self, priority: u8) {
        if let Some(lapic) = self.chips.lapic(self.vcpu) {
            lapic.set_task_priority(priority);
        }
    }

    fn stop_requested(&self) -> bool {
        self.control.power_pressed()
    }
}
