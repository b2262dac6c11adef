//! The clock: a load, a read of the TSC, a multiplication. No exit.

use core::mem::offset_of;

use contract::kvm::TimeInfo;
use contract::seqlock;

use crate::call::ordered_tsc;
use crate::memory::Shared;

/// What `delta` ticks are in nanoseconds, by the scale of a [`TimeInfo`]. Any numbers are harmless.
pub fn nanoseconds(delta: u64, mul: u32, shift: i8) -> u64 {
    let delta = u128::from(delta);
    let shifted = if shift >= 0 { delta << shift.min(31) } else { delta >> shift.unsigned_abs().min(63) };
    ((shifted * u128::from(mul)) >> 32) as u64
}

/// Reads the [`TimeInfo`] at the start of a page: nanoseconds since the VM started.
pub(crate) fn now<T>(page: &Shared<T>) -> u64 {
    now_with(page, ordered_tsc)
}

fn now_with<T>(page: &Shared<T>, tsc: impl Fn() -> u64) -> u64 {
    let version = || page.read(offset_of!(TimeInfo, version));
    let body = || {
        let start: u64 = page.read(offset_of!(TimeInfo, tsc_timestamp));
        let ns: u64 = page.read(offset_of!(TimeInfo, system_time));
        let mul: u32 = page.read(offset_of!(TimeInfo, tsc_to_system_mul));
        let shift: u8 = page.read(offset_of!(TimeInfo, tsc_shift));
        ns.wrapping_add(nanoseconds(tsc().wrapping_sub(start), mul, shift as i8))
    };
    loop {
        if let Some(now) = seqlock::read(version, body) {
            return now;
        }
        core::hint::spin_loop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::cell::Cell;

    #[test]
    fn scales_are_those_of_pvclock() {
        assert_eq!(nanoseconds(1000, 1 << 31, 1), 1000);
        assert_eq!(nanoseconds(3_000_000_000, 2_863_311_530, -1), 999_999_999);
        for shift in [i8::MIN, -64, -1, 0, 31, i8::MAX] {
            nanoseconds(u64::MAX, u32::MAX, shift);
        }
        let hundred_years = 3_155_760_000_000_000_000;
        assert_eq!(nanoseconds(hundred_years, 1 << 31, 1), hundred_years);
    }

    #[test]
    fn a_change_in_the_middle_is_read_again() {
        let page = Shared::<TimeInfo>::new();
        let set = |version: u32, ns: u64| {
            page.write(offset_of!(TimeInfo, version), version);
            page.write(offset_of!(TimeInfo, system_time), ns);
        };
        set(2, 100);
        assert_eq!(now_with(&page, || 5), 100);
        let reads = Cell::new(0);
        let tsc = || {
            match reads.replace(reads.get() + 1) {
                0 => set(3, 200), // the host begins
                1 => set(4, 300), // and ends
                _ => {}
            }
            0
        };
        assert_eq!((now_with(&page, tsc), reads.get()), (300, 3));
    }
}
