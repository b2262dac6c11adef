//! The VM's clock: a scale and an offset of the time-stamp counter, in pages the guest reads itself.
//!
//! ```text
//!   host TSC ── + offset (GuestTsc) ──> guest TSC ── * mul >> 32, << shift ──> ns since the VM started
//!                                          └── what the guest reads ──┘└── what the page says ──┘
//! ```
//!
//! Both dialects' pages tell one time. All pages speak of one and the same moment, the start of the VM or the last change
//! of the scale, so that clocks of different vCPUs agree to the nanosecond for as long as their TSC offsets are equal:
//! then, and only then, the pages say "stable".

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use contract::kvm::{TIME_INFO_STABLE, TIME_INFO_STOPPED, TimeInfo, WallClock};
use engine::GuestTsc;
use memory::{Gpa, GuestRam};
use zerocopy::IntoBytes;

use crate::seqlock::{self, Versioned};

const NS_PER_S: u64 = 1_000_000_000;

/// How often the host's clocks are read for one pair of them.
const PAIRS: usize = 4;

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

    /// How many ticks a step of the counter has to be for each step of what the guest makes of it to be `ns` nanoseconds or
    /// more: the fewest, in multiples of what the guest shifts out.
    pub fn ticks_of(self, ns: u64) -> u64 {
        let shifted = (u128::from(ns) << 32).div_ceil(self.mul.max(1).into());
        let ticks = if self.shift >= 0 { shifted.div_ceil(1 << self.shift) } else { shifted << -self.shift };
        u64::try_from(ticks).unwrap_or(u64::MAX)
    }

    /// What the guest makes of `ticks`, to the nanosecond.
    pub fn nanoseconds(self, ticks: u64) -> u64 {
        let ticks = u128::from(ticks);
        let shifted = if self.shift >= 0 { ticks << self.shift } else { ticks >> -self.shift };
        ((shifted * u128::from(self.mul)) >> 32) as u64
    }
}

/// Whose page it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClockPage {
    /// The kvm dialect's.
    Kvm,
    /// The native dialect's: the beginning of the vCPU page.
    Native,
}

/// What is known of one vCPU's clock.
struct VcpuClock {
    tsc: Arc<GuestTsc>,
    /// Where its pages are, by [`ClockPage`], while it wants them.
    pages: [Option<Gpa>; 2],
}

/// From here on the VM's time is this many nanoseconds plus what the scale makes of the ticks since.
#[derive(Clone, Copy)]
struct Line {
    /// The host's TSC.
    tsc: u64,
    ns: u64,
    scale: TscScale,
}

impl Line {
    fn ns_at(&self, tsc: u64) -> u64 {
        self.ns.wrapping_add(self.scale.nanoseconds(tsc.wrapping_sub(self.tsc)))
    }
}

struct State {
    line: Line,
    vcpus: Vec<VcpuClock>,
}

/// The clock of one VM.
pub struct Clock {
    host: Arc<dyn host::Clock>,
    ram: GuestRam,
    state: Mutex<State>,
}

impl Clock {
    /// A clock that is zero when the host's TSC reads `zero`; `tscs` are the vCPUs' counters.
    pub fn new(
        host: Arc<dyn host::Clock>,
        ram: GuestRam,
        zero: u64,
        tscs: impl IntoIterator<Item = Arc<GuestTsc>>,
    ) -> Self {
        let vcpus = tscs.into_iter().map(|tsc| VcpuClock { tsc, pages: [None; 2] }).collect();
        let line = Line { tsc: zero, ns: 0, scale: TscScale::new(host.tsc_khz()) };
        Self { host, ram, state: Mutex::new(State { line, vcpus }) }
    }

    /// Nanoseconds since the VM started.
    pub fn now_ns(&self) -> u64 {
        self.lock().line.ns_at(self.host.tsc())
    }

    /// What is to be added to the VM's time for the host's monotonic time, nanoseconds.
    pub fn to_monotonic(&self) -> u64 {
        self.host.monotonic_ns().wrapping_sub(self.now_ns())
    }

