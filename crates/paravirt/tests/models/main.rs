//! Models of what has to be right under any preemption: loom runs every interleaving of the threads of a model, with the
//! memory orderings that the code asks for.
//!
//! The modules under test are the sources of the crate, of the contract and of the guest kit, compiled here with loom's
//! types in the place of the standard library's. Each model has a mutation beside it, a step left out or made too early,
//! that it must catch: a model that catches nothing shows nothing.

// Parts of the modules that no model uses, and what is public there.
#![allow(dead_code, unreachable_pub)]

/// What `src/sync.rs` takes from the standard library.
mod sync {
    pub(crate) use loom::sync::atomic::{AtomicU64, Ordering, fence};
    pub(crate) use loom::sync::{Mutex, MutexGuard};
    pub(crate) use std::sync::PoisonError;
}

#[path = "../../../contract/src/seqlock.rs"]
mod reader;

#[path = "../../src/native/agreement.rs"]
mod agreement;
#[path = "../../src/eoi.rs"]
mod eoi;
#[path = "../../src/seqlock.rs"]
mod seqlock;
#[path = "../../src/native/timers.rs"]
mod timers;
#[path = "../../src/native/wait.rs"]
mod wait;

mod end_in_memory;
mod locks;
mod pages;
mod revocation;
mod timer_merge;
mod waiting;

/// True where the model fails in one of its interleavings.
fn fails(model: impl Fn() + Sync + Send + 'static) -> bool {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {})); // what is expected is not worth a backtrace
    let failed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| loom::model(model))).is_err();
    std::panic::set_hook(hook);
    failed
}
