//! What the VM page says, read as of one moment by whoever can load its words: a kernel from its own memory, user space
//! from the contract device.

use core::mem::offset_of;

use super::pages::{VmPage, vm_state};
use crate::seqlock;

/// What holds between the VM and its host, of one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// Moves with each revocation.
    pub epoch: u64,
    /// Features that can be accepted.
    pub offered: u64,
    /// Features that are honoured.
    pub accepted: u64,
    /// Accepted features that the host wants back.
    pub revoking: u64,
    /// Changes when the VM's state is used a second time; zero where `generation` is not accepted.
    pub generation: [u8; 16],
    /// Nanoseconds since 1970-01-01 UTC when the VM's clock was zero.
    pub wall_ns: u64,
    /// The host has waited too long for an acknowledgement.
    pub overdue: bool,
}

impl Terms {
    /// Reads them from a [`VmPage`], whose words of 4 and 8 bytes are loaded by their offsets, each in one access. `None`
    /// where the host was writing: it writes a few words at a time.
    pub fn read(load4: impl Fn(usize) -> u32, load8: impl Fn(usize) -> u64) -> Option<Self> {
        let body = || {
            let id = offset_of!(VmPage, generation);
            let mut generation = [0; 16];
            for (half, at) in generation.chunks_exact_mut(8).zip([id, id + 8]) {
                half.copy_from_slice(&load8(at).to_le_bytes());
            }
            Self {
                epoch: load8(offset_of!(VmPage, epoch)),
                offered: load8(offset_of!(VmPage, offered)),
                accepted: load8(offset_of!(VmPage, accepted)),
                revoking: load8(offset_of!(VmPage, revoking)),
                generation,
                wall_ns: load8(offset_of!(VmPage, wall_ns)),
                overdue: load4(offset_of!(VmPage, state)) & vm_state::REVOKE_OVERDUE != 0,
            }
        };
        seqlock::read(|| load4(offset_of!(VmPage, version)), body)
    }
}

#[cfg(test)]
mod tests {
    use core::cell::Cell;

    use super::*;
    use zerocopy::{FromZeros, IntoBytes};

    fn read(page: &VmPage, version: impl Fn() -> u32) -> Option<Terms> {
        let bytes = page.as_bytes();
        let load4 = |at: usize| match at {
            0 => version(),
            _ => u32::from_le_bytes(*bytes[at..].first_chunk().unwrap()),
        };
        Terms::read(load4, |at| u64::from_le_bytes(*bytes[at..].first_chunk().unwrap()))
    }

    #[test]
    fn terms_are_those_of_the_page_and_of_one_moment() {
        let mut page = VmPage::new_zeroed();
        (page.epoch, page.offered, page.accepted, page.revoking, page.wall_ns) = (5, 7, 6, 2, 9);
        page.generation = core::array::from_fn(|index| index as u8 + 1);
        let mut expected = Terms {
            epoch: 5,
            offered: 7,
            accepted: 6,
            revoking: 2,
            generation: page.generation,
            wall_ns: 9,
            overdue: false,
        };
        page.state = vm_state::REVOKING;
        assert_eq!(read(&page, || 4), Some(expected));
        (page.state, expected.overdue) = (vm_state::REVOKING | vm_state::REVOKE_OVERDUE, true);
        assert_eq!(read(&page, || 4), Some(expected));
        assert_eq!(read(&page, || 7), None, "the host is writing");
        let looks = Cell::new(0);
        assert_eq!(read(&page, || 2 * looks.replace(looks.get() + 1)), None, "the host has written meanwhile");
    }
}