    /// Keeps vCPU `index`'s time in the page at `page` from now on; `None` leaves the last page as it is.
    ///
    /// # Errors
    /// [`memory::Error::NotRam`] where the page does not lie in RAM; nothing changes then.
    pub fn set_page(&self, index: u32, whose: ClockPage, page: Option<Gpa>) -> Result<(), memory::Error> {
        if let Some(page) = page {
            self.ram.check(page, size_of::<TimeInfo>() as u64)?;
        }
        let mut state = self.lock();
        let stable = all_equal(&state.vcpus);
        let line = state.line;
        if let Some(vcpu) = state.vcpus.get_mut(index as usize) {
            vcpu.pages[whose as usize] = page;
            if let Some(page) = page {
                self.write_versioned(page, &time_info(&line, &vcpu.tsc, stable));
            }
        }
        Ok(())
    }

    /// A vCPU's TSC has been moved (the guest wrote IA32_TSC or IA32_TSC_ADJUST): all pages are written anew, since the
    /// clocks may no longer, or once more, be one.
    pub fn tsc_moved(&self) {
        self.rewrite(&mut self.lock(), |_| {});
    }

    /// From now on the TSC counts at `khz`: time goes on where it is, at the new rate. No reader sees it go back: all pages
    /// are marked as changing before the moment is chosen that both rates agree on.
    pub fn rescale(&self, khz: u64) {
        let scale = TscScale::new(khz);
        self.rewrite(&mut self.lock(), |line| {
            let tsc = self.host.tsc();
            *line = Line { tsc, ns: line.ns_at(tsc), scale };
        });
    }

    /// vCPU `index` has stood still, and time has not: its pages say so until the guest has taken note.
    pub fn stopped(&self, index: u32) {
        let state = self.lock();
        let Some(vcpu) = state.vcpus.get(index as usize) else { return };
        for &page in vcpu.pages.iter().flatten() {
            let page = self.page(page);
            let odd = seqlock::begin(&page);
            page.set_flags(page.flags() | TIME_INFO_STOPPED);
            seqlock::end(&page, odd);
        }
    }

    /// Writes all pages, after `change` and while readers wait.
    fn rewrite(&self, state: &mut State, change: impl FnOnce(&mut Line)) {
        let stable = all_equal(&state.vcpus);
        let mut open = Vec::new();
        for vcpu in &state.vcpus {
            for &page in vcpu.pages.iter().flatten() {
                let page = self.page(page);
                open.push((seqlock::begin(&page), page, &vcpu.tsc));
            }
        }
        change(&mut state.line);
        for (odd, page, tsc) in open {
            let mut info = time_info(&state.line, tsc, stable);
            info.flags |= page.flags() & TIME_INFO_STOPPED; // the guest has not looked yet
            page.set_body(&info.as_bytes()[4..]);
            seqlock::end(&page, odd);
        }
    }

    /// Fills the wall clock at `page`: the time of day at which the VM's clock was zero.
    ///
    /// # Errors
    /// [`memory::Error::NotRam`] where it does not lie in RAM; nothing changes then.
    pub fn write_wall_clock(&self, page: Gpa) -> Result<(), memory::Error> {
        self.ram.check(page, size_of::<WallClock>() as u64)?;
        let started = self.started_ns();
        let _one_writer = self.lock();
        let clock = WallClock { version: 0, sec: (started / NS_PER_S) as u32, nsec: (started % NS_PER_S) as u32 };
        self.write_versioned(page, &clock);
        Ok(())
    }

    /// The time of day, nanoseconds since 1970-01-01 UTC, and what vCPU `index`'s TSC read at that moment.
    pub fn pair(&self, index: u32) -> (u64, u64) {
        // Whoever is preempted between two reads has a wide pair of them: the closest is taken.
        let pair = || {
            let before = self.host.tsc();
            let ns = self.host.realtime_ns();
            let ticks = self.host.tsc().wrapping_sub(before);
            (ticks, ns, before.wrapping_add(ticks / 2))
        };
        let (_, ns, tsc) = (0..PAIRS).map(|_| pair()).min().unwrap_or_default();
        let tsc = self.lock().vcpus.get(index as usize).map_or(tsc, |vcpu| vcpu.tsc.guest(tsc));
        (ns, tsc)
    }

