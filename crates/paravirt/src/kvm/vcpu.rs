//! One vCPU's MSRs, and what stands at the addresses in them.

use std::mem::offset_of;
use std::sync::Arc;

use contract::kvm::{StealTime, VCPU_FLUSH_TLB, VCPU_PREEMPTED, feature, msr};
use engine::{MsrRefused, Signals};
use memory::Gpa;

use super::Vm;
use crate::clock::RamPage;
use crate::{ClockPage, KvmUsage, seqlock};

/// What one vCPU has agreed with the host: the values of its MSRs.
pub(crate) struct Vcpu {
    pub(super) vm: Arc<Vm>,
    pub(super) index: u32,
    system_time: u64,
    wall_clock: u64,
    steal_time: u64,
    eoi: u64,
    poll_control: u64,
    usage: Arc<KvmUsage>,
}

impl Vcpu {
    pub(crate) fn new(vm: Arc<Vm>, index: u32) -> Self {
        Self::with_usage(vm, index, Arc::default())
    }

    fn with_usage(vm: Arc<Vm>, index: u32, usage: Arc<KvmUsage>) -> Self {
        let poll_control = msr::POLL_CONTROL_POLL;
        Self { vm, index, system_time: 0, wall_clock: 0, steal_time: 0, eoi: 0, poll_control, usage }
    }

    /// What this vCPU does with the dialect.
    pub(crate) fn usage(&self) -> &Arc<KvmUsage> {
        &self.usage
    }

    /// The vCPU was reset or got INIT.
    pub(crate) fn reset(&mut self) {
        // Taking a page away cannot fail.
        let _ = self.vm.clock.set_page(self.index, ClockPage::Kvm, None);
        self.usage.let_go();
        *self = Self::with_usage(Arc::clone(&self.vm), self.index, Arc::clone(&self.usage));
    }

    pub(crate) fn msr_read(&self, index: u32) -> Result<u64, MsrRefused> {
        self.require(index)?;
        match index {
            msr::SYSTEM_TIME | msr::SYSTEM_TIME_OLD => Ok(self.system_time),
            msr::WALL_CLOCK | msr::WALL_CLOCK_OLD => Ok(self.wall_clock),
            msr::STEAL_TIME => Ok(self.steal_time),
            msr::PV_EOI => Ok(self.eoi),
            msr::POLL_CONTROL => Ok(self.poll_control),
            _ => Err(MsrRefused),
        }
    }

    /// Each checks all of the value before anything changes.
    pub(crate) fn msr_write(&mut self, index: u32, value: u64) -> Result<(), MsrRefused> {
        let feature = feature_of(index)?;
        let start = host::read_tsc();
        let result = self.write(index, value);
        self.usage.count(feature, result.is_ok(), host::read_tsc().wrapping_sub(start));
        result
    }

    fn write(&mut self, index: u32, value: u64) -> Result<(), MsrRefused> {
        self.require(index)?;
        match index {
            msr::SYSTEM_TIME | msr::SYSTEM_TIME_OLD => {
                let page = aligned(value & !msr::SYSTEM_TIME_ENABLE)?;
                let page = (value & msr::SYSTEM_TIME_ENABLE != 0).then_some(page);
                self.vm.clock.set_page(self.index, ClockPage::Kvm, page).map_err(|_| MsrRefused)?;
                self.usage.hold(feature::CLOCKSOURCE, page.is_some() && index == msr::SYSTEM_TIME_OLD);
                self.usage.hold(feature::CLOCKSOURCE2, page.is_some() && index == msr::SYSTEM_TIME);
                self.system_time = value;
            }
            msr::WALL_CLOCK | msr::WALL_CLOCK_OLD => {
                self.vm.clock.write_wall_clock(aligned(value)?).map_err(|_| MsrRefused)?;
                self.wall_clock = value;
            }
            msr::STEAL_TIME => {
                if value & msr::STEAL_TIME_RESERVED != 0 {
                    return Err(MsrRefused);
                }
                self.check(value, size_of::<StealTime>())?;
                self.steal_time = value;
                self.usage.hold(feature::STEAL_TIME, self.steal_time().is_some());
                self.come_back(); // nobody else writes the flag while the vCPU runs
            }
            msr::PV_EOI => {
                aligned(value & !msr::ENABLE)?;
                self.check(value, 1)?;
                self.eoi = value;
                self.usage.hold(feature::PV_EOI, self.eoi_place().is_some());
            }
            // The monitor sleeps in HLT without polling, so the guest's wish not to be polled for is met either way.
            msr::POLL_CONTROL if value & !msr::POLL_CONTROL_POLL == 0 => self.poll_control = value,
            _ => return Err(MsrRefused),
        }
        Ok(())
    }

