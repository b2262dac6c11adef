//! What blocks were made from: the bytes of a page that were looked at.
//!
//! Where a page is overwritten, all of its blocks are forgotten; most have nothing to do with what has changed. They stay
//! where they are, and where one is looked for again that was made from what is there now, it is taken back. A hash says
//! that; if it were wrong, the guest would run what it had there before, behind the same checks.

use memory::{Gpa, PAGE_SIZE};
use twox_hash::XxHash3_64;

use super::{Jit, Key, Map, Piece};
use crate::block::Version;
use crate::cpu::Cpu;

/// Bytes of a jump of the host's.
const JUMP: usize = 5;

/// Bytes of a block's page that its translation depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Look {
    first: u16,
    length: u16,
    hash: u64,
}

impl Look {
    /// These bytes, the first of which is at `gpa`; they lie in one page.
    fn new(gpa: u64, bytes: &[u8]) -> Self {
        Self { first: (gpa % PAGE_SIZE) as u16, length: bytes.len() as u16, hash: XxHash3_64::oneshot(bytes) }
    }

    /// True where bytes of the page are the same, the first of which is that of the page.
    fn is_in(self, page: &[u8; PAGE_SIZE as usize]) -> bool {
        let first = usize::from(self.first);
        page.get(first..first + usize::from(self.length)).is_some_and(|bytes| XxHash3_64::oneshot(bytes) == self.hash)
    }
}

/// What is known about all blocks.
#[derive(Default)]
pub(super) struct Looks {
    /// Those of one block are beside each other.
    pub list: Vec<Look>,
    /// Forgotten blocks that may be taken back.
    pub asleep: Map<Key, Asleep>,
    /// How far flags were followed last, in the bytes at hand.
    pub furthest: usize,
}

/// A forgotten block that can be taken back.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asleep {
    piece: Piece,
    /// What its code began with.
    start: [u8; JUMP],
}

impl Jit {
    /// Notes that the translation being made depends on bytes, the first of which is at `gpa`.
    pub(super) fn note_look(&mut self, gpa: u64, bytes: &[u8]) {
        // What is run alone is compared anew each time.
        if self.lone.is_none() {
            self.looks.list.push(Look::new(gpa, bytes));
        }
    }

    /// Forgets a block of an overwritten page; it may be taken back.
    pub(super) fn put_to_sleep(&mut self, piece: Piece) {
        let block = &self.blocks[piece.block as usize];
        let (key, start, awake) = (block.key, block.start, block.alive);
        let one_page = block.second.is_none() && !block.looks.is_empty();
        let code = self.arena.bytes(start);
        self.forget_block(piece.block);
        if awake && one_page {
            self.looks.asleep.insert(key, Asleep { piece, start: code });
        }
    }

    /// Takes a block back that was made from what is there now.
    pub(super) fn wake(&mut self, cpu: &mut Cpu, key: Key) -> Option<u32> {
        let Asleep { piece, start } = *self.looks.asleep.get(&key)?;
        let page = key.gpa & !(PAGE_SIZE - 1);
        let looks = {
            let looks = &self.blocks[piece.block as usize].looks;
            looks.start as usize..looks.end as usize
        };
        let mut version = None;
        for at in looks.clone() {
            let Look { first, length, .. } = self.looks.list[at];
            let marked = self.mark_page(cpu, page + u64::from(first), length.into());
            version.get_or_insert(marked);
        }
        let mut bytes = [0; PAGE_SIZE as usize];
        let host = cpu.shared.ram.host_page(Gpa(page))?;
        // SAFETY: a page of guest RAM.
        unsafe { std::ptr::copy_nonoverlapping(host.as_ptr(), bytes.as_mut_ptr(), bytes.len()) };
        let same = self.looks.list[looks].iter().all(|look| look.is_in(&bytes));
        // Whatever is overwritten moves the first one.
        if !same || !version.is_some_and(Version::is_current) {
            return None;
        }
        self.looks.asleep.remove(&key);
        let block = &mut self.blocks[piece.block as usize];
        block.alive = true;
        self.arena.patch(block.start, &start);
        self.keep_block(cpu, key, piece);
        Some(piece.block)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_knows_its_bytes() {
        let mut page = [0; PAGE_SIZE as usize];
        for (first, length) in [(0, 1), (0, 64), (63, 2), (0, 4096), (4095, 1), (130, 128)] {
            let look = Look::new(0x5000 + first as u64, &page[first..first + length]);
            let (before, behind) = (first.wrapping_sub(1), first + length);
            for (at, same) in [(before, true), (first, false), (behind - 1, false), (behind, true)] {
                let Some(byte) = page.get_mut(at) else { continue };
                *byte ^= 0x40;
                assert_eq!(look.is_in(&page), same, "{length} bytes at {first}, changed at {at}");
                page[at] ^= 0x40;
            }
        }
    }
}
