//! The paravirtual dialects of a machine: what its guest finds in CPUID, and who answers it.

use std::sync::{Arc, Mutex};

use contract::kvm::feature as kvm_feature;
use contract::native::device::page;
use contract::native::feature;
use device::bus::{Bus, PortDevice};
use device::contract::{ContractDevice, Limits, UserCalls};
use device::interrupt::lapic::{FREQUENCY_HZ, msr};
use device::interrupt::{DeliveryMode, Destination, InterruptChips, InterruptSink, Message, Refused};
use engine::{Cpuid, CpuidTable, Engine, GuestTsc};
use host::{ThreadRunDelay, Timer};
use memory::{Error as MemoryError, GuestRam};
use paravirt::native::{self, Calling, Parts, Policy, UserPages};
use paravirt::{Clock, Features, Interrupts, Place, Rates, kvm};

use crate::board::HostParts;
use crate::control::Control;
use crate::layout::CONTRACT_PAGES;
use crate::run::Slot;
use crate::{Error, Plan};

/// Where message-signalled interrupts go; the destination's APIC id is in bits 19:12 (Intel SDM vol. 3A, 11.11.1).
const MESSAGES: u64 = 0xfee0_0000;
/// Offset of the end-of-interrupt register in the xAPIC page (Intel SDM vol. 3A, table 11-1).
const XAPIC_EOI: u64 = 0xb0;
/// The end-of-interrupt register in x2APIC mode.
const X2APIC_EOI: u32 = msr::X2APIC_FIRST + 0xb;

/// The dialects of one machine.
pub(crate) struct Spoken {
    kvm: Arc<kvm::Vm>,
    pub(crate) native: Option<Arc<native::Vm>>,
    /// What user space is told.
    limits: Limits,
}

/// What cannot be honoured where the local APICs are the host kernel's: it delivers and ends interrupts whatever a byte says, runs
/// HLT and spins without telling, comes back to us too seldom to tell what was stolen, and has no call that is sure to forget a
/// guest's translations.
const NOT_ON_KERNEL_APICS: u64 =
    feature::INTERRUPTS | feature::EOI | feature::RUN_STATE | feature::STEAL | feature::CRITICAL | feature::FLUSH_TLB;

/// The port that hypercalls of the native dialect go through on engines that have no instruction for them: of those that
/// OUT names in its second byte, one that no PC has used.
pub(crate) const HYPERCALL_PORT: u8 = 0xe4;

/// Shows the dialects in CPUID, or hides that there is anyone to speak them. Of the kvm dialect, what the engine serves by
/// itself, or else what `paravirt` does.
pub(crate) fn speak(cpuid: &mut CpuidTable, plan: &Plan, engine: &dyn Engine, tsc_khz: u64) {
    let dialects = plan.dialects;
    paravirt::hide(cpuid);
    if dialects.is_none() {
        return;
    }
    paravirt::show(cpuid, dialects.without.hypervisor_bit);
    if dialects.kvm {
        let apic_khz = FREQUENCY_HZ / 1000;
        paravirt::offer(cpuid, kvm_features(plan), Rates { tsc_khz, apic_khz });
        if let Some(eax) = engine.kvm_dialect() {
            let eax = eax & !dialects.without.kvm;
            cpuid.set(contract::kvm::leaf::FEATURES, 0, Cpuid { eax, ..Cpuid::default() });
        }
    }
    if dialects.cordial {
        let way = calling(cpuid, engine);
        native::offer(cpuid, native_features(plan, engine), way, &plan.policy(), tsc_khz, plan.cpus);
    }
}

fn kvm_features(plan: &Plan) -> Features {
    if plan.dialects.kvm { Features::ALL.without(plan.dialects.without.kvm) } else { Features::NONE }
}

/// Whether devices' messages have extended destination ids.
pub(crate) fn extended_ids(plan: &Plan) -> bool {
    kvm_features(plan).has(kvm_feature::MSI_EXT_DEST_ID)
}

