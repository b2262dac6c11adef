//! Random bytes.

/// Where a VM takes random bytes from.
pub trait Entropy: Send + Sync {
    /// Fills `buffer` with random bytes.
    ///
    /// # Errors
    /// What the host said where it has none to give.
    fn fill(&self, buffer: &mut [u8]) -> std::io::Result<()>;
}

/// The host kernel's generator (`getrandom(2)`).
#[derive(Clone, Copy, Debug, Default)]
pub struct HostEntropy;

impl Entropy for HostEntropy {
    fn fill(&self, buffer: &mut [u8]) -> std::io::Result<()> {
        getrandom::fill(buffer).map_err(std::io::Error::other)
    }
}
