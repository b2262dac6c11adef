//! What a guest finds: the leaves, and how calls are made.

use contract::native::{VERSION, call, calling, feature, leaf, msr};
use engine::{Cpuid, CpuidTable};

use super::Policy;
use super::calls::{MOST_CALLS, MOST_RANGES};
use super::vm::TIMERS_PER_VCPU;

/// All features that are built.
pub const BUILT: u64 = feature::CLOCK
    | feature::TIME_OF_DAY
    | feature::TIMER
    | feature::INTERRUPTS
    | feature::EOI
    | feature::YIELD
    | feature::RUN_STATE
    | feature::STEAL
    | feature::CRITICAL
    | feature::IPI
    | feature::FLUSH_TLB
    | feature::WAIT
    | feature::MULTICALL
    | feature::GENERATION
    | feature::LEDGER;

/// Bytes of a calling sequence, at most.
const LONGEST: usize = 4;

/// How a guest's call reaches the monitor: what the hypercall page is filled with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Calling {
    /// VMCALL, Intel's.
    Vmcall,
    /// VMMCALL, AMD's.
    Vmmcall,
    /// OUT to this port, for engines that have no hypercall to give away: the registers are the same.
    Port(u8),
}

impl Calling {
    /// The sequence, RET included (Intel SDM vol. 2: VMCALL, OUT; AMD APM vol. 3: VMMCALL), filled up with INT3.
    pub(crate) fn bytes(self) -> [u8; LONGEST] {
        match self {
            Self::Vmcall => [0x0f, 0x01, 0xc1, 0xc3],
            Self::Vmmcall => [0x0f, 0x01, 0xd9, 0xc3],
            Self::Port(port) => [0xe7, port, 0xc3, 0xcc],
        }
    }

    fn leaf(self) -> u32 {
        match self {
            Self::Vmcall | Self::Vmmcall => calling::INSTRUCTION,
            Self::Port(_) => calling::PAGE,
        }
    }
}

/// Adds the dialect's leaves to what CPUID answers. The hypervisor-present bit is not this dialect's business: a guest finds
/// it without.
pub fn offer(table: &mut CpuidTable, features: u64, way: Calling, policy: &Policy, tsc_khz: u64, vcpus: u32) {
    let [ebx, ecx, edx] = crate::negotiation::signature(&contract::native::SIGNATURE);
    let mut set = |offset, eax, ebx, ecx, edx| table.set(leaf::BASE + offset, 0, Cpuid { eax, ebx, ecx, edx });
    set(leaf::SIGNATURE, leaf::BASE + leaf::LAST_OFFSET, ebx, ecx, edx);
    set(leaf::FEATURES, VERSION, features as u32, (features >> 32) as u32, 1);
    set(leaf::CALLING, way.leaf(), msr::BASE, call::BASE as u32, 0);
    let khz = u32::try_from(tsc_khz).unwrap_or(0); // 0 says "not known"
    set(leaf::TIME, khz, policy.quantum_ns, policy.calls_per_s, policy.burst);
    set(leaf::LIMITS, TIMERS_PER_VCPU as u32, MOST_CALLS as u32, MOST_RANGES as u32, vcpus);
}
