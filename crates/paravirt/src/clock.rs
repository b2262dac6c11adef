//! kvmclock: the VM's time as a scale and an offset of the time-stamp counter, in a page the guest reads itself.
//!
//! ```text
//!   host TSC ── + offset (GuestTsc) ──> guest TSC ── * mul >> 32, << shift ──> ns since the VM started
//!                                          └── what the guest reads ──┘└── what the page says ──┘
//! ```
//!
//! All pages speak of one and the same moment, the start of the VM, so that clocks of different vCPUs agree to the
//! nanosecond for as long as their TSC offsets are equal: then, and only then, the pages say "stable".

use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use contract::kvm::{TIME_INFO_STABLE, TimeInfo, WallClock};
use engine::GuestTsc;
use memory::{Gpa, GuestRam};

const NS_PER_S: u64 = 1_000_000_000;

/// Nanoseconds a tick, as the guest computes with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TscScale {
    mul: u32,
    shift: i8,
}

impl TscScale {
    /// The scale of a counter at `khz`, which is 1 to 2^42: `mul` has its top bit set, for the most precision.
    pub fn new(khz: u64) -> Self {
        let hz = u128::from(khz.clamp(1, 1 << 42)) * 1000;
        // mul = 10^9 / hz * 2^32 / 2^shift; at shift 31 it is 0 for every hz above 0.5, and doubles with each step down.
        let mul = |shift: i8| ((u128::from(NS_PER_S) << (64 - i32::from(shift))) / hz) >> 32;
        let shift = (-31..=31).rev().find(|&shift| mul(shift) >= 1 << 31).unwrap_or(-31);
        Self { mul: mul(shift) as u32, shift }
    }

    /// What the guest makes of `ticks`, to the nanosecond.
    pub fn nanoseconds(self, ticks: u64) -> u64 {
        let shifted = if self.shift >= 0 { ticks << self.shift } else { ticks >> -self.shift };
        ((u128::from(shifted) * u128::from(self.mul)) >> 32) as u64
    }
}

/// What is known of one vCPU's clock.
struct VcpuClock {
    tsc: Arc<GuestTsc>,
    /// Where its page is, while it wants one.
    page: Option<Gpa>,
}

/// The clock of one VM.
pub struct Clock {
    host: Arc<dyn host::Clock>,
    ram: GuestRam,
    scale: TscScale,
    /// The host's TSC when the VM's time was zero.
    zero: u64,
    vcpus: Mutex<Vec<VcpuClock>>,
}

impl Clock {
    /// A clock that is zero when the host's TSC reads `zero`; `tscs` are the vCPUs' counters.
    pub fn new(
        host: Arc<dyn host::Clock>,
        ram: GuestRam,
        zero: u64,
        tscs: impl IntoIterator<Item = Arc<GuestTsc>>,
    ) -> Self {
        let vcpus = tscs.into_iter().map(|tsc| VcpuClock { tsc, page: None }).collect();
        let scale = TscScale::new(host.tsc_khz());
        Self { host, ram, scale, zero, vcpus: Mutex::new(vcpus) }
    }

    /// Nanoseconds since the VM started.
    pub fn now_ns(&self) -> u64 {
        self.scale.nanoseconds(self.host.tsc().wrapping_sub(self.zero))
    }

    /// Keeps vCPU `index`'s time in the page at `page` from now on; `None` leaves the last page as it is.
    ///
    /// # Errors
    /// [`memory::Error::NotRam`] where the page does not lie in RAM; nothing changes then.
    pub fn set_page(&self, index: u32, page: Option<Gpa>) -> Result<(), memory::Error> {
        if let Some(page) = page {
            self.ram.check(page, size_of::<TimeInfo>() as u64)?;
        }
        let mut vcpus = self.lock();
        let stable = all_equal(&vcpus);
        if let Some(vcpu) = vcpus.get_mut(index as usize) {
            vcpu.page = page;
            self.publish(vcpu, stable)?;
        }
        Ok(())
    }

