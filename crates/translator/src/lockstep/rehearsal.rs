//! A rehearsal: the interpreter runs instructions whose stores can be taken back.
//!
//! While it lasts, no store finds its page in the soft TLB, so that all of them come by here; nothing is filled in; and
//! what cannot be taken back (a device's registers, code that is overwritten) ends it.

use memory::{Gpa, GuestRam};

use crate::cpu::Cpu;

/// One store.
#[derive(Clone, Copy, Debug)]
struct Write {
    gpa: Gpa,
    bytes: u8,
    /// Where its bytes stand in the lists.
    at: u32,
}

impl Write {
    fn range(&self) -> std::ops::Range<usize> {
        self.at as usize..self.at as usize + usize::from(self.bytes)
    }
}

/// The stores of a rehearsal.
#[derive(Default)]
pub(crate) struct Rehearsal {
    writes: Vec<Write>,
    /// What each found. Where stores overlap, a later one finds what an earlier one left.
    old: Vec<u8>,
    /// What was there before the first, and what they came to.
    before: Vec<u8>,
    new: Vec<u8>,
}

/// Bytes of RAM that differ: the address, then what was there before, after the interpreter, after the translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Memory {
    pub gpa: Gpa,
    pub before: u8,
    pub interpreter: u8,
    pub translator: u8,
}

impl Rehearsal {
    fn note(&mut self, ram: &GuestRam, gpa: Gpa, bytes: u64) {
        let at = self.old.len();
        self.old.resize(at + bytes as usize, 0);
        // A store that is about to be made lies in RAM: that has been found out.
        let _ = ram.read(gpa, &mut self.old[at..]);
        self.writes.push(Write { gpa, bytes: bytes as u8, at: at as u32 });
    }

    /// Takes the stores back, after noting what they came to.
    pub(super) fn undo(&mut self, ram: &GuestRam) {
        self.new = self.held(ram);
        self.restore(ram);
        self.before = self.held(ram);
    }

    /// Puts back what was there before, the last store's first.
    pub(super) fn restore(&self, ram: &GuestRam) {
        for write in self.writes.iter().rev() {
            let range = write.range();
            let done = ram.write(write.gpa, &self.old[range]);
            debug_assert!(done.is_ok(), "it was RAM when it was read");
        }
    }

    /// Makes RAM hold what [`Rehearsal::held`] found.
    pub(super) fn redo(&self, ram: &GuestRam, held: &[u8]) {
        for write in &self.writes {
            let range = write.range();
            let done = ram.write(write.gpa, &held[range]);
            debug_assert!(done.is_ok(), "it was RAM when it was read");
        }
    }

    /// What RAM holds now, in the order of the stores.
    pub(super) fn held(&self, ram: &GuestRam) -> Vec<u8> {
        let mut held = vec![0; self.old.len()];
        for write in &self.writes {
            let range = write.range();
            let _ = ram.read(write.gpa, &mut held[range]);
        }
        held
    }

    /// Where `ours` and `theirs`, both in the order of the stores, differ.
    pub(super) fn compare(&self, ours: &[u8], theirs: &[u8]) -> Vec<Memory> {
        let mut differences = Vec::new();
        for write in &self.writes {
            for offset in 0..usize::from(write.bytes) {
                let at = write.at as usize + offset;
                let gpa = Gpa(write.gpa.0 + offset as u64);
                if ours[at] != theirs[at] && !differences.iter().any(|known: &Memory| known.gpa == gpa) {
                    let (before, interpreter, translator) = (self.before[at], ours[at], theirs[at]);
                    differences.push(Memory { gpa, before, interpreter, translator });
                }
            }
        }
        differences
    }

    /// What memory should hold, in the order of these stores, after a shorter rehearsal of the same instructions.
    pub(super) fn with(&self, shorter: &Self) -> Vec<u8> {
        let mut expected = self.before.clone();
        for write in &shorter.writes {
            for offset in 0..u64::from(write.bytes) {
                let value = shorter.new[write.at as usize + offset as usize];
                self.places(Gpa(write.gpa.0 + offset)).for_each(|at| expected[at] = value);
            }
        }
        expected
    }

    /// The positions in the lists that stand for a byte of RAM.
    fn places(&self, gpa: Gpa) -> impl Iterator<Item = usize> {
        let inside = move |write: &&Write| gpa.0.wrapping_sub(write.gpa.0) < u64::from(write.bytes);
        self.writes.iter().filter(inside).map(move |write| write.at as usize + (gpa.0 - write.gpa.0) as usize)
    }

    /// What the interpreter's stores came to.
    pub(super) fn came_to(&self) -> &[u8] {
        &self.new
    }
}

impl Cpu {
    /// Stores can be taken back from here on.
    pub(super) fn begin_rehearsal(&mut self) {
        self.tlb.rehearse(true);
        self.rehearsal = Some(Box::default());
    }

    /// Ends what [`Cpu::begin_rehearsal`] began.
    pub(super) fn end_rehearsal(&mut self) -> Rehearsal {
        self.tlb.rehearse(false);
        self.rehearsal.take().map_or_else(Rehearsal::default, |rehearsal| *rehearsal)
    }

    /// A store to RAM is about to be made.
    pub(crate) fn note_store(&mut self, gpa: Gpa, bytes: u64) {
        if let Some(rehearsal) = &mut self.rehearsal {
            rehearsal.note(&self.shared.ram, gpa, bytes);
        }
    }
}
