//! MSI-X: one function's table of messages, its masks and its pending bits (PCI 3.0, 6.8.2).
//!
//! ```text
//!   signal(v) ── disabled ──> nothing          unmask (entry or function) with bit pending ──> message, bit clears
//!             ── masked ────> pending bit v
//!             ── else ──────> message
//! ```
//!
//! A message is a memory write: while the function is no bus master, all vectors are as if masked.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Bar, BarKind, Capability};
use crate::interrupt::InterruptSink;

/// Capability ID of MSI-X.
const ID: u8 = 0x11;
/// Bytes of a table entry: message address, upper address, data, vector control.
const ENTRY: usize = 16;
/// Vector control: this vector is masked.
const MASKED: u32 = 1;
/// Message control: MSI-X is on.
const CONTROL_ENABLE: u16 = 1 << 15;
/// Message control: all vectors are masked.
const CONTROL_FUNCTION_MASK: u16 = 1 << 14;

struct State {
    enabled: bool,
    function_masked: bool,
    bus_master: bool,
    table: Vec<[u8; ENTRY]>,
    pending: Vec<u64>,
}

impl State {
    fn field(&self, vector: usize, index: usize) -> u32 {
        let entry = &self.table[vector][4 * index..4 * index + 4];
        u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]])
    }

    fn message(&self, vector: usize) -> (u64, u32) {
        (u64::from(self.field(vector, 1)) << 32 | u64::from(self.field(vector, 0)), self.field(vector, 2))
    }

    fn deliverable(&self, vector: usize) -> bool {
        self.enabled && self.bus_master && !self.function_masked && self.field(vector, 3) & MASKED == 0
    }

    /// Takes the pending messages that nothing holds back any more.
    fn take_released(&mut self) -> Vec<(u64, u32)> {
        let mut released = Vec::new();
        for vector in 0..self.table.len() {
            let (word, bit) = (vector / 64, 1 << (vector % 64));
            if self.pending[word] & bit != 0 && self.deliverable(vector) {
                self.pending[word] &= !bit;
                released.push(self.message(vector));
            }
        }
        released
    }
}

/// The MSI-X half of a function: shared by its configuration space, its BAR and whoever raises its interrupts.
pub(super) struct Msix {
    state: Mutex<State>,
    sink: Arc<dyn InterruptSink>,
    bar: u8,
}

impl Msix {
    /// `vectors` entries, all masked, disabled.
    pub(super) fn new(bar: u8, vectors: u16, sink: Arc<dyn InterruptSink>) -> Self {
        let mut entry = [0; ENTRY];
        entry[12] = MASKED as u8;
        let state = State {
            enabled: false,
            function_masked: false,
            bus_master: false,
            table: vec![entry; vectors.into()],
            pending: vec![0; usize::from(vectors).div_ceil(64)],
        };
        Self { state: Mutex::new(state), sink, bar }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn vectors(&self) -> usize {
        self.lock().table.len()
    }

    fn pba_offset(&self) -> usize {
        (self.vectors() * ENTRY).next_multiple_of(0x800)
    }

    /// The BAR that table and PBA live in.
    pub(super) fn bar(&self) -> Bar {
        let bytes = self.pba_offset() + self.vectors().div_ceil(64) * 8;
        Bar { index: self.bar, kind: BarKind::Memory32, size: bytes.next_power_of_two().max(0x1000) as u64 }
    }

    /// The capability; message control is its first word.
    pub(super) fn capability(&self) -> Capability {
        let mut body = ((self.vectors() - 1) as u16).to_le_bytes().to_vec();
        body.extend(u32::from(self.bar).to_le_bytes());
        body.extend((self.pba_offset() as u32 | u32::from(self.bar)).to_le_bytes());
        Capability { id: ID, body, writable: (CONTROL_ENABLE | CONTROL_FUNCTION_MASK).to_le_bytes().to_vec() }
    }

    /// The guest wrote message control, or made the function a bus master or none.
    pub(super) fn set_control(&self, control: u16, bus_master: bool) {
        let mut state = self.lock();
        state.bus_master = bus_master;
        state.enabled = control & CONTROL_ENABLE != 0;
        state.function_masked = control & CONTROL_FUNCTION_MASK != 0;
        let released = state.take_released();
        drop(state);
        self.send(&released);
    }

    /// True while the guest uses MSI-X rather than INTx.
    pub(super) fn is_enabled(&self) -> bool {
        self.lock().enabled
    }

    /// Raises `vector`: now, or once it is unmasked.
    pub(super) fn signal(&self, vector: u16) {
        let mut state = self.lock();
        let vector = usize::from(vector);
        if !state.enabled || vector >= state.table.len() {
            return;
        }
        if state.deliverable(vector) {
            let message = state.message(vector);
            drop(state);
            self.send(&[message]);
        } else {
            state.pending[vector / 64] |= 1 << (vector % 64);
        }
    }

    fn send(&self, messages: &[(u64, u32)]) {
        for &(address, data) in messages {
            self.sink.message(address, data);
        }
    }

    /// A load from the BAR.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        let pba = self.pba_offset();
        let state = self.lock();
        for (at, byte) in (offset as usize..).zip(data) {
            *byte = if let Some(entry) = state.table.get(at / ENTRY) {
                entry[at % ENTRY]
            } else {
                let pending = at.checked_sub(pba).and_then(|at| Some((state.pending.get(at / 8)?, at % 8)));
                pending.map_or(0, |(word, byte)| word.to_le_bytes()[byte])
            };
        }
    }

