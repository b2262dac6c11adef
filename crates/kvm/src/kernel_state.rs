//! What the host's kernel keeps of a vCPU beside [`engine::CpuState`], between [`engine::KernelState`] and KVM's structures.
//! Pure.

use std::ops::RangeInclusive;

use engine::PendingEvent;
use kvm_bindings::{KVM_VCPUEVENT_VALID_NMI_PENDING, kvm_vcpu_events};

/// MSRs that a guest can change, that are no part of `CpuState`, and that KVM keeps (Intel SDM vol. 4, table 2-2; Linux,
/// Documentation/virt/kvm/x86/msr.rst).
pub(crate) const MSRS: [RangeInclusive<u32>; 9] = [
    0x48..=0x48,   // IA32_SPEC_CTRL
    0x17a..=0x17a, // IA32_MCG_STATUS
    0x200..=0x20f, // MTRRs, variable
    0x250..=0x250, // MTRRs, fixed
    0x258..=0x259,
    0x268..=0x26f,
    0x6e0..=0x6e0,             // IA32_TSC_DEADLINE
    0x4b56_4d00..=0x4b56_4d06, // the kvm dialect's
    0xc001_011f..=0xc001_011f, // VIRT_SPEC_CTRL
];

/// The event in the middle of its delivery.
pub(crate) fn event(events: &kvm_vcpu_events) -> Option<PendingEvent> {
    if events.exception.injected != 0 {
        let error = (events.exception.has_error_code != 0).then_some(events.exception.error_code);
        Some(PendingEvent::Exception(events.exception.nr, error))
    } else if events.interrupt.injected != 0 && events.interrupt.soft == 0 {
        Some(PendingEvent::Interrupt(events.interrupt.nr))
    } else if events.nmi.injected != 0 {
        Some(PendingEvent::Nmi)
    } else {
        None // a software interrupt is an instruction, and runs again
    }
}

/// `events` with this one in delivery and no other.
pub(crate) fn with_event(mut events: kvm_vcpu_events, event: Option<PendingEvent>) -> kvm_vcpu_events {
    (events.exception.injected, events.interrupt.injected, events.nmi.injected) = (0, 0, 0);
    events.flags |= KVM_VCPUEVENT_VALID_NMI_PENDING;
    match event {
        Some(PendingEvent::Exception(vector, error)) => {
            (events.exception.injected, events.exception.nr) = (1, vector);
            events.exception.has_error_code = error.is_some().into();
            events.exception.error_code = error.unwrap_or(0);
        }
        Some(PendingEvent::Interrupt(vector)) => {
            (events.interrupt.injected, events.interrupt.nr, events.interrupt.soft) = (1, vector, 0);
        }
        Some(PendingEvent::Nmi) => events.nmi.injected = 1,
        None => {}
    }
    events
}

/// The local APIC's registers as bytes, and as the signed ones the kernel's structure has.
pub(crate) fn bytes(registers: &[i8; 1024]) -> Box<[u8; 1024]> {
    Box::new(registers.map(i8::cast_unsigned))
}

/// The other way.
pub(crate) fn registers(bytes: &[u8; 1024]) -> [i8; 1024] {
    bytes.map(u8::cast_signed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_event() -> impl Strategy<Value = Option<PendingEvent>> {
        prop_oneof![
            Just(None),
            Just(Some(PendingEvent::Nmi)),
            any::<u8>().prop_map(|vector| Some(PendingEvent::Interrupt(vector))),
            any::<(u8, Option<u32>)>().prop_map(|(vector, error)| Some(PendingEvent::Exception(vector, error))),
        ]
    }

    proptest! {
        #[test]
        fn events_come_back_whatever_was_there(before in any_event(), now in any_event()) {
            let events = with_event(kvm_vcpu_events::default(), before);
            prop_assert_eq!(event(&events), before);
            prop_assert_eq!(event(&with_event(events, now)), now);
        }

        #[test]
        fn the_local_apic_comes_back(seed: [u8; 32]) {
            let page: [u8; 1024] = std::array::from_fn(|index| seed[index % 32].wrapping_add(index as u8));
            prop_assert_eq!(*bytes(&registers(&page)), page);
        }
    }

    #[test]
    fn a_software_interrupt_is_no_event() {
        let mut events = with_event(kvm_vcpu_events::default(), Some(PendingEvent::Interrupt(0x80)));
        events.interrupt.soft = 1;
        assert_eq!(event(&events), None);
    }
}