    /// The time of day at which the VM's clock was zero, nanoseconds since 1970-01-01 UTC.
    pub fn started_ns(&self) -> u64 {
        self.host.realtime_ns().saturating_sub(self.now_ns())
    }

    /// Writes what follows the version of `value`. Callers hold the lock: one writer a page.
    fn write_versioned(&self, page: Gpa, value: &(impl IntoBytes + zerocopy::Immutable)) {
        let page = self.page(page);
        let odd = seqlock::begin(&page);
        page.set_body(&value.as_bytes()[4..]);
        seqlock::end(&page, odd);
    }

    fn page(&self, gpa: Gpa) -> RamPage<'_> {
        RamPage { ram: &self.ram, gpa }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn time_info(line: &Line, tsc: &GuestTsc, stable: bool) -> TimeInfo {
    TimeInfo {
        tsc_timestamp: tsc.guest(line.tsc),
        system_time: line.ns,
        tsc_to_system_mul: line.scale.mul,
        tsc_shift: line.scale.shift,
        flags: if stable { TIME_INFO_STABLE } else { 0 },
        ..TimeInfo::default()
    }
}

fn all_equal(vcpus: &[VcpuClock]) -> bool {
    vcpus.windows(2).all(|pair| pair[0].tsc.offset() == pair[1].tsc.offset())
}

/// A versioned structure in guest RAM. That it is RAM was checked when it was registered, and RAM does not go away.
pub(crate) struct RamPage<'a> {
    pub(crate) ram: &'a GuestRam,
    pub(crate) gpa: Gpa,
}

impl RamPage<'_> {
    /// Replaces what follows the version.
    pub(crate) fn set_body(&self, body: &[u8]) {
        let _ = self.ram.write(Gpa(self.gpa.0 + 4), body);
    }

    /// The flags of a [`TimeInfo`].
    fn flags(&self) -> u8 {
        self.ram.read_value(self.flags_at()).unwrap_or(0)
    }

    fn set_flags(&self, flags: u8) {
        let _ = self.ram.write_value(self.flags_at(), &flags);
    }

    fn flags_at(&self) -> Gpa {
        Gpa(self.gpa.0 + std::mem::offset_of!(TimeInfo, flags) as u64)
    }
}