    /// A store to the BAR. Only whole, aligned 4- and 8-byte stores to the table are defined; others are dropped.
    pub(super) fn write(&self, offset: u64, data: &[u8]) {
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len() as u64) {
            return;
        }
        let mut state = self.lock();
        let at = offset as usize;
        let Some(entry) = state.table.get_mut(at / ENTRY) else { return };
        entry[at % ENTRY..at % ENTRY + data.len()].copy_from_slice(data);
        entry[12] &= MASKED as u8;
        entry[13..].fill(0);
        let released = state.take_released();
        drop(state);
        self.send(&released);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interrupt::fixture::Recorder;

    fn entry(address: u64, data: u32, control: u32) -> Vec<u8> {
        [&address.to_le_bytes()[..], &data.to_le_bytes(), &control.to_le_bytes()].concat()
    }

    fn write_entry(msix: &Msix, vector: u64, bytes: &[u8]) {
        msix.write(vector * 16, &bytes[..8]);
        msix.write(vector * 16 + 8, &bytes[8..]);
    }

    #[test]
    fn masked_vectors_pend_and_are_delivered_once_on_unmask() {
        let recorder = Arc::new(Recorder::default());
        let msix = Msix::new(1, 70, recorder.clone());
        msix.signal(0);
        assert!(recorder.messages().is_empty(), "nothing while MSI-X is off");
        msix.set_control(CONTROL_ENABLE, true);
        write_entry(&msix, 69, &entry(0xfee0_1000, 0x41, 1));
        write_entry(&msix, 2, &entry(0x1_fee0_0000, 0x42, 0));

        msix.signal(69);
        msix.signal(69);
        msix.signal(2);
        assert_eq!(recorder.messages(), [(0x1_fee0_0000, 0x42)]);
        let pba = msix.pba_offset() as u64;
        let mut word = [0; 8];
        msix.read(pba + 8, &mut word);
        assert_eq!(u64::from_le_bytes(word), 1 << 5);

        msix.set_control(CONTROL_ENABLE | CONTROL_FUNCTION_MASK, true);
        msix.write(69 * 16 + 12, &[0; 4]);
        msix.signal(2);
        assert_eq!(recorder.messages().len(), 0, "the function mask holds all back");
        msix.set_control(CONTROL_ENABLE, true);
        assert_eq!(recorder.messages(), [(0x1_fee0_0000, 0x42), (0xfee0_1000, 0x41)]);
        msix.read(pba + 8, &mut word);
        assert_eq!(word, [0; 8]);
        msix.signal(70);
        assert!(recorder.messages().is_empty(), "a vector that is not there");

        msix.set_control(CONTROL_ENABLE, false);
        msix.signal(2);
        assert!(recorder.messages().is_empty(), "no bus master, no message");
        msix.set_control(CONTROL_ENABLE, true);
        assert_eq!(recorder.messages(), [(0x1_fee0_0000, 0x42)]);
    }

    #[test]
    fn table_reads_back_and_reserved_control_bits_stay_zero() {
        let msix = Msix::new(1, 2, Arc::new(Recorder::default()));
        let mut bytes = [0; 16];
        msix.read(0, &mut bytes);
        assert_eq!(bytes[12], 1, "masked after reset");
        write_entry(&msix, 1, &entry(0x1122_3344_5566_7788, 0x99, u32::MAX));
        msix.write(16, &[0xff; 2]);
        msix.read(16, &mut bytes);
        assert_eq!(bytes[..], entry(0x1122_3344_5566_7788, 0x99, 1)[..]);
        msix.write(msix.pba_offset() as u64, &[0xff; 8]);
        let mut pending = [0xaa; 8];
        msix.read(msix.pba_offset() as u64, &mut pending);
        assert_eq!(pending, [0; 8], "the PBA is read-only");
    }
}
