//! What modules that are also model-checked take from the standard library. The models in `tests/models.rs` compile the
//! same modules with loom's types in the place of these.

pub(crate) use std::sync::atomic::{AtomicU64, Ordering, fence};
pub(crate) use std::sync::{Mutex, MutexGuard, PoisonError};