    /// Checks that `bytes` are RAM where `register` points, if it is on.
    fn check(&self, register: u64, bytes: usize) -> Result<(), MsrRefused> {
        match at(register) {
            Some(place) => self.vm.ram.check(place, bytes as u64).map_err(|_| MsrRefused),
            None => Ok(()),
        }
    }

    fn require(&self, index: u32) -> Result<(), MsrRefused> {
        if self.vm.features.has(feature_of(index)?) { Ok(()) } else { Err(MsrRefused) }
    }

    /// Where the guest says the end of an interrupt, if anywhere.
    pub(crate) fn eoi_place(&self) -> Option<Gpa> {
        at(self.eoi)
    }

    /// Where the guest looks for stolen time, if anywhere.
    pub(crate) fn steal_time(&self) -> Option<Gpa> {
        at(self.steal_time)
    }

    /// No guest code runs on this vCPU until it comes back: others may leave a flush to it.
    pub(crate) fn go_away(&self) {
        if let Some(page) = self.steal_time() {
            let _ = self.vm.ram.write_value(preempted(page), &VCPU_PREEMPTED);
        }
    }

    /// Guest code is about to run: what others left is seen, and from now on they have to interrupt this vCPU.
    pub(crate) fn come_back(&self) {
        let Some(page) = self.steal_time() else { return };
        let left = self.vm.ram.exchange_byte(preempted(page), 0).unwrap_or(0);
        if left & VCPU_FLUSH_TLB != 0 && self.vm.features.has(feature::PV_TLB_FLUSH) {
            self.vm.places[self.index as usize].signal.raise(Signals::FLUSH);
        }
    }

    /// Tells the guest how many nanoseconds were stolen from it.
    pub(crate) fn tell_stolen(&self, ns: u64) {
        let Some(page) = self.steal_time() else { return };
        let versioned = RamPage { ram: &self.vm.ram, gpa: Gpa(page.0 + offset_of!(StealTime, version) as u64) };
        let odd = seqlock::begin(&versioned);
        let _ = self.vm.ram.write_value(Gpa(page.0 + offset_of!(StealTime, steal) as u64), &ns);
        seqlock::end(&versioned, odd);
    }
}

/// What a register belongs to.
fn feature_of(index: u32) -> Result<u32, MsrRefused> {
    Ok(match index {
        msr::SYSTEM_TIME | msr::WALL_CLOCK => feature::CLOCKSOURCE2,
        msr::SYSTEM_TIME_OLD | msr::WALL_CLOCK_OLD => feature::CLOCKSOURCE,
        msr::STEAL_TIME => feature::STEAL_TIME,
        msr::PV_EOI => feature::PV_EOI,
        msr::POLL_CONTROL => feature::POLL_CONTROL,
        _ => return Err(MsrRefused),
    })
}

fn aligned(address: u64) -> Result<Gpa, MsrRefused> {
    if address.is_multiple_of(4) { Ok(Gpa(address)) } else { Err(MsrRefused) }
}

/// What a register with an enable bit points to.
fn at(register: u64) -> Option<Gpa> {
    (register & msr::ENABLE != 0).then_some(Gpa(register & !msr::ENABLE))
}

fn preempted(page: Gpa) -> Gpa {
    Gpa(page.0 + offset_of!(StealTime, preempted) as u64)
}
