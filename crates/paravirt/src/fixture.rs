//! What the tests of both dialects have in the place of local APICs.

use std::sync::Mutex;

use crate::Interrupts;

/// The local APIC that accepts nothing that is sent to it.
pub(crate) const DEAF: u32 = 2;

/// What reached local APICs.
#[derive(Default)]
pub(crate) struct Record {
    raised: Mutex<Vec<(u32, u8)>>,
    sent: Mutex<Vec<(u32, u32)>>,
    ended: Mutex<Vec<u32>>,
}

impl Record {
    /// vCPUs and vectors, since this was last asked.
    pub(crate) fn raised(&self) -> Vec<(u32, u8)> {
        std::mem::take(&mut self.raised.lock().unwrap())
    }

    /// vCPUs and interrupt commands, since this was last asked.
    pub(crate) fn sent(&self) -> Vec<(u32, u32)> {
        std::mem::take(&mut self.sent.lock().unwrap())
    }

    /// vCPUs whose interrupt in service has ended, since this was last asked.
    pub(crate) fn ended(&self) -> Vec<u32> {
        std::mem::take(&mut self.ended.lock().unwrap())
    }
}

impl Interrupts for Record {
    fn raise(&self, vcpu: u32, vector: u8) {
        self.raised.lock().unwrap().push((vcpu, vector));
    }

    fn send(&self, vcpu: u32, command: u32) -> bool {
        self.sent.lock().unwrap().push((vcpu, command));
        vcpu != DEAF
    }

    fn end(&self, vcpu: u32) {
        self.ended.lock().unwrap().push(vcpu);
    }
}
