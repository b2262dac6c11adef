//! The engine on `/dev/kvm`. So far it only looks whether the host could run one: [`probe`].
//!
//! Neighbours: `machine` asks before it chooses an engine, and tells the user what was found.
#![allow(unsafe_code)] // the fence: system calls the host crates have no safe form of

use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::path::Path;

use engine::Error;

const DEVICE: &str = "/dev/kvm";
/// `KVM_GET_API_VERSION` (Linux, include/uapi/linux/kvm.h): `_IO(0xAE, 0x00)`, no argument.
const KVM_GET_API_VERSION: libc::c_ulong = 0xae00;
/// The only version there is since Linux 2.6.22.
const API_VERSION: libc::c_int = 12;

/// Looks whether this host offers KVM to us.
///
/// # Errors
/// [`Error::Unusable`] with what is missing and what to do.
pub fn probe() -> Result<(), Error> {
    probe_at(Path::new(DEVICE))
}

fn probe_at(path: &Path) -> Result<(), Error> {
    let unusable = |reason| Error::Unusable { engine: "kvm", reason };
    let name = path.display();
    let device = OpenOptions::new().read(true).write(true).open(path).map_err(|error| {
        unusable(match error.kind() {
            std::io::ErrorKind::NotFound => format!("there is no {name}; load the host's kvm module"),
            std::io::ErrorKind::PermissionDenied => format!("no permission for {name}; join its group"),
            _ => format!("{name} cannot be opened: {error}"),
        })
    })?;
    // SAFETY: the descriptor is open, and the call takes no pointer.
    let version = unsafe { libc::ioctl(device.as_raw_fd(), KVM_GET_API_VERSION, 0) };
    match version {
        API_VERSION => Ok(()),
        -1 => Err(unusable(format!("{name} is not KVM: {}", std::io::Error::last_os_error()))),
        other => {
            Err(unusable(format!("{name} speaks API version {other}, not {API_VERSION}; update the host's kernel")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        let reason = |path: &str| probe_at(Path::new(path)).unwrap_err().to_string();
        assert_eq!(
            reason("/no/such/kvm"),
            "the kvm engine is not usable here: there is no /no/such/kvm; load the host's kvm module"
        );
        assert!(reason("/dev/null").contains("/dev/null is not KVM"));
    }
}
