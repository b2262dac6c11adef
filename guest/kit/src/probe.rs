//! Is there a host that speaks the dialect? By signature, never by the hypervisor-present bit.

use contract::native::{SIGNATURE, VERSION, calling, leaf};

/// What the host's leaves say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// Where the leaves are.
    pub base: u32,
    /// `major << 16 | minor`.
    pub version: u32,
    /// Features that can be accepted.
    pub offered: u64,
    /// Calls are made by the page alone: VMCALL and VMMCALL are not this host's.
    pub page_only: bool,
    /// Number of the first MSR.
    pub msrs: u32,
    /// Number of the first call.
    pub calls: u32,
    /// Rate of the TSC in kHz; 0 where the host does not know it.
    pub tsc_khz: u32,
    /// `time_of_day` is a multiple of this, nanoseconds.
    pub quantum_ns: u32,
    /// `time_of_day` calls a second.
    pub calls_per_s: u32,
    /// How many of them may come at once.
    pub burst: u32,
    /// Timers of each vCPU.
    pub timers: u32,
    /// Calls in a batch.
    pub batch: u32,
    /// Ranges in a flush.
    pub ranges: u32,
    /// vCPUs.
    pub vcpus: u32,
}

/// Looks for the dialect with `cpuid`, which returns EAX, EBX, ECX and EDX of a leaf. `None` where there is none, or one of
/// another major version.
pub fn find(cpuid: impl Fn(u32) -> [u32; 4]) -> Option<Found> {
    let base = (leaf::FIRST..=leaf::LAST).step_by(leaf::STEP as usize).find(|&base| {
        let [last, words @ ..] = cpuid(base);
        let text = words.iter().flat_map(|word| word.to_le_bytes());
        text.eq(SIGNATURE) && last.checked_sub(base).is_some_and(|offset| offset >= leaf::LAST_OFFSET)
    })?;
    let [version, low, high, _] = cpuid(base + leaf::FEATURES);
    let [way, msrs, calls, _] = cpuid(base + leaf::CALLING);
    let [tsc_khz, quantum_ns, calls_per_s, burst] = cpuid(base + leaf::TIME);
    let [timers, batch, ranges, vcpus] = cpuid(base + leaf::LIMITS);
    let offered = u64::from(high) << 32 | u64::from(low);
    let found = Found {
        base,
        version,
        offered,
        page_only: way != calling::INSTRUCTION,
        msrs,
        calls,
        tsc_khz,
        quantum_ns,
        calls_per_s,
        burst,
        timers,
        batch,
        ranges,
        vcpus,
    };
    (version >> 16 == VERSION >> 16).then_some(found)
}

/// Looks for the dialect on this processor. Works at every privilege level.
pub fn find_here() -> Option<Found> {
    find(|leaf| {
        let answer = core::arch::x86_64::__cpuid(leaf);
        [answer.eax, answer.ebx, answer.ecx, answer.edx]
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(at: u32, version: u32) -> impl Fn(u32) -> [u32; 4] {
        let word = |from: usize| u32::from_le_bytes([0, 1, 2, 3].map(|byte| SIGNATURE[from + byte]));
        move |leaf| match leaf.wrapping_sub(at) {
            0 => [at + 4, word(0), word(4), word(8)],
            1 => [version, 0x11, 0x22, 1],
            2 => [0, 0x4344_0000, 0x4344_0000, 0],
            3 => [3_000_000, 1000, 10_000, 100],
            4 => [8, 64, 32, 2],
            _ => [0; 4],
        }
    }

    #[test]
    fn the_dialect_is_found_wherever_it_is() {
        for at in [0x4000_0000, 0x4000_0100, 0x4000_ff00] {
            let found = find(host(at, 0x1_0007)).unwrap();
            assert_eq!((found.base, found.version, found.offered), (at, 0x1_0007, 0x22_0000_0011));
            assert!(!found.page_only);
            assert_eq!((found.timers, found.batch, found.ranges, found.vcpus), (8, 64, 32, 2));
        }
    }

    #[test]
    fn others_are_not_taken_for_it() {
        assert_eq!(find(|_| [0; 4]), None);
        assert_eq!(find(|_| [u32::MAX; 4]), None);
        assert_eq!(find(host(0x4000_0080, 1 << 16)), None, "between two places");
        assert_eq!(find(host(0x4000_0100, 2 << 16)), None, "another major version");
        let short = |leaf| {
            if leaf == 0x4000_0100 {
                let mut base = host(leaf, 0)(leaf);
                base[0] = leaf + 3;
                base
            } else {
                [0; 4]
            }
        };
        assert_eq!(find(short), None, "leaves are missing");
    }
}
