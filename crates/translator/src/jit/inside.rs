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

use super::{Block, Jit, Key, Piece, loops};

impl Jit {
    /// A block for `key` inside another. `from` is where the branch is that leads there, if it is known.
    pub(super) fn find_inside(&mut self, key: Key, from: Option<u64>) -> Option<u32> {
        if self.lone.is_some() {
            return None;
        }
        let page = self.pages.get(&(key.gpa >> 12)).filter(|page| page.version.is_current())?;
        let at = (key.gpa % PAGE_SIZE) as u16;
        let around = page.blocks.iter().filter(|piece| (piece.first..=piece.last).contains(&at));
        let (around, start) =
            around.map(|piece| piece.block).find_map(|block| Some((block, self.enter_at(block, key)?)))?;
        // A loop that may be followed from turn to turn is worth a block of its own.
        if loops::may_be(key.mode)
            && from.and_then(|from| self.block_at(from)).is_some_and(|(_, block)| block == around)
        {
            return None;
        }
        let Block { anchor, .. } = self.blocks[around as usize];
        let block = self.blocks.len() as u32;
        self.blocks.push(Block {
            key,
            anchor,
            start,
            marks: 0..0,
            instructions: 0,
            second: None,
            landing: 0,
            alive: true,
        });
        self.by_key.insert(key, block);
        self.pages.get_mut(&(key.gpa >> 12))?.blocks.push(Piece::closed(block));
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
