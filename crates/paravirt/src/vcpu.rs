//! One vCPU's side of the kvm dialect, its MSRs and hypercalls; and the way to the native dialect, where it is spoken.

use std::sync::Arc;

use contract::kvm::{feature, hypercall, msr};
use engine::{Answer, HypercallArgs, MsrRefused};
use memory::Gpa;

use crate::{Clock, ClockPage, Features, native};

/// What one vCPU has agreed with the host.
pub struct Vcpu {
    index: u32,
    features: Features,
    clock: Arc<Clock>,
    /// What the guest last wrote to the MSRs, and reads back.
    system_time: u64,
    wall_clock: u64,
    /// Absent where the dialect is not spoken.
    native: Option<native::Vcpu>,
}

impl Vcpu {
    /// vCPU `index` of a VM that offers `features`, and the native dialect where there is `native`.
    pub fn new(index: u32, features: Features, clock: Arc<Clock>, native: Option<native::Vcpu>) -> Self {
        Self { index, features, clock, system_time: 0, wall_clock: 0, native }
    }

    /// The native dialect's side.
    pub fn native(&mut self) -> Option<&mut native::Vcpu> {
        self.native.as_mut()
    }

    /// Forgets what was agreed: the vCPU was reset or got INIT.
    pub fn reset(&mut self) {
        // Taking a page away cannot fail.
        let _ = self.clock.set_page(self.index, ClockPage::Kvm, None);
        (self.system_time, self.wall_clock) = (0, 0);
        if let Some(native) = &mut self.native {
            native.reset();
        }
    }

    /// RDMSR.
    ///
    /// # Errors
    /// [`MsrRefused`] for every MSR that is not a dialect's or not offered.
    pub fn msr_read(&self, index: u32) -> Result<u64, MsrRefused> {
        if let Some(native) = &self.native
            && native::Vcpu::is_msr(index)
        {
            return native.msr_read(index);
        }
        self.require(index)?;
        match index {
            msr::SYSTEM_TIME | msr::SYSTEM_TIME_OLD => Ok(self.system_time),
            msr::WALL_CLOCK | msr::WALL_CLOCK_OLD => Ok(self.wall_clock),
            _ => Err(MsrRefused),
        }
    }

    /// WRMSR.
    ///
    /// # Errors
    /// [`MsrRefused`] for every MSR that is not a dialect's or not offered, and for an address that is not aligned or
    /// not RAM; nothing changes then.
    pub fn msr_write(&mut self, index: u32, value: u64) -> Result<(), MsrRefused> {
        if let Some(native) = &mut self.native
            && native::Vcpu::is_msr(index)
        {
            return native.msr_write(index, value);
        }
        self.require(index)?;
        match index {
            msr::SYSTEM_TIME | msr::SYSTEM_TIME_OLD => {
                let page = aligned(value & !msr::SYSTEM_TIME_ENABLE)?;
                let page = (value & msr::SYSTEM_TIME_ENABLE != 0).then_some(page);
                self.clock.set_page(self.index, ClockPage::Kvm, page).map_err(|_| MsrRefused)?;
                self.system_time = value;
            }
            msr::WALL_CLOCK | msr::WALL_CLOCK_OLD => {
                self.clock.write_wall_clock(aligned(value)?).map_err(|_| MsrRefused)?;
                self.wall_clock = value;
            }
            _ => return Err(MsrRefused),
        }
        Ok(())
    }

    /// VMCALL or VMMCALL.
    pub fn hypercall(&mut self, call: HypercallArgs) -> Answer {
        if let Some(native) = &mut self.native
            && (native::Vcpu::is_call(call.number) || self.features == Features::NONE)
        {
            return native.hypercall(call);
        }
        let result = match call.number {
            _ if call.cpl != 0 => hypercall::EPERM,
            hypercall::VAPIC_POLL_IRQ if self.features != Features::NONE => 0,
            _ => hypercall::ENOSYS,
        };
        Answer::Now(result as u64)
    }

    /// The clock's pages are to be written anew: a TSC was moved.
    pub fn tsc_moved(&self) {
        self.clock.tsc_moved();
    }

    fn require(&self, index: u32) -> Result<(), MsrRefused> {
        let needed = match index {
            msr::SYSTEM_TIME | msr::WALL_CLOCK => feature::CLOCKSOURCE2,
            msr::SYSTEM_TIME_OLD | msr::WALL_CLOCK_OLD => feature::CLOCKSOURCE,
            _ => return Err(MsrRefused),
        };
        if self.features.has(needed) { Ok(()) } else { Err(MsrRefused) }
    }
}

