//! The words guest and hypervisor share: numbers, layouts, and how a guest reads what belongs together. No behaviour else,
//! so that both sides can read them.
//!
//! One module a dialect. The host's half of the behaviour is the `paravirt` crate; the guest's is the guest kit, or the
//! guest operating system's own.

#![no_std]

pub mod kvm;
pub mod native;
pub mod seqlock;

/// What modules that are also model-checked take from the core library.
mod sync {
    pub(crate) use core::sync::atomic::{Ordering, fence};
}
