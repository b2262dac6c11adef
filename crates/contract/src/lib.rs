//! The words guest and hypervisor share: numbers and layouts only, no behaviour, so that both sides can read them.
//!
//! One module a dialect. The host's half of the behaviour is the `paravirt` crate; the guest's is the guest kit, or the
//! guest operating system's own.

#![no_std]

pub mod kvm;
pub mod native;
