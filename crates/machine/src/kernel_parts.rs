//! What the engine has in the host's kernel, as the machine's devices see it: local APICs and doorbells.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use device::interrupt::ExternalApics;
use device::virtio;
use engine::{KernelState, LocalApics, Signal, Signals};
use memory::Gpa;

/// The engine's local APICs, and the mailbox of the processor that the PIC is wired to.
pub(crate) struct KernelApics {
    pub(crate) apics: Arc<dyn LocalApics>,
    pub(crate) bootstrap: Arc<Signal>,
}

impl ExternalApics for KernelApics {
    fn message(&self, address: u64, data: u32) -> bool {
        self.apics.message(address, data)
    }

    fn route(&self, pin: usize, message: Option<(u64, u32)>) {
        self.apics.route(pin, message);
    }

    fn pic_pending(&self) {
        self.bootstrap.raise(Signals::INTERRUPT);
    }
}

/// The engine's doorbells.
pub(crate) struct KernelDoorbells(pub(crate) Arc<dyn engine::Doorbells>);

impl virtio::Doorbells for KernelDoorbells {
    fn attach(&self, gpa: Gpa, counter: BorrowedFd) -> bool {
        self.0.attach(gpa, counter)
    }

    fn detach(&self, gpa: Gpa, counter: BorrowedFd) {
        self.0.detach(gpa, counter);
    }
}

/// What firmware leaves behind on the bootstrap processor: virtual wire mode, LINT0 from the PIC and LINT1 NMI
/// (MultiProcessor Specification 3.6.2.2).
pub(crate) fn set_virtual_wire(state: &mut KernelState) {
    const SPURIOUS: usize = 0xf0;
    const LINT0: usize = 0x350;
    const LINT1: usize = 0x360;
    for (register, value) in [(SPURIOUS, 0x1ff_u32), (LINT0, 0x700), (LINT1, 0x400)] {
        state.apic[register..register + 4].copy_from_slice(&value.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pic_reaches_the_bootstrap_processor() {
        struct Deaf;
        impl LocalApics for Deaf {
            fn message(&self, _address: u64, _data: u32) -> bool {
                false
            }
            fn route(&self, _pin: usize, _message: Option<(u64, u32)>) {}
        }
        let bootstrap = Arc::new(Signal::default());
        let chips = KernelApics { apics: Arc::new(Deaf), bootstrap: Arc::clone(&bootstrap) };
        assert!(!chips.message(0xfee0_0000, 0x40));
        chips.pic_pending();
        assert_eq!(bootstrap.pending(), Signals::INTERRUPT);
    }

    #[test]
    fn firmware_leaves_virtual_wire_mode_behind() {
        let apic = Box::new([0; 1024]);
        let mut state = KernelState { apic_base: 0, apic, waits_for_startup: false, event: None, msrs: Vec::new() };
        set_virtual_wire(&mut state);
        assert_eq!((state.apic[0xf1], state.apic[0x351], state.apic[0x361]), (1, 7, 4));
    }
}
