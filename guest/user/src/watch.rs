//! Who watches for revocations: user space has no interrupt for them, but looking costs no exit.

use crate::{Device, Error, Terms};

/// Something that has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The host wants these back: move off them, then [`Device::acknowledge`] the epoch.
    Revoking {
        /// The features.
        features: u64,
        /// What to acknowledge.
        epoch: u64,
    },
    /// These are no longer honoured.
    Gone(u64),
    /// This is another copy of the VM than the last time.
    Generation([u8; 16]),
}

/// Remembers what was seen.
#[derive(Clone, Copy, Debug)]
pub struct Watcher(Terms);

impl Watcher {
    /// Watches from now on.
    ///
    /// # Errors
    /// [`Error::Torn`].
    pub fn new(device: &Device) -> Result<Self, Error> {
        device.terms().map(|mut terms| {
            // What is being revoked already is news, too.
            terms.revoking = 0;
            Self(terms)
        })
    }

    /// What has changed since the last look. No exit.
    ///
    /// # Errors
    /// [`Error::Torn`].
    pub fn look(&mut self, device: &Device) -> Result<Vec<Change>, Error> {
        let now = device.terms()?;
        let before = std::mem::replace(&mut self.0, now);
        let mut changes = Vec::new();
        let gone = before.accepted & !now.accepted;
        if gone != 0 {
            changes.push(Change::Gone(gone));
        }
        if now.revoking != 0 && (now.revoking, now.epoch) != (before.revoking, before.epoch) {
            changes.push(Change::Revoking { features: now.revoking, epoch: now.epoch });
        }
        if now.generation != before.generation && before.generation != [0; 16] && now.generation != [0; 16] {
            changes.push(Change::Generation(now.generation));
        }
        Ok(changes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::tests::Fake;

    #[test]
    fn each_change_is_told_once() {
        let fake = Fake::new("watch");
        let device = fake.open().unwrap();
        let put = |offset, value: u64| fake.put("resource2", offset, &value.to_le_bytes());
        put(8, 1);
        put(0x18, 6);
        put(0x28, 77);
        let mut watcher = Watcher::new(&device).unwrap();
        assert_eq!(watcher.look(&device).unwrap(), []);
        put(8, 2);
        put(0x20, 2);
        assert_eq!(watcher.look(&device).unwrap(), [Change::Revoking { features: 2, epoch: 2 }]);
        assert_eq!(watcher.look(&device).unwrap(), []);
        put(8, 3);
        put(0x20, 6);
        assert_eq!(watcher.look(&device).unwrap(), [Change::Revoking { features: 6, epoch: 3 }]);
        put(0x18, 0);
        put(0x20, 0);
        put(0x28, 78);
        let mut id = [0; 16];
        id[0] = 78;
        assert_eq!(watcher.look(&device).unwrap(), [Change::Gone(6), Change::Generation(id)]);
        assert_eq!(watcher.look(&device).unwrap(), []);
        put(0x20, 2);
        let mut late = Watcher::new(&device).unwrap();
        assert_eq!(late.look(&device).unwrap().len(), 1, "what is being revoked already is told");
    }
}
