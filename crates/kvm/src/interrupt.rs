//! Local APICs in the host's kernel: messages to them, and which vectors' ends they tell.

use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_msi, kvm_irq_routing_msi__bindgen_ty_1, kvm_msi,
};

use crate::kvm::Vm;

/// Pins of the machine's I/O APIC, which the kernel keeps routes for.
pub(crate) const IO_APIC_PINS: usize = 24;

/// An MSI's address and data.
type Message = (u64, u32);

/// The VM's local APICs.
pub(crate) struct KernelApics {
    vm: Arc<Vm>,
    /// What each pin of the I/O APIC sends, where that is level-triggered.
    routes: Mutex<[Option<Message>; IO_APIC_PINS]>,
}

impl KernelApics {
    pub(crate) fn new(vm: Arc<Vm>) -> Self {
        Self { vm, routes: Mutex::default() }
    }
}

impl engine::LocalApics for KernelApics {
    fn message(&self, address: u64, data: u32) -> bool {
        let (address_lo, address_hi) = halves(address);
        let msi = kvm_msi { address_lo, address_hi, data, ..kvm_msi::default() };
        match self.vm.fd.signal_msi(msi) {
            Ok(accepted) => accepted > 0,
            Err(error) => {
                tracing::debug!("KVM refuses the message {data:#x} to {address:#x}: {error}");
                false
            }
        }
    }

    fn route(&self, pin: usize, message: Option<Message>) {
        // Held across the call, so that of two changes the later one is the kernel's, too.
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(route) = routes.get_mut(pin) else { return };
        if std::mem::replace(route, message) == message {
            return;
        }
        let table = KvmIrqRouting::from_entries(&entries(&*routes));
        let set = table
            .map_err(|error| error.to_string())
            .and_then(|table| self.vm.fd.set_gsi_routing(&table).map_err(|error| error.to_string()));
        if let Err(error) = set {
            tracing::warn!("KVM does not take the route of pin {pin}: {error}; its interrupt may come once only");
        }
    }
}

fn halves(address: u64) -> (u32, u32) {
    (address as u32, (address >> 32) as u32)
}

/// The kernel's routing table: entries of the I/O APIC's pins, by which it knows the vectors whose ends are to be told.
fn entries(routes: &[Option<Message>]) -> Vec<kvm_irq_routing_entry> {
    let entry = |(pin, route): (usize, &Option<Message>)| {
        let (address, data) = (*route)?;
        let (address_lo, address_hi) = halves(address);
        let data = kvm_irq_routing_msi {
            address_lo,
            address_hi,
            data,
            __bindgen_anon_1: kvm_irq_routing_msi__bindgen_ty_1 { pad: 0 },
        };
        let u = kvm_irq_routing_entry__bindgen_ty_1 { msi: data };
        Some(kvm_irq_routing_entry {
            gsi: pin as u32,
            type_: KVM_IRQ_ROUTING_MSI,
            u,
            ..kvm_irq_routing_entry::default()
        })
    };
    routes.iter().enumerate().filter_map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_that_send_levels_are_routes() {
        let mut routes = [None; IO_APIC_PINS];
        routes[17] = Some((0xfee0_1000, 0x8031));
        let entries = entries(&routes);
        assert_eq!(entries.len(), 1);
        // SAFETY: the entry's type says that this is the part in use.
        let msi = unsafe { entries[0].u.msi };
        assert_eq!((entries[0].gsi, entries[0].type_, msi.address_lo, msi.data), (17, 2, 0xfee0_1000, 0x8031));
    }
}