fn native_features(plan: &Plan, engine: &dyn Engine) -> u64 {
    let missing = match engine.local_apics() {
        None => 0,
        Some(_) if engine.dozes() => NOT_ON_KERNEL_APICS,
        Some(_) => NOT_ON_KERNEL_APICS | feature::WAIT,
    };
    native::BUILT & !missing & !plan.dialects.without.cordial
}

/// The engine's port, or else the instruction that suits the processor the guest sees: the engine knows both.
fn calling(cpuid: &CpuidTable, engine: &dyn Engine) -> Calling {
    if engine.hypercall_port().is_some() {
        return Calling::Port(HYPERCALL_PORT);
    }
    let vendor = cpuid.answer(0, 0).ebx.to_le_bytes();
    if [*b"Auth", *b"Hygo"].contains(&vendor) { Calling::Vmmcall } else { Calling::Vmcall }
}

impl Spoken {
    pub(crate) fn new(
        plan: &Plan,
        engine: &dyn Engine,
        slots: &[Slot],
        chips: &Arc<InterruptChips>,
        host: &HostParts,
        ram: &GuestRam,
    ) -> Self {
        let tscs: Vec<Arc<GuestTsc>> = slots.iter().map(|slot| Arc::clone(&slot.tsc)).collect();
        let zero = tscs.first().map_or(0, |tsc| tsc.host(0));
        let clock = Arc::new(Clock::new(Arc::clone(&host.clock), ram.clone(), zero, tscs));
        let interrupts: Arc<dyn Interrupts> = Arc::new(ToChips(Arc::clone(chips)));
        let places: Arc<[Place]> = slots.iter().map(|slot| Place::new(Arc::clone(&slot.signal))).collect();
        let native = plan.dialects.cordial.then(|| {
            native::Vm::new(Parts {
                offered: native_features(plan, engine),
                calling: slots.first().map_or(Calling::Vmcall, |slot| calling(&slot.cpuid, engine)),
                policy: plan.policy(),
                ram: ram.clone(),
                clock: Arc::clone(&clock),
                host: Arc::clone(&host.clock),
                timers: Arc::clone(&host.timers),
                entropy: Arc::clone(&host.entropy),
                interrupts: Arc::clone(&interrupts),
                places: Arc::clone(&places),
                user: ram.read_only().map(|pages| UserPages {
                    pages: pages.clone(),
                    at: CONTRACT_PAGES,
                    ledgers: slots.iter().map(|slot| Arc::clone(&slot.ledger)).collect(),
                }),
            })
        });
        // What the engine serves by itself and refuses is not to be had here.
        let features = if engine.kvm_dialect().is_none() { kvm_features(plan) } else { Features::NONE };
        let kvm = kvm::Vm { features, ram: ram.clone(), clock, host: Arc::clone(&host.clock), interrupts, places };
        let Policy { quantum_ns, calls_per_s, burst, .. } = plan.policy();
        let limits = Limits { quantum_ns, vcpus: plan.cpus, calls_per_s, burst };
        Self { kvm: Arc::new(kvm), native, limits }
    }

    /// One vCPU's side.
    pub(crate) fn vcpu(&self, index: u32) -> paravirt::Vcpu {
        let native = self.native.as_ref().map(|vm| native::Vcpu::new(Arc::clone(vm), index));
        paravirt::Vcpu::new(index, Arc::clone(&self.kvm), Box::new(ThreadRunDelay::default()), native)
    }

    /// The PCI function for user space, where there is one.
    pub(crate) fn contract_device(&self, ram: &GuestRam) -> Option<ContractDevice<ForUsers>> {
        let (vm, pages) = (self.native.as_ref()?, ram.read_only()?);
        Some(ContractDevice::new(self.limits, ForUsers(Arc::clone(vm)), pages.clone(), CONTRACT_PAGES))
    }