impl Versioned for RamPage<'_> {
    fn version(&self) -> u32 {
        self.ram.read_value(self.gpa).unwrap_or(0)
    }

    fn set_version(&self, version: u32) {
        let _ = self.ram.write_value(self.gpa, &version);
    }
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
            TscScale::new(khz).ticks_of(ticks);
        }

        #[test]
        fn steps_of_a_coarse_counter_are_the_quantum_and_hardly_more(
            khz in 100_000_u64..10_000_000,
            quantum in 1_000_u64..100_000_000,
            step in 0_u64..1 << 20,
        ) {
            let scale = TscScale::new(khz);
            let ticks = scale.ticks_of(quantum);
            let ns = scale.nanoseconds((step + 1) * ticks) - scale.nanoseconds(step * ticks);
            let most = quantum + (1 << scale.shift.unsigned_abs()) + 2;
            prop_assert!((quantum..=most).contains(&ns), "{ns} {quantum} {scale:?}");
            // And so by exact arithmetic, which other clocks are read by.
            prop_assert!(u128::from(ticks) * 1_000_000 / u128::from(khz) >= u128::from(quantum));
        }
    }

    const NS_IN_100_YEARS: u64 = 36_525 * 86_400 * NS_PER_S;

    proptest! {
        #[test]
        fn the_scale_errs_by_less_than_a_nanosecond_a_second(khz in 100_000_u64..10_000_000, seconds in 1_u64..3_155_760_000) {
            // Whole seconds, so that what is left is the scale's own error; the guest loses bits it shifts out: 2 ns at most.
            let ticks = u128::from(khz) * 1000 * u128::from(seconds);
            prop_assume!(ticks <= u128::from(u64::MAX));
            let got = TscScale::new(khz).nanoseconds(ticks as u64);
            let exact = seconds * NS_PER_S;
            prop_assert!(got.abs_diff(exact) <= seconds + 2, "{got} {exact}");
        }

        #[test]
        fn a_guest_reads_a_hundred_years_without_overflow(khz in 100_000_u64..5_000_000, ns in 0..NS_IN_100_YEARS) {
            // The guest shifts and multiplies as pvclock does: 64 bits, then 128.
            let scale = TscScale::new(khz);
            let ticks = (u128::from(ns) * u128::from(khz) / 1_000_000) as u64;
            let info = TimeInfo { tsc_to_system_mul: scale.mul, tsc_shift: scale.shift, ..TimeInfo::default() };
            prop_assert_eq!(guest_ns(&info, ticks), scale.nanoseconds(ticks));
            prop_assert!(guest_ns(&info, ticks).abs_diff(ns) <= ns / NS_PER_S + 12);
        }

        #[test]
        fn time_goes_on_at_each_change_of_the_scale(
            rates in prop::collection::vec((100_000_u64..10_000_000, 0_u64..1 << 40), 1..20),
            offset: u64,
        ) {
            let (host, ram) = (FakeClock::new(), ram());
            let tsc = Arc::new(GuestTsc::new(1_000_000, 0, offset));
            let clock = Clock::new(Arc::new(host.clone()), ram.clone(), 0, [Arc::clone(&tsc)]);
            clock.set_page(0, ClockPage::Kvm, Some(Gpa(0x100))).unwrap();
            clock.set_page(0, ClockPage::Native, Some(Gpa(0x200))).unwrap();
            let mut last = 0;
            for (khz, ticks) in rates {
                let now = |host: &FakeClock| tsc.guest(host::Clock::tsc(host));
                let before = guest_ns(&page(&ram, 0x100), now(&host));
                clock.rescale(khz);
                let info = page(&ram, 0x100);
                prop_assert_eq!((info, info.version % 2), (TimeInfo { version: info.version, ..page(&ram, 0x200) }, 0));
                prop_assert_eq!(guest_ns(&info, now(&host)), before, "both rates agree on the moment of the change");
                prop_assert!(before >= last);
                last = before;
                host.advance(ticks);
                prop_assert_eq!(guest_ns(&info, now(&host)), clock.now_ns(), "guest and host read one clock");
            }
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
        clock.set_page(0, ClockPage::Kvm, Some(Gpa(0x100))).unwrap();
        clock.set_page(1, ClockPage::Kvm, Some(Gpa(0x200))).unwrap();
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
    fn a_vcpu_that_stood_still_is_told_until_it_has_taken_note() {
        let (host, ram) = (FakeClock::new(), ram());
        let tscs = [0, 0].map(|start| Arc::new(GuestTsc::new(1_000_000, 0, start)));
        let clock = Clock::new(Arc::new(host), ram.clone(), 0, tscs);
        clock.set_page(0, ClockPage::Kvm, Some(Gpa(0x100))).unwrap();
        clock.set_page(0, ClockPage::Native, Some(Gpa(0x180))).unwrap();
        clock.set_page(1, ClockPage::Kvm, Some(Gpa(0x200))).unwrap();
        let flags = || [0x100, 0x180, 0x200].map(|gpa| page(&ram, gpa).flags);
        clock.stopped(0);
        clock.stopped(7); // nobody
        let both = TIME_INFO_STABLE | TIME_INFO_STOPPED;
        assert_eq!((flags(), page(&ram, 0x100).version), ([both, both, TIME_INFO_STABLE], 4));
        clock.rescale(2_000_000);
        assert_eq!(flags(), [both, both, TIME_INFO_STABLE], "not forgotten over a change");
        let noted = TimeInfo { flags: TIME_INFO_STABLE, ..page(&ram, 0x100) };
        ram.write_value(Gpa(0x100), &noted).unwrap();
        clock.rescale(1_000_000);
        assert_eq!(flags(), [TIME_INFO_STABLE, both, TIME_INFO_STABLE], "each by itself");
    }

    #[test]
    fn a_page_taken_back_is_not_written_any_more() {
        let (host, ram) = (FakeClock::new(), ram());
        let clock = Clock::new(Arc::new(host), ram.clone(), 0, [Arc::new(GuestTsc::new(1_000_000, 0, 0))]);
        clock.set_page(0, ClockPage::Kvm, Some(Gpa(0))).unwrap();
        clock.set_page(0, ClockPage::Kvm, None).unwrap();
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
