//! How the engine is to work, as pure data.

/// Least bytes of a code cache that are worth having.
pub const LEAST_CODE_CACHE: u64 = 64 << 10;
/// Most bytes of a code cache: jumps inside it reach 2 GiB, and nobody needs half of that.
pub const MOST_CODE_CACHE: u64 = 1 << 30;

/// Settings of the engine, the same for all vCPUs of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Bytes of translated code that each vCPU keeps; brought into the range of [`LEAST_CODE_CACHE`] and
    /// [`MOST_CODE_CACHE`].
    pub code_cache: u64,
    /// What the engine checks of itself.
    pub check: Check,
    /// Translate; otherwise everything is interpreted.
    pub translate: bool,
    /// Translated code counts the instructions it runs ([`engine::ledger::Work::NativeInstructions`]); it is slower then.
    pub count: bool,
    /// Trap and emulate: each sensitive instruction of a kernel is an exit to the monitor, counted by its cause.
    pub classic: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self { code_cache: 64 << 20, check: Check::Off, translate: true, count: false, classic: false }
    }
}

/// What the engine checks of itself while it runs a guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Check {
    /// Nothing.
    #[default]
    Off,
    /// Each translated block, each time it runs, against the interpreter.
    Lockstep,
}
