//! Which pages a guest has written: the host kernel's log, a bit a page.
//!
//! Only what vCPUs wrote is in it. What devices write goes through `memory`, which whoever moves a machine has to ask, too.

use engine::Error;
use memory::{Gpa, PAGE_SIZE};

use crate::kvm::Kvm;

/// What of one piece of RAM was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyPages {
    /// Where the piece starts.
    pub start: Gpa,
    /// A bit a page, the first page lowest.
    pub bits: Vec<u64>,
}

impl DirtyPages {
    /// The pages written.
    pub fn pages(&self) -> impl Iterator<Item = Gpa> + '_ {
        let set = |(word, bits): (usize, &u64)| {
            let bits = *bits;
            (0..64_u64).filter(move |bit| bits >> bit & 1 != 0).map(move |bit| word as u64 * 64 + bit)
        };
        self.bits.iter().enumerate().flat_map(set).map(|page| Gpa(self.start.0 + page * PAGE_SIZE))
    }
}

impl Kvm {
    /// Starts or ends the log; it starts empty.
    ///
    /// # Errors
    /// [`Error::Host`] where the host refuses.
    pub fn log_dirty_pages(&self, on: bool) -> Result<(), Error> {
        self.vm.place_memory(on)
    }

    /// What was written since the log was started or last taken.
    ///
    /// # Errors
    /// [`Error::Host`] where the log is not on.
    pub fn take_dirty_pages(&self) -> Result<Vec<DirtyPages>, Error> {
        let take = |(slot, region): (u32, &memory::Region)| {
            let bits = self.vm.fd.get_dirty_log(slot, region.bytes as usize);
            let bits = bits.map_err(|error| Error::Host { what: "the log of dirty pages", source: error.into() })?;
            Ok(DirtyPages { start: region.start, bits })
        };
        (0..).zip(self.vm.ram.regions()).map(take).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_pages() {
        let dirty = DirtyPages { start: Gpa(0x10_0000), bits: vec![0, 1 | 1 << 63] };
        assert_eq!(dirty.pages().collect::<Vec<_>>(), [Gpa(0x14_0000), Gpa(0x17_f000)]);
    }
}