    /// A vCPU's TSC has been moved (the guest wrote IA32_TSC or IA32_TSC_ADJUST): all pages are written anew, since the
    /// clocks may no longer, or once more, be one.
    pub fn tsc_moved(&self) {
        let vcpus = self.lock();
        let stable = all_equal(&vcpus);
        for vcpu in vcpus.iter() {
            // The page was RAM when it was registered, and RAM does not go away.
            let _ = self.publish(vcpu, stable);
        }
    }

    /// Fills the wall clock at `page`: the time of day at which the VM's clock was zero.
    ///
    /// # Errors
    /// [`memory::Error::NotRam`] where it does not lie in RAM; nothing changes then.
    pub fn write_wall_clock(&self, page: Gpa) -> Result<(), memory::Error> {
        self.ram.check(page, size_of::<WallClock>() as u64)?;
        let _one_writer = self.lock();
        let started = self.host.realtime_ns().saturating_sub(self.now_ns());
        let clock = WallClock { version: 0, sec: (started / NS_PER_S) as u32, nsec: (started % NS_PER_S) as u32 };
        self.write_versioned(page, |version| WallClock { version, ..clock })
    }

    fn publish(&self, vcpu: &VcpuClock, stable: bool) -> Result<(), memory::Error> {
        let Some(page) = vcpu.page else { return Ok(()) };
        let info = TimeInfo {
            tsc_timestamp: vcpu.tsc.guest(self.zero),
            system_time: 0,
            tsc_to_system_mul: self.scale.mul,
            tsc_shift: self.scale.shift,
            flags: if stable { TIME_INFO_STABLE } else { 0 },
            ..TimeInfo::default()
        };
        self.write_versioned(page, |version| TimeInfo { version, ..info })
    }

