//! How things fail, and the status the process ends with.

use std::fmt;
use std::io;

/// The exit statuses that are ours. `cordial run` otherwise passes the guest's through.
pub mod status {
    /// The guest panicked or triple-faulted.
    pub const GUEST_CRASHED: u8 = 123;
    /// `--timeout` ran out.
    pub const TIMEOUT: u8 = 124;
    /// `run`: the machine could not be set up, or the monitor failed.
    pub const SETUP: u8 = 125;
    /// Other verbs: something failed.
    pub const ERROR: u8 = 1;
    /// Other verbs: wrong usage.
    pub const USAGE: u8 = 2;
    /// Other verbs: no machine of that name runs.
    pub const NO_MACHINE: u8 = 3;
    /// Something outside has to be provided first: a kernel, a permission, an engine.
    pub const PRECONDITION: u8 = 4;
    /// Other verbs: what was waited for did not come in time.
    pub const LATE: u8 = 5;
    /// An audit found something.
    pub const FINDINGS: u8 = 6;
}

/// What kind of failure it is; the verb decides on the status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The user's words are wrong.
    Usage,
    /// Something is missing that the user can provide.
    Precondition,
    /// No machine of that name runs.
    NoMachine,
    /// What was waited for did not come in time.
    Late,
    /// Anything else.
    Other,
}

/// A failure: its kind and the one line the user sees.
#[derive(Debug)]
pub struct Failure {
    /// Its kind.
    pub kind: Kind,
    /// What was wrong, with what, and what to do.
    pub message: String,
}

impl Failure {
    /// Wrong usage.
    pub fn usage(message: impl Into<String>) -> Self {
        Self { kind: Kind::Usage, message: message.into() }
    }

    /// Something to be provided.
    pub fn precondition(message: impl Into<String>) -> Self {
        Self { kind: Kind::Precondition, message: message.into() }
    }

    /// No machine of that name.
    pub fn no_machine(message: impl Into<String>) -> Self {
        Self { kind: Kind::NoMachine, message: message.into() }
    }

    /// Too late.
    pub fn late(message: impl Into<String>) -> Self {
        Self { kind: Kind::Late, message: message.into() }
    }

    /// Anything else.
    pub fn other(message: impl Into<String>) -> Self {
        Self { kind: Kind::Other, message: message.into() }
    }

    /// A failed file operation: `doing` names the file.
    pub fn io(doing: impl fmt::Display, error: &io::Error) -> Self {
        Self::on_disk(doing, error, "free some space on its disk, or name another place")
    }

    /// The same in the cache.
    pub fn cache(doing: impl fmt::Display, error: &io::Error) -> Self {
        Self::on_disk(doing, error, "free some space, or point XDG_CACHE_HOME at another disk")
    }

    fn on_disk(doing: impl fmt::Display, error: &io::Error, where_full: &str) -> Self {
        let full = matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
        let (colon, advice) = if full { (": ", where_full) } else { ("", "") };
        Self::other(format!("cannot {doing}: {error}{colon}{advice}"))
    }

    /// The status `run` ends with.
    pub const fn run_status(&self) -> u8 {
        match self.kind {
            Kind::Precondition => status::PRECONDITION,
            Kind::Usage | Kind::NoMachine | Kind::Late | Kind::Other => status::SETUP,
        }
    }

    /// The status every other verb ends with.
    pub const fn verb_status(&self) -> u8 {
        match self.kind {
            Kind::Usage => status::USAGE,
            Kind::Precondition => status::PRECONDITION,
            Kind::NoMachine => status::NO_MACHINE,
            Kind::Late => status::LATE,
            Kind::Other => status::ERROR,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_told_with_what_helps_there() {
        let full = io::Error::from(io::ErrorKind::StorageFull);
        let file = Failure::io("write out.json", &full).message;
        assert_eq!(file, "cannot write out.json: no storage space: free some space on its disk, or name another place");
        let cache = Failure::cache("use the cache /c", &full).message;
        assert!(
            cache.starts_with("cannot use the cache /c: ")
                && cache.ends_with("or point XDG_CACHE_HOME at another disk")
        );
        let other = Failure::io("write out.json", &io::ErrorKind::NotFound.into()).message;
        assert_eq!(other, "cannot write out.json: entity not found");
    }
}
