//! The native dialect for Linux user space: no kernel patch and no driver, but a PCI function that is mapped.
//!
//! ```text
//!   /sys/bus/pci/devices/*/config      which one it is, where its regions are
//!                         /resource0   registers: each load or store is a call       ─┐
//!                         /resource2   pages that the host writes: loads, no exits   ─┴─> Device
//! ```
//!
//! ```no_run
//! use contract::native::feature;
//!
//! let device = cordial_guest::Device::find()?;
//! device.accept(feature::TIME_OF_DAY | feature::GENERATION)?;
//! let now = device.time_of_day()?;                  // one exit
//! let generation = device.terms()?.generation;      // none
//! # Ok::<(), cordial_guest::Error>(())
//! ```
//!
//! It needs the right to map PCI resources: root. Several programs can use the device at once: no call of one can mix with
//! another's. The specification is docs/contract.md.

mod device;
mod map;
mod watch;

pub use contract::native::{EXIT_CAUSES, Terms, feature};
pub use device::{Device, names};
pub use watch::{Change, Watcher};

use std::path::PathBuf;

/// Why something did not work.
#[derive(Debug)]
pub enum Error {
    /// No PCI function here is a contract device: this is no guest of Cordial's, or one without (`--dialect kvm,cordial`).
    NoDevice,
    /// It speaks another version of the dialect.
    Version {
        /// Which, major << 16 | minor.
        found: u32,
    },
    /// A file of its could not be used.
    File {
        /// Which.
        path: PathBuf,
        /// What the kernel said. Mapping a device's memory is for root.
        source: std::io::Error,
    },
    /// The host did not agree: a feature is not offered, is being revoked, or is not for user space.
    NotAccepted {
        /// What of it is not.
        features: u64,
    },
    /// The host refused a call, with a status of the dialect's.
    Refused {
        /// It.
        status: i64,
    },
    /// The page was never at rest: nobody writes it that often.
    Torn,
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NoDevice => f.write_str("no contract device: start the machine with --dialect kvm,cordial"),
            Self::Version { found } => {
                write!(f, "the contract device speaks version {}.{}", found >> 16, found & 0xffff)
            }
            Self::File { path, source } => write!(f, "{}: {source}", path.display()),
            Self::NotAccepted { features } => write!(f, "the host does not agree to {}", names(*features).join(", ")),
            Self::Refused { status } => match *status {
                contract::native::status::NOT_ACCEPTED => f.write_str("the feature is not accepted, or no longer"),
                contract::native::status::TOO_OFTEN => f.write_str("more often than the host allows"),
                other => write!(f, "the host refused the call (status {other})"),
            },
            Self::Torn => f.write_str("the VM page was never at rest"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::File { source, .. } => Some(source),
            _ => None,
        }
    }
}