    /// The seqlock: an odd version, then everything, then the next even one. Callers hold the lock: one writer a page.
    fn write_versioned<T: zerocopy::IntoBytes + zerocopy::Immutable>(
        &self,
        page: Gpa,
        value: impl Fn(u32) -> T,
    ) -> Result<(), memory::Error> {
        // Go on from what is there, so that a reader in between two registrations notices; made even where it is not.
        let old = self.ram.read_value::<u32>(page)?;
        let odd = old.wrapping_add(1) | 1;
        self.ram.write_value(page, &odd)?;
        fence(Ordering::SeqCst);
        self.ram.write_value(page, &value(odd))?;
        fence(Ordering::SeqCst);
        self.ram.write_value(page, &odd.wrapping_add(1))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<VcpuClock>> {
        self.vcpus.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn all_equal(vcpus: &[VcpuClock]) -> bool {
    vcpus.windows(2).all(|pair| pair[0].tsc.offset() == pair[1].tsc.offset())
}

#[cfg(test)]
mod tests {
    use super::*;
    use host::fake::FakeClock;
    use proptest::prelude::*;

    /// What a guest computes from a page (Linux, arch/x86/include/asm/pvclock.h).
    fn guest_ns(info: &TimeInfo, tsc: u64) -> u64 {
        let delta = tsc.wrapping_sub(info.tsc_timestamp);
        let shifted = if info.tsc_shift >= 0 { delta << info.tsc_shift } else { delta >> -info.tsc_shift };
        info.system_time + ((u128::from(shifted) * u128::from(info.tsc_to_system_mul)) >> 32) as u64
    }

    proptest! {
        #[test]
        fn the_scale_is_exact_to_a_billionth(khz in 1_000_u64..100_000_000, ticks in 0_u64..1 << 50) {
            let scale = TscScale::new(khz);
            prop_assert!(scale.mul >= 1 << 31);
            let exact = u128::from(ticks) * 1_000_000 / u128::from(khz);
            let got = u128::from(scale.nanoseconds(ticks));
            let slack = (exact >> 30) + (1 << scale.shift.unsigned_abs().min(30)) + 2;
            prop_assert!(got.abs_diff(exact) <= slack, "{got} {exact} {scale:?}");
        }

        #[test]
        fn the_scale_never_goes_back(khz in 1_000_u64..100_000_000, ticks in 0_u64..1 << 50, more in 0_u64..1000) {
            let scale = TscScale::new(khz);
            prop_assert!(scale.nanoseconds(ticks + more) >= scale.nanoseconds(ticks));
        }

        #[test]
        fn impossible_rates_are_no_panic(khz: u64, ticks: u64) {
            TscScale::new(khz).nanoseconds(ticks);
        }
    }

    fn ram() -> GuestRam {
        GuestRam::new(&[(Gpa(0), 0x4000)]).unwrap()
    }

    fn page(ram: &GuestRam, gpa: u64) -> TimeInfo {
        ram.read_value(Gpa(gpa)).unwrap()
    }

    #[test]
    fn scales_of_round_rates_are_the_known_ones() {
        assert_eq!(TscScale::new(1_000_000), TscScale { mul: 1 << 31, shift: 1 });
        assert_eq!(TscScale::new(2_000_000), TscScale { mul: 1 << 31, shift: 0 });
        assert_eq!(TscScale::new(4_000_000), TscScale { mul: 1 << 31, shift: -1 });
        assert_eq!(TscScale::new(3_000_000), TscScale { mul: 2_863_311_530, shift: -1 });
    }

    #[test]
    fn all_vcpus_read_one_clock_whatever_their_offsets() {
        let (host, ram) = (FakeClock::new(), ram());
        host.advance(5_000);
        let tscs = [0, 0].map(|start| Arc::new(GuestTsc::new(1_000_000, 5_000, start)));
        let clock = Clock::new(Arc::new(host.clone()), ram.clone(), 5_000, tscs.iter().cloned());
        host.advance(777);
        clock.set_page(0, Some(Gpa(0x100))).unwrap();
        clock.set_page(1, Some(Gpa(0x200))).unwrap();
        let (one, two) = (page(&ram, 0x100), page(&ram, 0x200));
        assert_eq!((one.version, one.flags, one), (2, TIME_INFO_STABLE, two));
        assert_eq!((guest_ns(&one, tscs[0].guest(5_777)), clock.now_ns()), (777, 777));

        tscs[1].adjust(1_000_000);
        clock.tsc_moved();
        let (one, two) = (page(&ram, 0x100), page(&ram, 0x200));
        assert_eq!((one.flags, two.flags, two.version), (0, 0, 4));
        assert_eq!(guest_ns(&two, tscs[1].guest(5_777)), 777);
        assert_eq!(guest_ns(&one, tscs[0].guest(5_777)), 777);

        tscs[0].adjust(1_000_000);
        clock.tsc_moved();
        assert_eq!(page(&ram, 0x100).flags, TIME_INFO_STABLE);
    }

    #[test]
    fn a_page_taken_back_is_not_written_any_more() {
        let (host, ram) = (FakeClock::new(), ram());
        let clock = Clock::new(Arc::new(host), ram.clone(), 0, [Arc::new(GuestTsc::new(1_000_000, 0, 0))]);
        clock.set_page(0, Some(Gpa(0))).unwrap();
        clock.set_page(0, None).unwrap();
        ram.write_value(Gpa(0), &TimeInfo::default()).unwrap();
        clock.tsc_moved();
        assert_eq!(page(&ram, 0), TimeInfo::default());
    }

    #[test]
    fn the_wall_clock_is_when_the_vm_started() {
        let (host, ram) = (FakeClock::new(), ram());
        host.advance(1_500_000_000);
        let clock = Clock::new(Arc::new(host.clone()), ram.clone(), host::Clock::tsc(&host), []);
        host.advance(9_000_000_000);
        ram.write_value(Gpa(8), &7_u32).unwrap(); // left odd by whoever was there before
        clock.write_wall_clock(Gpa(8)).unwrap();
        let wall: WallClock = ram.read_value(Gpa(8)).unwrap();
        assert_eq!(wall, WallClock { version: 10, sec: 1_700_000_001, nsec: 500_000_000 });
        assert!(clock.write_wall_clock(Gpa(0x3ff8)).is_err());
    }
}
