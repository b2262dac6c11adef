//! What the host's KVM must be able to do, and since which Linux it can.

use kvm_bindings as k;

/// One of KVM's capabilities (Linux, Documentation/virt/kvm/api.rst).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability {
    /// Its number, for `KVM_CHECK_EXTENSION`.
    pub number: u32,
    /// Its name without `KVM_CAP_`.
    pub name: &'static str,
    /// The first Linux that has it.
    pub since: &'static str,
    /// There is no running without it.
    pub needed: bool,
}

const fn needed(number: u32, name: &'static str, since: &'static str) -> Capability {
    Capability { number, name, since, needed: true }
}

const fn used(number: u32, name: &'static str, since: &'static str) -> Capability {
    Capability { number, name, since, needed: false }
}

/// All that this engine looks for; docs/kvm.md says what for.
pub const CAPABILITIES: [Capability; 21] = [
    needed(k::KVM_CAP_USER_MEMORY, "USER_MEMORY", "2.6.25"),
    needed(k::KVM_CAP_EXT_CPUID, "EXT_CPUID", "2.6.26"),
    needed(k::KVM_CAP_MP_STATE, "MP_STATE", "2.6.26"),
    needed(k::KVM_CAP_IRQ_ROUTING, "IRQ_ROUTING", "2.6.30"),
    needed(k::KVM_CAP_VCPU_EVENTS, "VCPU_EVENTS", "2.6.33"),
    needed(k::KVM_CAP_DEBUGREGS, "DEBUGREGS", "2.6.35"),
    needed(k::KVM_CAP_XSAVE, "XSAVE", "2.6.36"),
    needed(k::KVM_CAP_XCRS, "XCRS", "2.6.36"),
    needed(k::KVM_CAP_SIGNAL_MSI, "SIGNAL_MSI", "3.5"),
    needed(k::KVM_CAP_SPLIT_IRQCHIP, "SPLIT_IRQCHIP", "4.4"),
    needed(k::KVM_CAP_IMMEDIATE_EXIT, "IMMEDIATE_EXIT", "4.11"),
    needed(k::KVM_CAP_X86_USER_SPACE_MSR, "X86_USER_SPACE_MSR", "5.10"),
    needed(k::KVM_CAP_X86_MSR_FILTER, "X86_MSR_FILTER", "5.10"),
    needed(k::KVM_CAP_ENFORCE_PV_FEATURE_CPUID, "ENFORCE_PV_FEATURE_CPUID", "5.10"),
    needed(k::KVM_CAP_SREGS2, "SREGS2", "5.14"),
    needed(k::KVM_CAP_VCPU_ATTRIBUTES, "VCPU_ATTRIBUTES", "5.16"),
    used(k::KVM_CAP_TSC_DEADLINE_TIMER, "TSC_DEADLINE_TIMER", "3.1"),
    used(k::KVM_CAP_IOEVENTFD_ANY_LENGTH, "IOEVENTFD_ANY_LENGTH", "4.4"),
    used(k::KVM_CAP_SET_GUEST_DEBUG2, "SET_GUEST_DEBUG2", "5.13"),
    used(k::KVM_CAP_HYPERV_ENFORCE_CPUID, "HYPERV_ENFORCE_CPUID", "5.14"),
    used(k::KVM_CAP_BINARY_STATS_FD, "BINARY_STATS_FD", "5.14"),
];

/// What is missing of what is needed, given what the host says of each.
pub(crate) fn missing(has: impl Fn(u32) -> bool) -> Vec<Capability> {
    CAPABILITIES.into_iter().filter(|capability| capability.needed && !has(capability.number)).collect()
}

/// The same as a reason and what to do; `None` where nothing is missing.
pub(crate) fn reason(missing: &[Capability]) -> Option<String> {
    let last = missing.last()?; // the list is in the order of versions
    let names: Vec<_> = missing.iter().map(|capability| capability.name).collect();
    Some(format!("the host's KVM lacks {}; Linux {} or newer has all of it", names.join(", "), last.since))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn each_is_there_once_and_the_needed_are_in_the_order_of_versions() {
        let numbers: BTreeSet<_> = CAPABILITIES.iter().map(|capability| capability.number).collect();
        assert_eq!(numbers.len(), CAPABILITIES.len());
        let version = |capability: &Capability| -> Vec<u32> {
            capability.since.split('.').map(|part| part.parse().unwrap()).collect()
        };
        let needed: Vec<_> = CAPABILITIES.iter().filter(|capability| capability.needed).map(version).collect();
        assert!(needed.is_sorted(), "{needed:?}");
    }

    #[test]
    fn what_is_missing_is_named_with_the_linux_that_has_it() {
        assert_eq!(reason(&missing(|_| true)), None);
        let old = missing(|number| number != k::KVM_CAP_SREGS2 && number != k::KVM_CAP_SPLIT_IRQCHIP);
        assert_eq!(
            reason(&old).unwrap(),
            "the host's KVM lacks SPLIT_IRQCHIP, SREGS2; Linux 5.14 or newer has all of it"
        );
        let without_the_rest = missing(|number| CAPABILITIES.iter().any(|c| c.needed && c.number == number));
        assert_eq!(without_the_rest, []);
    }
}
