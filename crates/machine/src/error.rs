//! Why a machine could not be made or run.

/// Every message says what was wrong and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A value in the plan.
    #[error(transparent)]
    Plan(#[from] crate::plan::Invalid),
    /// The kernel, the initial RAM disk or a module.
    #[error(transparent)]
    Boot(#[from] crate::boot::Error),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// The CPU engine.
    #[error(transparent)]
    Engine(#[from] engine::Error),
}