fn aligned(address: u64) -> Result<Gpa, MsrRefused> {
    if address.is_multiple_of(4) { Ok(Gpa(address)) } else { Err(MsrRefused) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use contract::kvm::TimeInfo;
    use engine::GuestTsc;
    use host::fake::FakeClock;
    use memory::GuestRam;

    fn vcpu(features: Features) -> (Vcpu, GuestRam) {
        let ram = GuestRam::new(&[(Gpa(0), 0x2000)]).unwrap();
        let clock = Clock::new(Arc::new(FakeClock::new()), ram.clone(), 0, [Arc::new(GuestTsc::new(1_000_000, 0, 0))]);
        (Vcpu::new(0, features, Arc::new(clock), None), ram)
    }

    const MSRS: [u32; 4] = [msr::WALL_CLOCK_OLD, msr::SYSTEM_TIME_OLD, msr::WALL_CLOCK, msr::SYSTEM_TIME];

    #[test]
    fn both_msr_pairs_are_one() {
        let (mut vcpu, ram) = vcpu(Features::ALL);
        vcpu.msr_write(msr::SYSTEM_TIME_OLD, 0x1001).unwrap();
        assert_eq!(vcpu.msr_read(msr::SYSTEM_TIME), Ok(0x1001));
        assert_eq!(ram.read_value::<TimeInfo>(Gpa(0x1000)).unwrap().version, 2);
        vcpu.msr_write(msr::WALL_CLOCK, 0x1100).unwrap();
        assert_eq!(vcpu.msr_read(msr::WALL_CLOCK_OLD), Ok(0x1100));
        vcpu.reset();
        assert_eq!((vcpu.msr_read(msr::SYSTEM_TIME), vcpu.msr_read(msr::WALL_CLOCK)), (Ok(0), Ok(0)));
    }

    #[test]
    fn bad_addresses_are_refused_and_change_nothing() {
        let (mut vcpu, ram) = vcpu(Features::ALL);
        vcpu.msr_write(msr::SYSTEM_TIME, 0x1001).unwrap();
        for bad in [0x1003, 0x1fe5, 0x2001, !2, 0xffff_ffff_ffff_fffd] {
            assert_eq!(vcpu.msr_write(msr::SYSTEM_TIME, bad), Err(MsrRefused), "{bad:#x}");
        }
        for bad in [0x1002, 0x1ff8, 0x2000, !3] {
            assert_eq!(vcpu.msr_write(msr::WALL_CLOCK, bad), Err(MsrRefused), "{bad:#x}");
        }
        assert_eq!((vcpu.msr_read(msr::SYSTEM_TIME), vcpu.msr_read(msr::WALL_CLOCK)), (Ok(0x1001), Ok(0)));
        assert_eq!(ram.read_value::<TimeInfo>(Gpa(0x1000)).unwrap().version, 2);
        assert_eq!(ram.read_value::<u32>(Gpa(0x1ff8)).unwrap(), 0);
    }

    #[test]
    fn what_is_not_offered_is_refused() {
        let (mut vcpu, ram) = vcpu(Features::NONE);
        for index in MSRS {
            assert_eq!((vcpu.msr_read(index), vcpu.msr_write(index, 0x1001)), (Err(MsrRefused), Err(MsrRefused)));
        }
        assert_eq!(ram.read_value::<TimeInfo>(Gpa(0x1000)).unwrap(), TimeInfo::default());
        let (vcpu, _) = self::vcpu(Features::ALL);
        for index in [0x13, 0x4b56_4d02, 0x4b56_4d03, 0x4b56_4dff] {
            assert_eq!(vcpu.msr_read(index), Err(MsrRefused));
        }
    }

    #[test]
    fn hypercalls_are_answered() {
        let (mut vcpu, _) = vcpu(Features::ALL);
        let mut call = |number, cpl| match vcpu.hypercall(HypercallArgs { number, args: [1, 2, 3, 4], cpl }) {
            Answer::Now(value) => value as i64,
            Answer::Later => panic!("no call of this dialect sleeps"),
        };
        assert_eq!((call(1, 0), call(1, 3), call(5, 0), call(u64::MAX, 0)), (0, -1, -1000, -1000));
    }
}