    /// The host's say in the contract, for a test guest to have.
    pub(crate) fn place_test_ports(&self, bus: &Bus, control: &Arc<Control>, host: &HostParts) -> Result<(), Error> {
        if let Some(vm) = &self.native {
            let resumes = Arc::clone(control);
            let ports = TestPorts {
                vm: Arc::clone(vm),
                control: Arc::clone(control),
                clock: Arc::clone(&host.clock),
                resume: host.timers.timer(Box::new(move || resumes.resume())),
                monotonic: 0,
            };
            bus.add_ports(TEST_PORTS, 16, Arc::new(Mutex::new(ports)))?;
        }
        Ok(())
    }
}

/// Guest RAM, with the pages of the contract device beside it where the plan has one.
pub(crate) fn with_contract_pages(plan: &Plan, ram: GuestRam) -> Result<GuestRam, MemoryError> {
    if !plan.dialects.has_contract_device() {
        return Ok(ram);
    }
    Ok(ram.with_read_only(GuestRam::new(&[(CONTRACT_PAGES, page::SIZE)])?))
}

/// Calls of the guest's user space to the native dialect.
pub(crate) struct ForUsers(Arc<native::Vm>);

impl UserCalls for ForUsers {
    fn call(&self, number: u64) -> u64 {
        self.0.user_call(number)
    }

    fn accept(&self, features: u64) {
        self.0.user_accept(features);
    }

    fn acknowledge(&self, epoch: u64) {
        self.0.user_acknowledge(epoch);
    }
}

/// The way to local APICs. vCPU n's has the id n.
struct ToChips(Arc<InterruptChips>);

impl Interrupts for ToChips {
    fn raise(&self, vcpu: u32, vector: u8) {
        self.0.message(MESSAGES | u64::from(vcpu) << 12, vector.into());
    }

    fn send(&self, vcpu: u32, command: u32) -> bool {
        let mode = DeliveryMode::from_register(command);
        let destination = Destination { logical: false, id: vcpu, wide: true };
        self.0.deliver(&Message { vector: command as u8, mode, level: false, destination })
    }

    fn end(&self, vcpu: u32) {
        let vcpu = vcpu as usize;
        if let Err(Refused) = self.0.msr_write(vcpu, X2APIC_EOI, 0) {
            self.0.write_mmio(vcpu, XAPIC_EOI, &[0; 4]); // not in x2APIC mode
        }
    }
}

/// First port of [`TestPorts`].
const TEST_PORTS: u16 = 0x2100;

/// What the host does of its own accord, at the wish of a test guest. 32-bit writes: at offset 0 features to revoke, at
/// offset 4 the rate in kHz that the TSC counts at from now on, at offset 8 a new generation id, at offset 12 the milliseconds
/// that the machine pauses for. 32-bit reads: the low half of the host's CLOCK_MONOTONIC now at offset 0, and the high half that
/// goes with it at offset 4.
struct TestPorts {
    vm: Arc<native::Vm>,
    control: Arc<Control>,
    clock: Arc<dyn host::Clock>,
    resume: Box<dyn Timer>,
    /// What the low half was read of, nanoseconds.
    monotonic: u64,
}

impl PortDevice for TestPorts {
    fn port_read(&mut self, offset: u16, data: &mut [u8]) {
        if offset == 0 {
            self.monotonic = self.clock.monotonic_ns();
        }
        match offset {
            0 | 4 if data.len() == 4 => data.copy_from_slice(&((self.monotonic >> (offset * 8)) as u32).to_le_bytes()),
            _ => data.fill(0xff),
        }
    }

    fn port_write(&mut self, offset: u16, data: &[u8]) {
        let Ok(value) = data.try_into().map(u32::from_le_bytes) else { return };
        match offset {
            0 => drop(self.vm.revoke(value.into())),
            4 => self.vm.rescale(value.into()),
            8 => self.vm.regenerate(),
            12 => {
                // This is a vCPU's thread: it stops with the others behind this access.
                self.control.ask_to_pause();
                self.resume.arm(self.clock.monotonic_ns().saturating_add(u64::from(value) * 1_000_000));
            }
            _ => {}
        }
    }
}
