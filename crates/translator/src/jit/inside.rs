//! Blocks inside others: where a branch leads into the middle of what has been translated.
//!
//! ```text
//!   block    i i i i i i jcc
//!   inside       i i i i jcc    the same code, entered later
//! ```
//!
//! That is possible where what comes before leaves nothing in temporaries that the rest relies on. Loops are found so: the
//! code before one goes on into it, and its end leads back to its start.

use memory::PAGE_SIZE;

use super::{Block, Jit, Key, loops};
use crate::block::Version;

/// What has been translated from one page.
pub(super) struct Page {
    pub version: Version,
    pub blocks: Vec<Piece>,
    /// A bit for each byte: set for those that blocks have instructions at, and those in between.
    covered: Box<[u64; PAGE_SIZE as usize / 64]>,
}

impl Page {
    pub(super) fn new(version: Version) -> Self {
        Self { version, blocks: Vec::new(), covered: Box::new([0; PAGE_SIZE as usize / 64]) }
    }

    pub(super) fn add(&mut self, piece: Piece) {
        let Piece { first, last, .. } = piece;
        if first <= last {
            let (start, end) = (usize::from(first / 64), usize::from(last / 64).min(self.covered.len() - 1));
            for (word, bits) in (start..).zip(&mut self.covered[start..=end]) {
                let from = if word == start { u64::MAX << (first % 64) } else { u64::MAX };
                let to = if word == end { u64::MAX >> (63 - last % 64) } else { u64::MAX };
                *bits |= from & to;
            }
        }
        self.blocks.push(piece);
    }

    /// The blocks that have instructions before and behind a byte, or at it.
    fn around(&self, at: u16) -> impl Iterator<Item = u32> {
        let covered = self.covered[usize::from(at / 64)] & 1 << (at % 64) != 0;
        let pieces = if covered { self.blocks.as_slice() } else { &[] };
        pieces.iter().filter(move |piece| (piece.first..=piece.last).contains(&at)).map(|piece| piece.block)
    }
}

/// A block of a page, and which of the page's bytes its instructions begin at.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub block: u32,
    pub first: u16,
    pub last: u16,
}

impl Piece {
    /// One that nothing is found inside of.
    pub(super) fn closed(block: u32) -> Self {
        Self { block, first: 1, last: 0 }
    }
}

impl Jit {
    /// A block for `key` inside another. `from` is where the branch is that leads there, if it is known.
    pub(super) fn find_inside(&mut self, key: Key, from: Option<u64>) -> Option<u32> {
        if self.lone.is_some() {
            return None;
        }
        let page = self.pages.get(&(key.gpa >> 12)).filter(|page| page.version.is_current())?;
        let at = (key.gpa % PAGE_SIZE) as u16;
        let (around, start) = page.around(at).find_map(|block| Some((block, self.enter_at(block, key)?)))?;
        // A loop that may be followed from turn to turn is worth a block of its own.
        if loops::may_be(key.mode)
            && from.and_then(|from| self.block_at(from)).is_some_and(|(_, block)| block == around)
        {
            return None;
        }
        let Block { anchor, ref looks, .. } = self.blocks[around as usize];
        let looks = looks.clone();
        let block = self.blocks.len() as u32;
        self.blocks.push(Block {
            key,
            anchor,
            start,
            marks: 0..0,
            instructions: 0,
            second: None,
            landing: 0,
            looks,
            alive: true,
        });
        self.by_key.insert(key, block);
        self.pages.get_mut(&(key.gpa >> 12))?.add(Piece::closed(block));
        Some(block)
    }

    /// The block whose code an address is in, and where that begins.
    pub(super) fn block_at(&self, host: u64) -> Option<(u64, u32)> {
        let before = self.starts.partition_point(|(start, _)| *start <= host).checked_sub(1)?;
        Some(self.starts[before])
    }

    /// Where the instruction of `key` begins in a block that it may be entered in.
    fn enter_at(&self, around: u32, key: Key) -> Option<u64> {
        let block = &self.blocks[around as usize];
        let offset = key.gpa.wrapping_sub(block.key.gpa);
        let same = block.alive && key.mode == block.key.mode && key.rip.wrapping_sub(block.key.rip) == offset;
        if !same || offset > u64::from(u16::MAX) || block.second.is_some() {
            return None;
        }
        let first = block.marks.start as usize;
        let marks = &self.marks[first..first + usize::from(block.instructions)];
        let mark = marks[marks.binary_search_by_key(&(offset as u16), |mark| mark.guest).ok()?];
        mark.enter.then(|| block.start + u64::from(mark.host))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_around_what_is_between_their_first_and_last_instruction() {
        let mut page = Page::new(Version::NEVER);
        page.add(Piece { block: 1, first: 60, last: 200 });
        page.add(Piece { block: 2, first: 4000, last: 4095 });
        page.add(Piece { block: 3, first: 128, last: 128 });
        page.add(Piece::closed(4));
        let around = |at| page.around(at).collect::<Vec<_>>();
        for (at, blocks) in [(59, &[][..]), (60, &[1]), (128, &[1, 3]), (200, &[1]), (201, &[]), (1, &[]), (0, &[])] {
            assert_eq!(around(at), blocks, "at {at}");
        }
        assert_eq!((around(3999), around(4000), around(4095)), (vec![], vec![2], vec![2]));
    }
}
