//! The calls that `kvm-ioctls` does not have (Linux, include/uapi/linux/kvm.h).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, kvm_device_attr, kvm_interrupt, kvm_ioeventfd, kvm_sregs2};

/// The number of a call: direction, size of what it takes, KVM's letter AEh, its own number.
const fn call(direction: u64, size: usize, number: u64) -> libc::c_ulong {
    direction << 30 | (size as u64) << 16 | 0xae << 8 | number
}

const NONE: u64 = 0;
const WRITE: u64 = 1;
const READ: u64 = 2;

const KVM_INTERRUPT: libc::c_ulong = call(WRITE, size_of::<kvm_interrupt>(), 0x86);
const KVM_IOEVENTFD: libc::c_ulong = call(WRITE, size_of::<kvm_ioeventfd>(), 0x79);
const KVM_GET_SREGS2: libc::c_ulong = call(READ, size_of::<kvm_sregs2>(), 0xcc);
const KVM_SET_SREGS2: libc::c_ulong = call(WRITE, size_of::<kvm_sregs2>(), 0xcd);
const KVM_SET_DEVICE_ATTR: libc::c_ulong = call(WRITE, size_of::<kvm_device_attr>(), 0xe1);
const KVM_GET_DEVICE_ATTR: libc::c_ulong = call(WRITE, size_of::<kvm_device_attr>(), 0xe2);
const KVM_GET_STATS_FD: libc::c_ulong = call(NONE, 0, 0xce);

fn result(returned: libc::c_int) -> io::Result<libc::c_int> {
    if returned < 0 { Err(io::Error::last_os_error()) } else { Ok(returned) }
}

/// Hands a vCPU the vector of an interrupt from the PIC.
pub(crate) fn interrupt(vcpu: &impl AsRawFd, vector: u8) -> io::Result<()> {
    let interrupt = kvm_interrupt { irq: vector.into() };
    // SAFETY: the call reads a structure of the size that is part of its number.
    result(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_INTERRUPT, &raw const interrupt) }).map(drop)
}

/// Has stores to a guest-physical address count in an eventfd, or no longer.
pub(crate) fn ioeventfd(vm: &impl AsRawFd, gpa: u64, counter: BorrowedFd, flags: u32) -> io::Result<()> {
    let event = kvm_ioeventfd { addr: gpa, fd: counter.as_raw_fd(), flags, ..kvm_ioeventfd::default() };
    // SAFETY: as in `interrupt`; the kernel takes a reference of its own to the descriptor's file.
    result(unsafe { libc::ioctl(vm.as_raw_fd(), KVM_IOEVENTFD, &raw const event) }).map(drop)
}

/// Segments, control registers and PAE pointer entries.
pub(crate) fn sregs(vcpu: &impl AsRawFd) -> io::Result<kvm_sregs2> {
    let mut sregs = kvm_sregs2::default();
    // SAFETY: the call fills a structure of the size that is part of its number.
    result(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_GET_SREGS2, &raw mut sregs) }).map(|_| sregs)
}

/// Replaces them.
pub(crate) fn set_sregs(vcpu: &impl AsRawFd, sregs: &kvm_sregs2) -> io::Result<()> {
    // SAFETY: as in `interrupt`.
    result(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_SREGS2, &raw const *sregs) }).map(drop)
}

/// A file of counters of this vCPU.
pub(crate) fn stats(vcpu: &impl AsRawFd) -> io::Result<OwnedFd> {
    // SAFETY: the call takes no argument.
    let fd = result(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_GET_STATS_FD, 0) })?;
    // SAFETY: a descriptor made just now, that nobody else knows.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What a vCPU's time-stamp counter is ahead of the host's (Linux, Documentation/virt/kvm/devices/vcpu.rst, 4.1).
pub(crate) fn tsc_offset(vcpu: &impl AsRawFd) -> io::Result<u64> {
    let mut offset = 0_u64;
    let attribute = tsc_attribute(&raw mut offset);
    // SAFETY: the call reads the attribute and writes the eight bytes it names, which live through the call.
    result(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_GET_DEVICE_ATTR, &raw const attribute) }).map(|_| offset)
}

/// Sets that.
pub(crate) fn set_tsc_offset(vcpu: &impl AsRawFd, mut offset: u64) -> io::Result<()> {
    let attribute = tsc_attribute(&raw mut offset);
    // SAFETY: the call reads the attribute and the eight bytes it names, which live through the call.
    result(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_DEVICE_ATTR, &raw const attribute) }).map(drop)
}

fn tsc_attribute(value: *mut u64) -> kvm_device_attr {
    let addr = value as u64;
    kvm_device_attr { group: KVM_VCPU_TSC_CTRL, attr: KVM_VCPU_TSC_OFFSET.into(), addr, flags: 0 }
}
