//! Stores that only count: the host's kernel adds them up in an eventfd and goes on with the guest (`KVM_IOEVENTFD`).

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use engine::Doorbells;
use kvm_bindings::kvm_ioeventfd_flag_nr_deassign;
use memory::Gpa;

use crate::kvm::Vm;
use crate::sys;

/// The VM's doorbells. Without a length, so that the address alone decides: the store is not even decoded.
pub(crate) struct KernelDoorbells(pub(crate) Arc<Vm>);

impl Doorbells for KernelDoorbells {
    fn attach(&self, gpa: Gpa, counter: BorrowedFd) -> bool {
        let attached = sys::ioeventfd(&self.0.fd, gpa.0, counter, 0);
        attached.inspect_err(|error| tracing::debug!("KVM refuses a doorbell at {gpa}: {error}")).is_ok()
    }

    fn detach(&self, gpa: Gpa, counter: BorrowedFd) {
        if let Err(error) = sys::ioeventfd(&self.0.fd, gpa.0, counter, 1 << kvm_ioeventfd_flag_nr_deassign) {
            tracing::debug!("KVM had no doorbell at {gpa}: {error}");
        }
    }
}
